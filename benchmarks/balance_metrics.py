"""What the balance metrics cost: their share of a training step, piece by piece.

    .venv/bin/python -m benchmarks.balance_metrics [--experts 32] [--rounds 5]

The quickstart's model (with more experts) and batch in one process with one thread. The whole is a step of training
as it is, metrics and loggers included. Each piece is what would not be done without metrics:

    counting     per micro-batch and layer, normalising the scores and all counts, less the bincount of loads that
                 the router bias needs anyway
    gathering    per step, from the counts to the named numbers
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
from pathlib import Path

import torch

from benchmarks.report import Row, publish
from dualpipe.schedules import make_schedule
from model.balance import Balance, count
from model.batch import MicroBatch
from model.config import ModelConfig
from model.precision import make_precision
from parallel.balance import take_counts
from parallel.build import BuildOptions, Replica, build_replica
from parallel.mesh import Layout, Mesh
from training.balance import BalanceMonitor
from training.loggers import CompositeLogger, JsonlLogger, WandbLogger, new_run_id
from training.optimizer import OptimConfig, make_optimizer
from training.step import evaluate, train_step

MICRO_BATCHES, SEQUENCES, LENGTH, EVAL_EVERY = 4, 8, 256, 25
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
    mesh = Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)
    precision, dtype = make_precision("fp32")
    options = BuildOptions(param_dtype=dtype, balance=Balance(sequence_loss=1e-4))
    return build_replica(config, make_schedule("one_f_one_b", 1, MICRO_BATCHES), mesh, precision, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = replace(ModelConfig(), num_experts=options.experts)
    replica = make_replica(config)
    optim = OptimConfig()
    optimizer = make_optimizer(replica.stages, optim)
    batch = random_batch(config)
    monitor = BalanceMonitor(replica, config, EVAL_EVERY, {})
    counts = evaluate(replica, batch).counts
    with tempfile.TemporaryDirectory() as folder:
        run_id = new_run_id()
        logger = CompositeLogger(
            [JsonlLogger(Path(folder) / "m.jsonl"), WandbLogger(Path(folder), run_id, "benchmark")]
        )
        step = 0

        def whole_step() -> None:
            nonlocal step
            step += 1
            result = train_step(replica, optimizer, batch, 1e-3, 1.0, 0.01)
            logger.log(step, {**OTHER_METRICS, **monitor.after_step(step, result.counts)})

        def log(metrics: dict[str, float]) -> None:
            nonlocal step
            step += 1
            logger.log(step, metrics)

        def tables() -> None:
            nonlocal step
            step += 1
            for name, table in monitor.after_validation([counts])[1].items():
                logger.table(step, name, table)

        step_ms = median_ms(whole_step, options.rounds)
        metrics = monitor.after_step(1, counts)
        tokens = SEQUENCES * LENGTH
        scores_TE = torch.rand(tokens, config.num_experts)
        experts_TK = torch.rand(tokens, config.num_experts).topk(config.experts_per_token).indices
        none = torch.zeros(())

        def count_all() -> torch.Tensor:
            share_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
            return count(experts_TK, share_TE, config.num_groups, none)

        all_counts = median_ms(count_all, 200)
        loads = median_ms(lambda: torch.bincount(experts_TK.flatten(), minlength=config.num_experts), 200)
        all_metrics = {**OTHER_METRICS, **metrics}
        pieces = {
            "counting": (all_counts - loads) * config.num_moe_layers * MICRO_BATCHES,
            "gathering": median_ms(lambda: monitor.after_step(1, counts), 200),
            "logging": median_ms(lambda: log(all_metrics), 100) - median_ms(lambda: log(OTHER_METRICS), 100),
            "tables": median_ms(tables, 20) / EVAL_EVERY,
        }
        take_counts(replica.stages, replica.mesh)
        logger.close()
    pieces["sum"] = sum(pieces.values())
    case = f"{config.num_moe_layers} layers of {config.num_experts} experts"
    publish(
        "balance_metrics",
        [Row(f"{case}: {name}", "ms per step", ms, "whole step", step_ms) for name, ms in pieces.items()],
    )


if __name__ == "__main__":
    main()
