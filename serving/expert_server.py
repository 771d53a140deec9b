"""Servers on several ranks that share the routed experts of one model:

    torchrun --nproc-per-node 2 -m serving.expert_server checkpoint=runs/default redundant=4 placement_every=200

Every rank is a server as of `serving.server`, with sequences and a cache of its own; rank r listens on port + r. Put
any load balancer before them. Of the routed experts a rank holds only its own, and copies of busy ones (redundant=);
every placement_every steps they get new places by their loads, while the servers go on. If a rank dies all end, and
torchrun starts them again (--max-restarts).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.last_word import leave_last_word_to_rank_0
from parallel.saved import CheckpointError
from parallel.whole import FoundModel, find_model
from serving.engine import CacheSize, Engine
from serving.expert_groups import serving_groups
from serving.expert_parallel import load_experts
from serving.expert_plan import ExpertSettings
from serving.load import resolve_device, use_cpu, wants_kernels
from serving.options import parse_options, usage
from serving.scheduler import Limits
from serving.server_options import ServerOptions
from serving.tokenizers import load_tokenizer


@dataclass
class ExpertServerOptions(ServerOptions):
    redundant: int = 0  # copies of experts beyond one each, in all ranks together
    placement_every: int = 0  # steps from one placement by loads to the next; 0 = never
    policy: str = "global"  # global | hierarchical (groups of experts stay within a node, as suits prefill)
    ranks_per_node: int = 8  # for the hierarchical policy
    active: int = 0  # most experts of a rank that are used for a layer of a step; 0 = all that it holds
    overlap: bool = False  # compute large steps as two micro-batches in turns
    overlap_rows: int = 256  # a step is large when one rank has at least so many tokens in it
    timeout: int = 300  # seconds after which a silent rank counts as gone

    def experts(self) -> ExpertSettings:
        return ExpertSettings(self.redundant, self.placement_every, self.policy, self.ranks_per_node,
                              active=self.active, overlap_rows=self.overlap_rows if self.overlap else 0)  # fmt: skip


def serve(options: ExpertServerOptions, rank: int, world: int) -> int:
    """Serve until a signal or a failure; returns an exit code. Raises ValueError or CheckpointError."""
    try:
        import uvicorn

        from serving.app import create_app
        from serving.expert_worker import SharedWorker
        from serving.guard import settings_of
    except ImportError as error:
        raise ValueError(f"the server needs more packages: pip install 'dualpipe-stack[serve]' ({error})") from error
    found, limits, cache = check(options, world)
    use_cpu(options.threads)
    device = resolve_device(options.device)
    cpp = wants_kernels(options.compile, options.precision, device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=options.timeout)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    groups = serving_groups(range(world), timeout)
    experts = load_experts(found, options.precision, device, groups, options.experts(), options.ema, cpp)
    engine = Engine(experts.stage, options.max_length or found.max_length, cache, limits, options.drafts, experts)
    settings = settings_of(options, Path(options.checkpoint).resolve().name)
    port = options.port + rank

    def end() -> None:
        server.should_exit = True

    worker = SharedWorker(engine, load_tokenizer(found.folder, found.config), end)
    app = create_app(worker, settings)
    server = uvicorn.Server(uvicorn.Config(app, host=options.host, port=port, log_level="warning",
                                           timeout_graceful_shutdown=5))  # fmt: skip
    print(f"serving {settings.name} on http://{options.host}:{port} (rank {rank} of {world})", flush=True)
    server.run()
    if worker.failed is not None:
        print(worker.failed, file=sys.stderr, flush=True)
        return 1
    return 0


def check(options: ExpertServerOptions, world: int) -> tuple[FoundModel, Limits, CacheSize]:
    """What can be said before there are processes. Raises ValueError or CheckpointError."""
    limits = Limits(options.max_sequences, options.batch_tokens, options.waiting)
    limits.check(options.drafts)
    if options.page_size < 1 or options.cache_tokens < options.page_size:
        raise ValueError(f"cache_tokens={options.cache_tokens} does not hold a page of page_size={options.page_size}")
    if options.max_length < 0 or options.timeout < 1:
        raise ValueError(f"max_length={options.max_length} must not be negative, timeout={options.timeout} at least 1")
    if options.overlap_rows < 1:
        raise ValueError(f"overlap_rows={options.overlap_rows} must be at least 1")
    if options.overlap and world == 1:
        raise ValueError("overlap=true needs two ranks or more: with one, no tokens travel")
    found = find_model(Path(options.checkpoint), options.ema)
    if not found.config.num_moe_layers:
        raise ValueError(f"{options.checkpoint} has no routed experts to share; use serving.server")
    options.experts().check(found.config.num_experts, world)
    return found, limits, CacheSize(options.cache_tokens // options.page_size, options.page_size)


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage(__doc__, ExpertServerOptions))
        return 0 if words else 2
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "0"))
    try:
        options = parse_options(ExpertServerOptions, words)
        if not world:
            raise ValueError("start this with torchrun, e.g. torchrun --nproc-per-node 2 -m serving.expert_server "
                             "checkpoint=… redundant=4 placement_every=200")  # fmt: skip
        return serve(options, rank, world)
    except (CheckpointError, ValueError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        leave_last_word_to_rank_0()
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
