"""Text as bytes: the tokens that the corpus is made of (training/corpus.py) and that generation gives back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

EOD = 256


@dataclass(frozen=True)
class ByteTokenizer:
    """Tokens 0 to 255 are the bytes of UTF-8; 256 ends a document."""

    vocab_size: int = 257
    eod: int = EOD

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the byte tokens; ends of documents are left out, and broken UTF-8 is shown as �."""
        return bytes(t for t in tokens if t != self.eod).decode(errors="replace")
