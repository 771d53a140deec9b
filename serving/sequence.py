"""A request, and the sequence of tokens that it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.sampling import Sampling

STOP, LENGTH = "stop", "length"  # why a sequence ended, in the words of the OpenAI interface


@dataclass(frozen=True)
class Request:
    """eod: the token that ends the sequence; None: only its length does."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eod: int | None = None


@dataclass(eq=False)
class Draft:
    """A guess of the next token, and the distribution q [V] (FP64) that it was drawn from."""

    token: int
    q_V: Tensor


@dataclass(eq=False)
class Sequence:
    """tokens: the prompt and what was made of it; the first `cached` of them are in the cache, in `slots`.

    Two of them are equal if they are the same one.
    """

    request: Request
    tokens: list[int]
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    draft: Draft | None = None
    finish: str | None = None

    @staticmethod
    def of(request: Request) -> Sequence:
        return Sequence(request, list(request.prompt))

    @property
    def made(self) -> int:
        """How many tokens were made so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens that must be read before the next one can be made."""
        return len(self.tokens) - self.cached

    def add_pages(self, pages: list[int], size: int) -> None:
        if not pages:
            return
        new = torch.tensor(pages).unsqueeze(1) * size + torch.arange(size)
        self.pages += pages
        self.slots = torch.cat((self.slots, new.flatten()))

    def drop_pages(self) -> list[int]:
        """Forget what is in the cache; returns the pages. What was made stays, and is read again like a prompt."""
        pages, self.pages = self.pages, []
        self.slots = self.slots[:0]
        self.cached, self.draft = 0, None
        return pages

    def append(self, token: int) -> bool:
        """Add a token; True if the sequence goes on after it. The token that ends it is not kept."""
        if token == self.request.eod:
            self.finish = STOP
            return False
        self.tokens.append(token)
        if self.made == self.request.max_tokens:
            self.finish = LENGTH
        return self.finish is None
