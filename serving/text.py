"""From tokens that come one by one to text that can be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from serving.tokenizers import Tokenizer

LONGEST = 16  # tokens that may be waiting for the rest of a character; then they are broken, and shown as such


class TextStream:
    """Text is held back while it could still become a character or a stop string. stopped: one was found."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if any(not s for s in stop):
            raise ValueError("a stop string must not be empty")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._pending: list[int] = []
        self._held = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that can be shown now. After a stop string there is no more."""
        for token in tokens:
            self._pending.append(token)
            text = self._tokenizer.decode(self._pending)
            if text.endswith("\ufffd") and len(self._pending) < LONGEST:
                continue
            self._pending = []
            self._held += text
        return self._release()

    def close(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        self._held += self._tokenizer.decode(self._pending)
        self._pending = []
        shown = self._release()
        rest, self._held = ("" if self.stopped else self._held), ""
        return shown + rest

    def _release(self) -> str:
        if self.stopped:
            return ""
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text with which the stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
