"""The OpenAI-compatible bodies: what may be asked, and what that means for the engine.

A field that exists there but not here is accepted with its neutral value and otherwise refused by name: silence would
be a wrong answer. `top_k` is ours (`extra_body={"top_k": 20}` in the official client).
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.sampling import Sampling
from serving.admission import Refused
from serving.sequence import Request
from serving.tokenizers import Tokenizer

MOST_CHOICES = 64

# Fields that we do not serve, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1), "echo": (None, False), "frequency_penalty": (None, 0), "logit_bias": (None, {}),
    "logprobs": (None, False), "presence_penalty": (None, 0), "suffix": (None, ""), "tools": (None, []),
    "tool_choice": (None, "none"), "top_logprobs": (None, 0), "response_format": (None, {"type": "text"}),
    "store": (None, False), "service_tier": (None, "auto", "default"), "parallel_tool_calls": (None, True, False),
    "modalities": (None, ["text"]),
}  # fmt: skip
_WITHOUT_MEANING = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})


class Fields(BaseModel):
    """Fields of which null means the same as absence."""

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name not in cls.model_fields}


class StreamOptions(Fields):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Body(Fields):
    """What completions and chat have in common."""

    model_config = ConfigDict(extra="allow")
    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    seed: int | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def check_rest(self) -> None:
        """Raise Refused for fields that are unknown, or known and not served."""
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise Refused(f"{name}={value!r} is not supported by this server")
            if name not in _NEUTRAL and name not in _WITHOUT_MEANING:
                raise Refused(f"{name!r} is unknown")
        if any(not text for text in self.stops):
            raise Refused("a stop string must not be empty")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, number: int) -> Sampling:
        """Of choice `number`. Without a seed everybody gets one of his own."""
        seed = secrets.randbits(63) if self.seed is None else (self.seed + number) % 2**64
        temperature, top_p = (1.0 if value is None else value for value in (self.temperature, self.top_p))
        return Sampling(temperature, self.top_k, top_p, seed)


class CompletionBody(Body):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = None


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(Body):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


@dataclass(frozen=True)
class Asked:
    """What a body means: requests in the order of the choices, and where their texts end."""

    requests: tuple[Request, ...]
    stop: tuple[str, ...]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; the choices of one prompt share it."""
        return sum(len(prompt) for prompt in {id(r.prompt): r.prompt for r in self.requests}.values())


def completion(body: CompletionBody, tokenizer: Tokenizer, max_length: int) -> Asked:
    """Raises Refused, saying what is wrong."""
    body.check_rest()
    prompts: list[Sequence[int]]
    if isinstance(body.prompt, str):
        prompts = [tokenizer.encode(_checked(body.prompt))]
    elif all(isinstance(item, int) for item in body.prompt):
        prompts = [body.prompt]  # type: ignore[list-item]
    else:
        prompts = [tokenizer.encode(_checked(p)) if isinstance(p, str) else p for p in body.prompt]  # type: ignore[misc]
    if len(prompts) * body.n > MOST_CHOICES:
        raise Refused(f"{len(prompts)} prompts with n={body.n} are more than {MOST_CHOICES} choices")
    most = 16 if body.max_tokens is None else body.max_tokens
    return Asked(_requests(body, prompts, most, tokenizer), tuple(body.stops))


def chat(body: ChatBody, tokenizer: Tokenizer, max_length: int) -> Asked:
    """Raises Refused, saying what is wrong. Without a limit an answer may be as long as fits."""
    body.check_rest()
    messages = [{"role": m.role, "content": _checked(m.text)} for m in body.messages]
    try:
        prompt = tokenizer.encode_chat(messages)
    except ValueError as error:
        raise Refused(str(error)) from None
    limits = [n for n in (body.max_tokens, body.max_completion_tokens) if n is not None]
    most = min(limits) if limits else max(1, max_length - len(prompt))
    return Asked(_requests(body, [prompt], most, tokenizer), (*body.stops, *tokenizer.chat_stop))


def _checked(text: str) -> str:
    """Raises Refused for what is no text: JSON can write half a character, such as "\\ud800"."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"the text is not valid Unicode: {error}") from None
    return text


def _requests(body: Body, prompts: Sequence[Sequence[int]], most: int, tokenizer: Tokenizer) -> tuple[Request, ...]:
    fixed = [tuple(prompt) for prompt in prompts]
    return tuple(
        Request(uuid.uuid4().hex, prompt, most, body.sampling(number * body.n + choice), tokenizer.eod)
        for number, prompt in enumerate(fixed)
        for choice in range(body.n)
    )
