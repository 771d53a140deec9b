"""One engine as a process: loads the model, joins the front, computes until the front is gone.

Started by a supervisor (cluster.py), with the keys of the cluster's command line and who it is. It ends when its
standard input does, so it never outlives its supervisor. Exit codes: 2 for what a restart cannot mend.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.saved import CheckpointError
from parallel.whole import find_model
from serving.backend import EngineState
from serving.cluster_options import DECODE, PREFILL, EngineOptions
from serving.engine import CacheSize, Engine, Event
from serving.expert_parallel import load_experts
from serving.expert_plan import ExpertSettings
from serving.handover import Pair
from serving.load import load_served, resolve_device, use_cpu, wants_kernels
from serving.meeting import FRONT, meeting_store
from serving.options import parse_options
from serving.pulse import give_signs
from serving.roles import Decode, Links, Prefill, Role, Whole
from serving.scheduler import Limits
from serving.sharing import SharedExperts
from serving.sides import DecodeEngine, PrefillEngine
from serving.wire import GONE, Channel, Message

STATE_SECONDS = 1.0  # how often the front hears how things are
SHARED_PAUSE = 0.005  # seconds between two looks for work in a group that shares experts and has none


def run(role: Role, channel: Channel, shared: SharedExperts | None) -> None:
    """Obey and compute, until the front is gone."""
    reporter, idle = Reporter(channel), False
    while obey(role, channel, shared, (None if shared is None or not shared.there else SHARED_PAUSE) if idle else 0):
        if shared is not None and shared.wanted:
            channel.send({"kind": "ready"} if shared.join() else {"kind": "apart", "group": shared.name})
        if shared is not None and not shared.there:
            idle = True
            continue
        role.before_step()
        before = steps_of(role.engine)
        events = role.engine.step() if shared is None else shared.step(role.engine)
        if shared is not None and not shared.there:
            channel.send({"kind": "apart", "group": shared.name})
        idle = steps_of(role.engine) == before
        reporter.tell(role, events, idle)


def steps_of(engine: Engine) -> int:
    """Steps, those in which only others of a group had work among them."""
    return engine.counters.steps if engine.experts is None else engine.experts.steps


class Reporter:
    """Tells the front what came of each step, and now and then how things are."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._state, self._said = channel, EngineState(), 0.0
        self._room: Message | None = None

    def tell(self, role: Role, events: list[Event], idle: bool) -> None:
        news: Message = {"kind": "step", "events": [[e.id, list(e.tokens), e.finish] for e in events]}
        if role.room != self._room:
            self._room = news["room"] = role.room
        now = time.monotonic()
        if now - self._said > STATE_SECONDS or (idle and role.engine.experts is None):  # the next look may be far off
            self._said, newest = now, EngineState.of(role.engine)
            if newest != self._state:
                self._state, news["state"] = newest, asdict(newest)
        if len(news) > 2 or events:
            self._channel.send(news)


def obey(role: Role, channel: Channel, shared: SharedExperts | None, wait: float | None) -> bool:
    """Everything that is in the inbox; wait so many seconds for something to come. False when the front is gone."""
    try:
        message = channel.inbox.get(timeout=wait) if wait != 0 else channel.inbox.get_nowait()
        while message is not GONE:
            if message["kind"] == "regroup" and shared is not None:
                shared.wanted = message
            else:
                role.obey(message)
            message = channel.inbox.get_nowait()
    except queue.Empty:
        return True
    return False


def make_engine(options: EngineOptions) -> Engine:
    """Raises ValueError or CheckpointError for what cannot be served."""
    o = options
    experts = None
    if o.ep(o.side) == 1:
        model = load_served(o.checkpoint, o.precision, o.device, o.ema, o.max_length, o.compile)
        stage, max_length = model.stage, model.max_length
    else:
        found = find_model(Path(o.checkpoint), o.ema)
        reads = o.side == PREFILL
        settings = ExpertSettings(
            o.prefill_redundant if reads else o.decode_redundant, o.placement_every,
            "hierarchical" if reads else "global", o.ranks_per_node,
            overlap_rows=o.overlap_rows if o.overlap else 0,
        )  # fmt: skip
        device = resolve_device(o.device)
        cpp = wants_kernels(o.compile, o.precision, device)
        experts = load_experts(found, o.precision, device, None, settings, o.ema, cpp)
        stage, max_length = experts.stage, o.max_length or found.max_length
    if o.side == PREFILL:
        cache = CacheSize(o.prefill_cache_tokens // o.prefill_page_size, o.prefill_page_size)
        limits = Limits(o.prefill_sequences, o.prefill_batch_tokens)
        return PrefillEngine(stage, max_length, cache, limits, o.drafts, experts)
    cache, limits = CacheSize(o.cache_tokens // o.page_size, o.page_size), Limits(o.max_sequences, o.batch_tokens)
    kind = DecodeEngine if o.side == DECODE else Engine
    return kind(stage, max_length, cache, limits, o.drafts, experts)


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
    use_cpu(options.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    engine = make_engine(options)
    store = meeting_store(timedelta(seconds=options.timeout))
    host, port, key = store.get(FRONT).decode().split()
    hello: dict[str, Any] = {"side": options.side, "index": options.index, "pid": os.getpid()}
    channel = Channel(host, int(port), key, hello, options.silence)
    give_signs(options.silence)
    role = make_role(engine, options, store, channel)
    channel.divert = role.at_once
    shared = None
    if engine.experts is not None:
        shared = SharedExperts(engine.experts, store, options.backend, options.timeout)
    else:
        channel.send({"kind": "ready"})
    with torch.inference_mode():
        run(role, channel, shared)


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
