"""The keys of `python -m serving.cluster`, who is what among its ranks, and what is checked before anything starts.

Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from serving.server_options import ServerOptions

PREFILL, DECODE, WHOLE = "prefill", "decode", "whole"  # what a process does; whole: both, for its own requests
BACKENDS = ("gloo", "nccl")


@dataclass
class ClusterOptions(ServerOptions):
    """max_sequences, batch_tokens, cache_tokens and page_size are those of each process that decodes."""

    prefill: int = 1  # processes that read prompts
    decode: int = 1  # processes that make the other tokens
    together: int = 0  # or: processes that do both; with prefill=0 decode=0
    prefill_ep: int = 1  # so many prefill processes share the experts of one model; 1 = each has all of them
    decode_ep: int = 1  # the same of decode processes
    together_ep: int = 1
    prefill_redundant: int = 0  # copies of experts beyond one each, in each group that shares them
    decode_redundant: int = 0  # the same for processes that decode, or do both
    placement_every: int = 0  # steps of a group from one placement by loads to the next; 0 = never
    ranks_per_node: int = 8  # in prefill, groups of experts stay within a node
    overlap: bool = False  # processes that share experts compute large steps as two micro-batches in turns
    overlap_rows: int = 256  # a step is large when one process of the group has at least so many tokens in it
    prefill_sequences: int = 4  # prompts at once in a prefill process, read or waiting to leave; more wait at the front
    prefill_batch_tokens: int = 512  # per step
    prefill_cache_tokens: int = 16384
    prefill_page_size: int = 16
    backend: str = "gloo"  # gloo | nccl, for caches and tokens that travel
    silence: float = 20.0  # seconds without a sign of life after which a process counts as lost and is started again
    timeout: float = 60.0  # seconds: for a block of a cache to travel, and for processes to find each other

    def ep(self, side: str) -> int:
        """How many processes of a side share the experts of one model."""
        return {PREFILL: self.prefill_ep, DECODE: self.decode_ep, WHOLE: self.together_ep}[side]


@dataclass
class EngineOptions(ClusterOptions):
    """Of one engine process; its supervisor adds who it is."""

    side: str = MISSING
    index: int = MISSING


def check_cluster(options: ClusterOptions, world: int) -> None:
    """Raise ValueError for settings under which nothing could run. world: ranks that torchrun has started."""
    o = options
    for name in ("prefill", "decode", "together"):
        if getattr(o, name) < 0:
            raise ValueError(f"{name}={getattr(o, name)} must not be negative")
    if o.together and (o.prefill or o.decode):
        raise ValueError(f"together={o.together} goes with prefill=0 decode=0: a process does both, or one of the two")
    if not o.together and not (o.prefill and o.decode):
        raise ValueError(f"prefill={o.prefill} decode={o.decode}: there must be at least one process of each")
    total = o.prefill + o.decode + o.together
    if total != world:
        given = f"together={o.together}" if o.together else f"prefill={o.prefill} decode={o.decode}"
        raise ValueError(f"{given} makes {total} processes, but torchrun started {world}: "
                         f"use torchrun --nproc-per-node {total}, or other numbers")  # fmt: skip
    for side, count in ((PREFILL, o.prefill), (DECODE, o.decode), ("together", o.together)):
        ep = getattr(o, f"{side}_ep")
        if ep < 1 or count % ep:
            raise ValueError(f"{side}_ep={ep} must be at least 1 and divide {side}={count}")
    for name in ("prefill_redundant", "decode_redundant", "placement_every"):
        if getattr(o, name) < 0:
            raise ValueError(f"{name}={getattr(o, name)} must not be negative")
    if o.ranks_per_node < 1:
        raise ValueError(f"ranks_per_node={o.ranks_per_node} must be at least 1")
    if o.overlap and max(o.prefill_ep, o.decode_ep, o.together_ep) == 1:
        raise ValueError(
            "overlap=true needs processes that share experts: prefill_ep, decode_ep or together_ep above 1"
        )
    if o.overlap_rows < 1:
        raise ValueError(f"overlap_rows={o.overlap_rows} must be at least 1")
    if o.backend not in BACKENDS:
        raise ValueError(f"backend={o.backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if o.compile not in ("on", "off"):
        raise ValueError(f"compile={o.compile!r} is unknown; choose on or off")
    for name in ("silence", "timeout"):
        if getattr(o, name) <= 0:
            raise ValueError(f"{name}={getattr(o, name)} must be more than 0 seconds")
    if o.prefill_sequences < 1:
        raise ValueError(f"prefill_sequences={o.prefill_sequences} must be at least 1")
    for side in ("", "prefill_"):
        tokens, size = getattr(o, f"{side}cache_tokens"), getattr(o, f"{side}page_size")
        if size < 1 or tokens < size:
            raise ValueError(f"{side}cache_tokens={tokens} does not hold a page of {side}page_size={size}")


def place(options: ClusterOptions, rank: int) -> tuple[str, int]:
    """(side, number on that side) of a rank: prefill first."""
    if options.together:
        return WHOLE, rank
    return (PREFILL, rank) if rank < options.prefill else (DECODE, rank - options.prefill)
