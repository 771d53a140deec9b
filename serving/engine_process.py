"""One engine as a process: loads the model, joins the front, computes until the front is gone.

Started by a supervisor (cluster.py), with the keys of the cluster's command line and who it is. It ends when its
standard input does, so it never outlives its supervisor. Exit codes: 2 for what a restart cannot mend.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from parallel.saved import CheckpointError
from serving.backend import EngineState
from serving.cluster_options import DECODE, PREFILL, EngineOptions
from serving.engine import CacheSize, Engine
from serving.handover import Pair
from serving.load import load_served
from serving.meeting import FRONT, meeting_store
from serving.options import parse_options
from serving.roles import Decode, Links, Prefill, Role, Whole
from serving.scheduler import Limits
from serving.sides import DecodeEngine, PrefillEngine
from serving.wire import GONE, Channel, Message

STATE_SECONDS = 1.0  # how often the front hears how things are


def run(role: Role, channel: Channel) -> None:
    """Obey and compute, until the front is gone."""
    state, said, room, idle = EngineState(), 0.0, None, False
    while obey(role, channel, wait=idle):
        engine = role.engine
        steps = engine.counters.steps
        events = engine.step()
        idle = engine.counters.steps == steps
        news: Message = {"kind": "step", "events": [[e.id, list(e.tokens), e.finish] for e in events]}
        if role.room != room:
            room = news["room"] = role.room
        now = time.monotonic()
        if now - said > STATE_SECONDS or idle:
            said, newest = now, EngineState.of(engine)
            if newest != state:
                state, news["state"] = newest, asdict(newest)
        if len(news) > 2 or events:
            channel.send(news)


def obey(role: Role, channel: Channel, wait: bool) -> bool:
    """Everything that is in the inbox, or the next thing that comes. False when the front is gone."""
    inbox = channel.inbox
    while wait or not inbox.empty():
        message = inbox.get()
        if message is GONE:
            return False
        role.obey(message)
        wait = False
    return True


def make_engine(options: EngineOptions) -> Engine:
    """Raises ValueError or CheckpointError for what cannot be served."""
    o = options
    model = load_served(o.checkpoint, o.precision, o.device, o.ema, o.max_length)
    if o.side == PREFILL:
        cache = CacheSize(o.prefill_cache_tokens // o.prefill_page_size, o.prefill_page_size)
        limits = Limits(o.prefill_sequences, o.prefill_batch_tokens)
        return PrefillEngine(model.stage, model.max_length, cache, limits, o.drafts)
    cache, limits = CacheSize(o.cache_tokens // o.page_size, o.page_size), Limits(o.max_sequences, o.batch_tokens)
    kind = DecodeEngine if o.side == DECODE else Engine
    return kind(model.stage, model.max_length, cache, limits, o.drafts)


def make_role(engine: Engine, options: EngineOptions, store: dist.Store, channel: Channel) -> Role:
    def connect(name: str, rank: int) -> Pair:
        place = dist.PrefixStore(f"link/{name}", store)
        return Pair(options.backend, place, rank, options.timeout, engine.decoder.device)

    links = Links(connect, channel.inbox.put)
    if isinstance(engine, PrefillEngine):
        return Prefill(engine, channel.send, links, channel.inbox.put)
    if isinstance(engine, DecodeEngine):
        return Decode(engine, channel.send, links, channel.inbox.put)
    return Whole(engine, channel.send)


def serve(options: EngineOptions) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    engine = make_engine(options)
    store = meeting_store(timedelta(seconds=options.timeout))
    host, port, key = store.get(FRONT).decode().split()
    hello: dict[str, Any] = {"side": options.side, "index": options.index, "pid": os.getpid()}
    channel = Channel(host, int(port), key, hello)
    with torch.inference_mode():
        run(make_role(engine, options, store, channel), channel)


def end_with_supervisor() -> None:
    """Its end of our standard input closes when it dies, however it dies."""
    sys.stdin.buffer.read()
    os._exit(0)


def main(words: list[str]) -> int:
    threading.Thread(target=end_with_supervisor, daemon=True).start()
    try:
        serve(parse_options(EngineOptions, words))
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # links' threads may be waiting for peers for ever
