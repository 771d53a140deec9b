"""What the balance metrics cost: their share of a training step, piece by piece.

    .venv/bin/python -m benchmarks.balance_metrics [--experts 32] [--rounds 7]

The quickstart's model (with more experts), batch and layout: DualPipe on two ranks of one thread each. The whole is a
step of training as it is, metrics and loggers included. Each piece is what would not be done without metrics, on the
rank that logs:

    counting     in every router call, normalising the scores and all counts, less the bincount of loads that the
                 router bias needs anyway
    gathering    per step, from the counts of both ranks to the named numbers
    logging      per step, writing them (metrics.jsonl, and W&B offline) less writing the other numbers alone
    tables       per validation, loads, biases and node shares of all layers with their heat maps; a validation comes
                 every 25 steps
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from benchmarks.report import Row, publish
from dualpipe.schedules import make_schedule
from model.balance import Balance, count
from model.batch import MicroBatch
from model.config import ModelConfig
from model.precisions import make_precision
from parallel.build import BuildOptions, Replica, build_replica
from parallel.grads import mirrors
from parallel.mesh import Layout, Mesh
from tests.spawn import run_ranks
from training.balance import BalanceMonitor
from training.loggers import CompositeLogger, JsonlLogger, RunLogger, WandbLogger, new_run_id
from training.optimizer import OptimConfig, make_update
from training.step import evaluate, train_step

RANKS, MICRO_BATCHES, SEQUENCES, LENGTH, EVAL_EVERY = 2, 4, 8, 256, 25
OTHER_METRICS = {f"train/number_{i}": float(i) for i in range(10)}


def median_ms(work: Callable[[], object], rounds: int) -> float:
    """Median time of a call in milliseconds, after one call to warm up."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def random_batch(config: ModelConfig) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(MICRO_BATCHES):
        tokens = torch.randint(0, config.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)
        positions = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
        documents = torch.zeros_like(positions)
        batch.append(MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents, positions))
    return batch


def make_replica(config: ModelConfig) -> Replica:
    schedule = make_schedule("dualpipe", RANKS, MICRO_BATCHES)
    mesh = Mesh.create(Layout(RANKS, RANKS, 1), mirrors(schedule), timedelta(seconds=60))
    precision, dtype = make_precision("fp32")
    return build_replica(config, schedule, mesh, precision, BuildOptions(0, dtype, balance=Balance(1e-4)))


def counting_ms(config: ModelConfig) -> float:
    """Per step and rank: each router sees all micro-batches, half of them here, half on the mirror."""
    tokens = SEQUENCES * LENGTH
    scores_TE = torch.rand(tokens, config.num_experts)
    experts_TK = torch.rand(tokens, config.num_experts).topk(config.experts_per_token).indices

    def count_all() -> torch.Tensor:
        share_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        return count(experts_TK, share_TE, config.num_groups, torch.zeros(()))

    loads = median_ms(lambda: torch.bincount(experts_TK.flatten(), minlength=config.num_experts), 200)
    return (median_ms(count_all, 200) - loads) * config.num_moe_layers * MICRO_BATCHES / RANKS


def measure(rank: int, world: int, config: ModelConfig, rounds: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step and of the pieces, as this rank sees them."""
    replica = make_replica(config)
    update = make_update(replica, OptimConfig())
    batch = random_batch(config)
    monitor = BalanceMonitor(replica, config, EVAL_EVERY, {})
    counts = evaluate(replica, batch).counts
    with tempfile.TemporaryDirectory() as folder:
        loggers: list[RunLogger] = []
        if rank == 0:
            wandb = WandbLogger(Path(folder), new_run_id(), "benchmark")
            loggers = [JsonlLogger(Path(folder) / "metrics.jsonl"), wandb]
        logger, step = CompositeLogger(loggers), 0

        def log(metrics: dict[str, float]) -> None:
            nonlocal step
            step += 1
            logger.log(step, metrics)

        def whole_step() -> None:
            result = train_step(replica, update, batch, 1e-3, 1.0, 0.01)
            log({**OTHER_METRICS, **monitor.after_step(step + 1, result.counts)})

        def tables() -> None:
            for name, table in monitor.after_validation([counts])[1].items():
                logger.table(step, name, table)
            log({})

        step_ms = median_ms(whole_step, rounds)
        metrics = {**OTHER_METRICS, **monitor.after_step(1, counts)}
        pieces = {
            "counting": counting_ms(config),
            "gathering": median_ms(lambda: monitor.after_step(1, counts), 200),
            "logging": median_ms(lambda: log(metrics), 100) - median_ms(lambda: log(OTHER_METRICS), 100),
            "tables": median_ms(tables, 20) / EVAL_EVERY,
        }
        logger.close()
    return step_ms, pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    config = replace(ModelConfig(), num_experts=options.experts)
    step_ms, pieces = run_ranks(RANKS, measure, config, options.rounds)[0]
    pieces["sum"] = sum(pieces.values())
    case = f"{config.num_moe_layers} layers of {config.num_experts} experts"
    publish(
        "balance_metrics",
        [Row(f"{case}: {name}", "ms per step", ms, "whole step", step_ms) for name, ms in pieces.items()],
    )


if __name__ == "__main__":
    main()
