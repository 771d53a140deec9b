"""One rank of benchmarks/overlap.py, inside its network namespace: runs one job and prints its result as JSON."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.emulated import EmulatedModule, EmulatedStage, Shape
from benchmarks.slow_network import INTERFACE
from dualpipe.clock import HostClock
from dualpipe.lanes import HostLanes, RecordingLanes
from dualpipe.runtime import Runtime
from dualpipe.schedule import Pair, parse_step
from dualpipe.schedules import make_schedule
from dualpipe.timeline import COMPUTE
from dualpipe.wgrad import WeightGradQueue
from model.batch import MicroBatch
from model.config import ModelConfig
from model.precision import CastPrecision
from model.router import choose_experts
from parallel.build import BuildOptions, build_replica
from parallel.dispatch import RoutedDispatcher
from parallel.exchange import all_to_all
from parallel.grads import mirrors
from parallel.mesh import Layout, Mesh
from training.optimizer import OptimConfig, make_update
from training.step import train_step

TIMEOUT = timedelta(seconds=120)
PP, EP = 2, 2
PAYLOAD = 2_000_000  # bytes each way, of the part `exchange`
EXPERTS = 16  # of the part `bytes`
# The model of the training step: two MoE layers per stage.
REAL = ModelConfig(
    num_layers=4, num_dense_layers=0, hidden_size=256, num_experts=8, experts_per_token=4, expert_ffn_size=192,
    num_groups=1, groups_per_token=1,
)  # fmt: skip


def emulated(schedule_name: str, micro_batches: int, shape: Shape, overlap: bool) -> tuple[Runtime, Mesh, list[Any]]:
    """A runtime of emulated stages on PP 2 × EP 2, and its micro-batches."""
    schedule = make_schedule(schedule_name, PP, micro_batches)
    mesh = Mesh.create(Layout(PP * EP, PP, EP), mirrors(schedule), TIMEOUT)
    dispatcher = RoutedDispatcher(mesh.expert, shape.experts // EP)
    queue, last = WeightGradQueue(), schedule.num_stages - 1
    stages = {s: EmulatedStage(shape, dispatcher, queue, s == 0, s == last) for s in schedule.stages_of(mesh.pp)}
    runtime = Runtime(stages, schedule, mesh.pp, mesh.links, queue, overlap, fill=False, timeout=TIMEOUT)
    return runtime, mesh, [torch.zeros(shape.tokens, shape.hidden) for _ in range(micro_batches)]


def timed(run: Callable[[], Any], repeats: int) -> float:
    """The median time of a run in which all ranks start together, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        run()
        dist.barrier()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def pair_times(runtime: Runtime, batch: list[Any], repeats: int) -> list[float]:
    """From the end of a pair to the end of the next, waits included, over the steady state of some steps."""
    runtime.record = True
    found = []
    for step in range(repeats + 1):
        dist.barrier()
        runtime.step(batch)
        spans = [s for s in runtime.spans if s.lane == COMPUTE]
        for before, span in pairwise(spans):
            if step and all(isinstance(parse_step(s.label), Pair) for s in (before, span)):
                found.append(span.end - before.end)
    return found


def job_pair(unit: float, micro_batches: int, repeats: int) -> dict[str, Any]:
    """Pair time with overlap off and on, of communication alone, and the bytes that a pair sends."""
    results: dict[str, Any] = {}
    cases = {"off": (False, unit), "on": (True, unit), "communication": (True, 0.0)}
    for name, (overlap, seconds) in cases.items():
        runtime, _, batch = emulated("dualpipe", micro_batches, Shape(unit=seconds), overlap)
        results[name] = pair_times(runtime, batch, repeats)
    return results


def job_peer(unit: float, micro_batches: int, repeats: int) -> dict[str, Any]:
    """A whole step under DualPipeV: torch's ScheduleDualPipeV and our runtime, overlap off and on; same stages."""
    shape = Shape(unit=unit, layers=2)
    results: dict[str, Any] = {}
    for name in ("off", "on"):
        runtime, mesh, batch = emulated("dualpipev", micro_batches, shape, name == "on")
        results[name] = timed(partial(runtime.step, batch), repeats)
    results["torch"] = timed(torch_dualpipev(mesh, shape, micro_batches), repeats)
    return results


def torch_dualpipev(mesh: Mesh, shape: Shape, micro_batches: int) -> Callable[[], Any]:
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import ScheduleDualPipeV

    groups = [dist.new_group(ranks, timeout=TIMEOUT) for ranks in mesh.layout.pipelines()]
    dispatcher = RoutedDispatcher(mesh.expert, shape.experts // EP)
    example = torch.zeros(shape.tokens, shape.hidden)
    device, group = torch.device("cpu"), groups[mesh.dp]
    stages = [
        PipelineStage(
            EmulatedModule(shape, dispatcher), index, 2 * PP, device,
            input_args=(example.clone().requires_grad_(index > 0),),
            output_args=example.clone().requires_grad_(), group=group,
        )
        for index in (mesh.pp, 2 * PP - 1 - mesh.pp)
    ]  # fmt: skip
    schedule = ScheduleDualPipeV(stages, micro_batches, loss_fn=lambda output, _: output.sum(), scale_grads=False)
    whole = torch.zeros(micro_batches * shape.tokens, shape.hidden)

    def step() -> None:
        if mesh.pp == 0:
            schedule.step(whole, target=whole)  # rank 0 holds the first and the last stage
        else:
            schedule.step()

    return step


def job_step(micro_batches: int, repeats: int) -> dict[str, Any]:
    """A whole training step with real compute, overlap off and on: seconds, and bytes sent by this rank's node."""
    schedule = make_schedule("dualpipe", PP, micro_batches)
    mesh = Mesh.create(Layout(PP * EP, PP, EP), mirrors(schedule), TIMEOUT)
    batch = [real_batch(mesh.dp * micro_batches + m) for m in range(micro_batches)]
    results: dict[str, Any] = {}
    for name in ("off", "on"):
        options = BuildOptions(overlap=name == "on", timeout=TIMEOUT)
        replica = build_replica(REAL, schedule, mesh, CastPrecision(torch.float32), options)
        update = make_update(replica, OptimConfig())
        step = partial(train_step, replica, update, batch, 1e-4, 1.0, 0.001)
        before = link_bytes()
        results[name] = timed(step, repeats)
        results[f"{name} bytes"] = (link_bytes() - before) / (repeats + 1)
    return results


def job_trace(micro_batches: int) -> dict[str, Any]:
    """One recorded step of the real model with overlap: [lane, piece, start, end] in seconds."""
    schedule = make_schedule("dualpipe", PP, micro_batches)
    mesh = Mesh.create(Layout(PP * EP, PP, EP), mirrors(schedule), TIMEOUT)
    replica = build_replica(REAL, schedule, mesh, CastPrecision(torch.float32), BuildOptions(timeout=TIMEOUT))
    lanes = RecordingLanes(HostLanes(), HostClock())
    runtime = Runtime(
        replica.stages, schedule, mesh.pp, mesh.links, replica.queue, fill=False, timeout=TIMEOUT, lanes=lanes
    )
    batch = [replace(real_batch(mesh.dp * micro_batches + m), loss_scale=1e-4) for m in range(micro_batches)]
    origin = 0.0
    for _ in range(2):  # the first warms up
        lanes.marks.clear()
        dist.barrier()
        origin = time.perf_counter()
        runtime.step(batch)
    return {"spans": [(m.lane.value, m.name, m.start - origin, m.end - origin) for m in lanes.marks]}


def real_batch(seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, REAL.vocab_size, (8, 129), generator=generator)
    positions = torch.arange(128).expand(8, 128)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(positions), positions)


def link_bytes() -> int:
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def job_bytes(nodes: int, repeats: int) -> dict[str, Any]:
    """Dispatch and combine, forward and backward, over `nodes` × 2 ranks: seconds and bytes that left this node."""
    world = dist.get_world_size()
    place = Layout(world, 1, world)
    results: dict[str, Any] = {}
    for name, per_node in (("all_to_all", None), ("hierarchical", world // nodes)):
        mesh = Mesh.create(place, [[0]], TIMEOUT, ranks_per_node=per_node)
        dispatcher = RoutedDispatcher(mesh.expert, EXPERTS // world)
        experts_TK = node_limited(mesh.rank, nodes)
        exchange = partial(round_trip, dispatcher, experts_TK)
        before = link_bytes()
        results[name] = timed(exchange, repeats)
        dist.barrier()
        results[f"{name} bytes"] = (link_bytes() - before) / (repeats + 1)
        owners = experts_TK // (EXPERTS // nodes)
        remote = torch.arange(nodes) != mesh.rank // (world // nodes)
        hit = torch.zeros(len(experts_TK), nodes, dtype=torch.bool).scatter_(1, owners, True)
        results["remote nodes per token"] = float((hit & remote).sum() / len(experts_TK))
        ranks = experts_TK // (EXPERTS // world)
        away = torch.zeros(len(experts_TK), world, dtype=torch.bool).scatter_(1, ranks, True)
        outside = torch.arange(world) // (world // nodes) != mesh.rank // (world // nodes)
        results["remote ranks per token"] = float((away & outside).sum() / len(experts_TK))
    return results


def round_trip(dispatcher: RoutedDispatcher, experts_TK: torch.Tensor) -> None:
    """Dispatch and combine, then their backwards, of tokens of 512 channels."""
    x_TD, gates_TK = torch.ones(len(experts_TK), 512), torch.ones(experts_TK.shape)
    one = dispatcher.open()
    (table,) = one.counts.start(experts_TK).wait()
    rows, gates, _ = one.dispatch.start(x_TD, gates_TK, experts_TK, table).wait()
    one.combine.start(rows).wait()
    one.combine.start_backward(x_TD).wait()  # type: ignore[misc]
    one.dispatch.start_backward(rows, gates, None).wait()  # type: ignore[misc]


def node_limited(seed: int, nodes: int) -> torch.Tensor:
    """1,024 tokens choose 4 of 16 experts on at most one of the nodes: the router's own rule, on random scores."""
    generator = torch.Generator().manual_seed(seed)
    return choose_experts(torch.rand(1024, EXPERTS, generator=generator), nodes, 1, 4)


def job_exchange(repeats: int) -> dict[str, Any]:
    """One all-to-all between two ranks: gloo's own and `parallel/exchange.py`; and a small one beside ours."""
    world = dist.get_world_size()
    groups = [dist.new_group(list(range(world)), timeout=TIMEOUT) for _ in range(2)]
    block, out = (torch.ones(world, PAYLOAD, dtype=torch.uint8) for _ in range(2))
    small, answer = torch.ones(world, 8), torch.ones(world, 8)
    ones = [1] * world

    def beside(group: dist.ProcessGroup) -> float:
        dist.barrier()
        tokens = all_to_all(out, block, ones, ones, groups[0])
        time.sleep(0.003)
        start = time.perf_counter()
        all_to_all(answer, small, ones, ones, group).wait()
        took = time.perf_counter() - start
        tokens.wait()
        return took

    return {
        "gloo": timed(lambda: dist.all_to_all_single(out, block, ones, ones, group=groups[0]), repeats),
        "ours": timed(lambda: all_to_all(out, block, ones, ones, groups[0]).wait(), repeats),
        "small, same group": [beside(groups[0]) for _ in range(repeats)],
        "small, own group": [beside(groups[1]) for _ in range(repeats)],
    }


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "pair": job_pair,
    "peer": job_peer,
    "step": job_step,
    "trace": job_trace,
    "bytes": job_bytes,
    "exchange": job_exchange,
}


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.FileStore(os.environ["STORE"], world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(JOBS[name](**arguments)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
