"""Text to tokens and back: bytes for our own runs, tokenizer.json for folders in the public format.

A conversation becomes one prompt. A public tokenizer brings a template for that (tokenizer_config.json); models
trained on bytes know no special tokens, so theirs is plain text: each message as `role: content` and a blank line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from model.config import ModelConfig
from model.tokenizer import ByteTokenizer

Message = Mapping[str, str]


class Tokenizer(Protocol):
    """eod: the token after which there is nothing more. chat_stop: texts at which an answer in a conversation ends."""

    @property
    def eod(self) -> int | None: ...

    @property
    def chat_stop(self) -> tuple[str, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]: ...


class Bytes:
    """The tokenizer of our own corpora."""

    eod: int | None = ByteTokenizer().eod
    chat_stop: tuple[str, ...] = ("\n\nuser:", "\n\nsystem:")

    def encode(self, text: str) -> list[int]:
        return ByteTokenizer().encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return ByteTokenizer().decode(t for t in tokens if t < 256)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self.encode("".join(f"{m['role']}: {m['content']}\n\n" for m in messages) + "assistant:")


class FromFile:
    """A tokenizer.json, with the end token and the chat template of tokenizer_config.json beside it."""

    chat_stop: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ValueError(
                f"{folder} has a tokenizer.json, which needs: pip install 'dualpipe-stack[serve]'"
            ) from None
        self._library = Library.from_file(str(folder / "tokenizer.json"))
        path = folder / "tokenizer_config.json"
        settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self._settings, self._folder = settings, folder
        self.eod = self._library.token_to_id(_text_of(settings["eos_token"])) if settings.get("eos_token") else None

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._library.decode(list(tokens), skip_special_tokens=True))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        template = self._settings.get("chat_template")
        if not template:
            raise ValueError(f"{self._folder}/tokenizer_config.json has no chat_template; use the completions endpoint")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(reason: str) -> None:  # templates call it, e.g. for roles that do not alternate
            raise TemplateError(reason)

        tokens = {name: _text_of(self._settings.get(name) or "") for name in ("bos_token", "eos_token")}
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            page = environment.from_string(template)
            text = page.render(messages=list(messages), add_generation_prompt=True, **tokens)
        except TemplateError as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error
        return list(self._library.encode(text, add_special_tokens=False).ids)


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model that was loaded from this folder. Raises ValueError if there is none that fits."""
    if (folder / "tokenizer.json").is_file():
        return FromFile(folder)
    if config.vocab_size != ByteTokenizer().vocab_size:
        raise ValueError(f"{folder} has no tokenizer.json, and {config.vocab_size} tokens are not those of bytes (257)")
    return Bytes()


def _text_of(token: Any) -> str:
    """A special token is written as text or as an object with its text in `content`."""
    return str(token["content"] if isinstance(token, dict) else token)
