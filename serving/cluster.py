"""Serving with prefill and decode in separate processes, started by one command:

    torchrun --nproc-per-node 3 -m serving.cluster checkpoint=runs/default prefill=1 decode=2

Endpoints, limits and keys are those of serving.server. Rank 0 is the front: it answers HTTP, and tells the engine
processes what to do. Every rank starts an engine process and starts it again when it dies. With together=2 prefill=0
decode=0 there are two processes that do both.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from parallel.last_word import leave_last_word_to_rank_0
from serving.cluster_options import ClusterOptions, check_cluster, place
from serving.options import parse_options, usage
from serving.supervisor import Supervisor

if TYPE_CHECKING:
    from fastapi import FastAPI


def make_front(options: ClusterOptions) -> FastAPI:
    """The web application over a router. Raises ValueError or CheckpointError for what cannot be served."""
    try:
        import uvicorn  # noqa: F401

        from serving.app import create_app
        from serving.guard import settings_of
        from serving.router import Router
    except ImportError as error:
        raise ValueError(f"the server needs more packages: pip install 'dualpipe-stack[serve]' ({error})") from error
    from datetime import timedelta
    from pathlib import Path

    from parallel.whole import find_model
    from serving.load import check_max_length
    from serving.meeting import FRONT, control_host, meeting_store
    from serving.scheduler import Limits
    from serving.tokenizers import load_tokenizer

    o = options
    if not o.together:
        Limits(o.prefill_sequences, o.prefill_batch_tokens).check(o.drafts)
    Limits(o.max_sequences, o.batch_tokens, o.waiting).check(o.drafts)
    check_max_length(o.max_length)
    path = Path(o.checkpoint)
    model = find_model(path, o.ema)
    if max(o.prefill_ep, o.decode_ep, o.together_ep) > 1 and not model.config.num_moe_layers:
        raise ValueError(f"{path} has no routed experts to share; leave …_ep out")
    tokenizer = load_tokenizer(model.folder, model.config)
    settings = settings_of(o, path.resolve().name)
    store = meeting_store(timedelta(seconds=o.timeout), is_front=True)

    def greet() -> None:
        print(f"serving {settings.name} on http://{o.host}:{o.port}", flush=True)

    router = Router(o, tokenizer, model.config.vocab_size, o.max_length or model.max_length, control_host(),
                    lambda where: store.set(FRONT, where), greet)  # fmt: skip
    return create_app(router, settings)


def run_front(options: ClusterOptions, supervisor: Supervisor) -> int:
    """HTTP in this thread, until a signal comes or the engine process of this rank is no use."""
    app = make_front(options)
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host=options.host, port=options.port, log_level="warning",
                                           timeout_graceful_shutdown=5))  # fmt: skip
    codes: list[int] = []

    def supervise() -> None:
        codes.append(supervisor.run())
        server.should_exit = True

    thread = threading.Thread(target=supervise)
    thread.start()
    try:
        server.run()
    finally:
        supervisor.stop()
        thread.join()
    return codes[0]


def run_rank(options: ClusterOptions, words: list[str], rank: int) -> int:
    side, index = place(options, rank)
    supervisor = Supervisor(f"{side} process {index}", [*words, f"side={side}", f"index={index}"], options.silence)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    return run_front(options, supervisor) if rank == 0 else supervisor.run()


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage(__doc__, ClusterOptions))
        return 0 if words else 2
    rank = int(os.environ.get("RANK", "0"))
    try:
        options = parse_options(ClusterOptions, words)
        if "RANK" not in os.environ:
            raise ValueError("start this with torchrun, e.g. torchrun --nproc-per-node 3 -m serving.cluster "
                             "checkpoint=… prefill=1 decode=2")  # fmt: skip
        check_cluster(options, int(os.environ["WORLD_SIZE"]))
        return run_rank(options, words, rank)
    except (ValueError, RuntimeError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        leave_last_word_to_rank_0()
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
