"""The OpenAI-compatible answers: whole, or chunk by chunk."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from serving.calls import Delta


@dataclass(frozen=True)
class Form:
    """How an endpoint's answers look. is_chat: texts are messages."""

    prefix: str
    whole: str
    chunk: str
    is_chat: bool


COMPLETION = Form("cmpl", "text_completion", "text_completion", is_chat=False)
CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", is_chat=True)


class Answer:
    """Collects the deltas of one call. complete: all choices have ended."""

    def __init__(self, form: Form, model: str, prompt_tokens: int, choices: int) -> None:
        self.form, self.model, self.prompt_tokens = form, model, prompt_tokens
        self.id, self.created = f"{form.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._texts = [""] * choices
        self._finishes: list[str | None] = [None] * choices
        self._made = 0

    @property
    def complete(self) -> bool:
        return all(finish is not None for finish in self._finishes)

    def add(self, delta: Delta) -> None:
        self._texts[delta.index] += delta.text
        self._finishes[delta.index] = delta.finish
        self._made += delta.tokens

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, (text, finish) in enumerate(zip(self._texts, self._finishes, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self.form.is_chat else {"text": text}
            choices.append({"index": index, **said, "finish_reason": finish, "logprobs": None})
        return {**self._frame(self.form.whole), "choices": choices, "usage": self._usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """In a chat every choice begins with its role."""
        if self.form.is_chat:
            for index in range(len(self._texts)):
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def chunk(self, delta: Delta) -> dict[str, Any]:
        said = {"delta": {"content": delta.text}} if self.form.is_chat else {"text": delta.text}
        return self._chunk(delta.index, said, delta.finish)

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._frame(self.form.chunk), "choices": [], "usage": self._usage()}

    def _chunk(self, index: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **said, "finish_reason": finish, "logprobs": None}
        return {**self._frame(self.form.chunk), "choices": [choice]}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self._made
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self._made, "total_tokens": total}
