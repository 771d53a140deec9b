"""The training loop: everything that one rank does from process group to final checkpoint.

    prepare (validate, corpus, resume point) → process group → mesh, model, optimizer → steps → last evaluation

What every rank must agree on (steps, data, learning rate, when to evaluate and save) is a pure function of the
configuration and the step, so ranks need not ask each other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dualpipe.schedule import Schedule
from model.balance import Balance
from model.batch import MicroBatch
from model.cpu.allocator import keep_freed_memory
from model.precisions import make_precision
from model.sampling import Sampling
from parallel.build import BuildOptions, Replica, build_replica, with_schedule
from parallel.grads import embedding_holders, mirrors, same_stages
from parallel.mesh import Layout, Mesh
from parallel.saved import CheckpointError, RunState, has_average, list_checkpoints, read_run_state, step_of
from parallel.zero import load_deepspeed
from training import checkpoint
from training.balance import BalanceMonitor, bias_rate
from training.capacity import check_capacity
from training.checkpoint_writer import CheckpointWriter
from training.config import Config, to_dict
from training.corpus import Corpus, prepare_corpus
from training.data import BatchPlan, PackedDataset
from training.diagnose import find_culprit
from training.ema import WeightAverage
from training.guard import Diverged, Guard
from training.initial import find_weights, load_initial
from training.live_sample import sample_live
from training.loggers import CompositeLogger, new_run_id
from training.optimizer import learning_rate, make_update
from training.pace import PaceMeter
from training.placement import order_experts
from training.plan import schedule_for, stage_sizes
from training.profile import StepProfiler
from training.recipe import batch_at, factor_at, value_at
from training.resume import find_resume_point
from training.run_dir import check_writable
from training.run_logging import make_logger
from training.step import StepResult, evaluate, train_step
from training.stop import RunStopped, StopRequest
from training.trace import Trace
from training.validate import nodes_of, resolve_device, validate

SAMPLE_PROMPT = "import "


@dataclass(frozen=True)
class Job:
    """A validated configuration with all that can be known before the process group: nothing in it needs a peer."""

    config: Config
    layout: Layout
    schedule: Schedule
    corpus: Corpus
    device: torch.device
    resume: Path | None  # the checkpoint to go on from
    init_from: Path | None  # whose weights to begin with, if there is nothing to go on from

    @property
    def run_dir(self) -> Path:
        return Path(self.config.runs_dir) / self.config.run

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def batch_plan(self) -> BatchPlan:
        c = self.config
        return BatchPlan(c.data.micro_batch_size, c.schedule.micro_batches, self.layout.dp)

    @property
    def options(self) -> BuildOptions:
        c = self.config
        return BuildOptions(
            seed=c.seed,
            param_dtype=make_precision(c.precision)[1],
            device=self.device,
            layers_per_stage=stage_sizes(c, self.schedule),
            overlap=c.parallel.overlap != "off",
            compile=c.compile == "on",
            dispatch=c.parallel.dispatch,
            balance=Balance(c.balance.sequence_loss, c.balance.aux_loss, c.balance.force),
            timeout=timedelta(seconds=c.launch.timeout_seconds),
        )

    def dataset(self, split: str) -> PackedDataset:
        tokens = self.corpus.tokens("train" if split == "train" else "val")
        return PackedDataset(tokens, self.config.data.seq_len, self.config.seed, self.corpus.tokenizer.eod)


def prepare(config: Config, world: int, trains: bool = True) -> Job:
    """Validate, read or build the corpus, find the checkpoint to resume from. Raises ValueError with one message.

    trains   it keeps results in its run's folder; else that folder is neither looked into nor made
    """
    layout, schedule = validate(config, world)
    corpus = prepare_corpus(
        config.data.path, Path(config.data.cache_dir), config.data.val_fraction, exclude=[Path(config.runs_dir)]
    )
    if corpus.tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is too small for the {corpus.tokenizer.vocab_size} tokens of "
            f"the tokenizer; raise model.vocab_size"
        )
    device = resolve_device(config.launch.device)
    check_capacity(config, layout, schedule, device)
    resume, weights = find_resume_point(config, layout) if trains else None, None
    if trains and resume is None and config.init_from is not None:
        weights = find_weights(config.init_from, config.model)
    job = Job(config, layout, schedule, corpus, device, resume, weights)
    for split in ("train", "val"):
        job.dataset(split)
    if trains:
        check_writable(job.run_dir)
    return job


def join_process_group(job: Job) -> Mesh:
    """Meet the other processes (torchrun's environment variables) and make the groups of the mesh."""
    threads = job.config.launch.threads or (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, threads))
    if job.device.type == "cpu":
        keep_freed_memory()
    timeout = timedelta(seconds=job.config.launch.timeout_seconds)
    if job.layout.world > 1:
        if job.config.optim.zero:
            load_deepspeed(job.device)
        if job.device.type == "cuda":
            torch.cuda.set_device(job.device)
        dist.init_process_group("nccl" if job.device.type == "cuda" else "gloo", timeout=timeout)
    holders = embedding_holders(job.schedule, job.config.model)
    return Mesh.create(job.layout, mirrors(job.schedule), timeout, holders, nodes_of(job.config, job.layout))


class Trainer:
    """One rank's run. `step` is the number of finished steps."""

    def __init__(self, job: Job, mesh: Mesh, stop: StopRequest) -> None:
        self.job, self.mesh, self.stop = job, mesh, stop
        precision, _ = make_precision(job.config.precision, compiled=job.config.compile == "on")
        state = read_run_state(job.resume) if job.resume is not None else None
        expert_loads = state.expert_loads if state is not None else {}
        order = None
        if job.config.parallel.placement == "loads":
            order = order_experts(job.config.model, job.layout.ep, expert_loads)
        options = job.options if order is None else replace(job.options, placement=order.by_layer)
        self.replica = build_replica(job.config.model, job.schedule, mesh, precision, options)
        if job.init_from is not None:
            load_initial(job.init_from, job.config.model, self.replica.stages)
        self.guard = Guard(job.config.guard)
        self.update = make_update(self.replica, job.config.optim, job.config.seed)
        self.train_data, self.val_data = job.dataset("train"), job.dataset("val")
        self.step = self.samples = self.tokens = 0
        self.wandb_id = new_run_id()
        decay = job.config.optim.ema
        self.average = WeightAverage(self.update, decay) if decay else None
        if job.resume is not None:
            expert_loads = self._resume(job.resume)
        self.replicas = {job.config.schedule.micro_batches: self.replica}  # by micro-batches per step
        self.balance = BalanceMonitor(self.replica, job.config.model, job.config.eval_every, expert_loads)
        self.trace = Trace(job.config.trace_every if job.config.trace else 0, mesh, job.run_dir / "trace")
        self.writer = CheckpointWriter(job.checkpoints, mesh, job.config.keep_last, job.config.keep_every)
        self.pace = PaceMeter(mesh, job.config.log_every, same_stages(job.layout, job.schedule))
        self.profiler = StepProfiler(job.config.profile, mesh, job.run_dir / "profile", job.device)
        self.logger, self.wandb = CompositeLogger([]), None
        if mesh.rank == 0:
            self.logger, self.wandb = make_logger(
                job.config, job.run_dir, self.step, self.wandb_id, on_failure=stop.fail
            )
        if order is not None:
            self.logger.text(self.step, "expert placement", str(order))

    def fit(self) -> float:
        """Train to the configured step; returns the final validation loss in nats per token.

        Raises RunStopped, on all ranks after the same step, when one was asked to stop.
        """
        config = self.job.config
        saved = self.step if self.job.resume is not None else None
        val_loss = None
        while self.step < config.steps:
            self._train_one_step()
            if (stop := self.stop.agreed(self.mesh)) is not None:
                if not stop.failed:
                    self._save()
                    self.writer.wait()
                with suppress(CheckpointError):  # that a save failed may be the reason
                    self.writer.wait()
                raise RunStopped(stop)
            val_loss = None
            if self.step % config.eval_every == 0 or self.step == config.steps:
                val_loss = self._validate()
            if self.step % config.save_every == 0:
                saved = self._save()
        if saved != self.step:
            self._save()
        val_loss = self._validate() if val_loss is None else val_loss
        self.writer.wait()
        return val_loss

    def sample(self, count: int) -> str:
        """A text of so many tokens from the weights as they are ("" for none); collective."""
        if not count:
            return ""
        tokenizer, config = self.job.corpus.tokenizer, self.job.config
        sampling = Sampling(temperature=0.7, seed=config.seed)
        tokens = sample_live(self.replica, tokenizer.encode(SAMPLE_PROMPT), count, config.data.seq_len, sampling)
        return SAMPLE_PROMPT + tokenizer.decode(tokens)

    def _look_after_checkpoint(self) -> None:
        """Ranks may notice at different steps that a checkpoint has failed; so they agree on the end."""
        try:
            self.writer.poll()
        except CheckpointError as error:
            self.stop.fail(str(error))

    def close(self) -> None:
        """Let go of everything that must be gone before the process group."""
        self.profiler.close()
        self.writer.close()
        if self.average is not None:
            self.average.close()
        self.update.close()

    def _train_one_step(self) -> None:
        config = self.job.config
        started = time.perf_counter()
        self._look_after_checkpoint()
        clock = self.tokens / config.recipe.token_scale
        plan = self._plan(clock)
        batch = self._on_device(plan.batch_at(self.train_data, self.samples, self.mesh.dp))
        lr = value_at(config.recipe.lr, clock) if config.recipe.lr else None
        lr = learning_rate(config.optim, self.step, config.steps) if lr is None else lr
        loss = replace(config.loss, mtp_weight=config.loss.mtp_weight * factor_at(config.recipe.mtp_weight, clock))
        clip, gamma, replica = config.optim.clip, bias_rate(config.balance, clock), self._replica(plan)
        self.trace.begin(self.step + 1, replica)
        with self.profiler.step(replica, self.update):
            result = train_step(replica, self.update, batch, lr, clip, gamma, loss, self.guard.limit)
        if self.average is not None and not result.skipped:
            self.average.start()
        self.step += 1
        self.samples += plan.global_batch_size
        self.tokens += plan.global_batch_size * config.data.seq_len
        balance = {"balance/bias_rate": gamma, **self.balance.after_step(self.step, result.counts)}
        seconds = time.perf_counter() - started
        traced = self.trace.end(self.step, replica, self.logger)
        self.logger.log(self.step, {**self._metrics(result, lr, plan, seconds), **balance, **traced})
        self._watch_pace(replica.pipeline.busy_seconds)
        if self.guard.note(result.grad_norm, result.skipped):
            self._recover(replica, batch)

    def _watch_pace(self, seconds: float) -> None:
        pace = self.pace.after_step(seconds)
        if pace is not None:
            worst = pace.slowest
            self.logger.log(self.step, {"ranks/slowest": float(worst), "ranks/slowdown": pace.slowdown[worst]})
            for line in pace.news:
                self.logger.text(self.step, "slow rank", line)

    def _recover(self, replica: Replica, batch: Sequence[MicroBatch]) -> None:
        """Too many steps in a row went wrong: go back to the newest checkpoint, or raise Diverged."""
        culprit = find_culprit(replica, batch)
        skipped = f"{self.guard.in_a_row} steps in a row were skipped, the last was step {self.step}: {culprit}"
        self.writer.wait()
        saved = list_checkpoints(self.job.checkpoints)
        if not saved or not self.guard.may_rewind():
            raise Diverged(f"{skipped}. Lower optim.lr, or set guard.rewind=true to go on with other data")
        unread = self.samples
        loads = self._resume(saved[-1])
        self.samples = unread  # what led here is not read again
        self.balance = BalanceMonitor(self.replica, self.job.config.model, self.job.config.eval_every, loads)
        self.logger.rewind(self.step)
        self.logger.text(self.step, "rewind", f"{skipped}. Back to step {self.step}, and on with later data.")

    def _metrics(self, result: StepResult, lr: float, plan: BatchPlan, seconds: float) -> dict[str, float]:
        tokens = plan.global_batch_size * self.job.config.data.seq_len
        return {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": lr,
            "train/tokens": float(self.tokens),
            "train/batch_size": float(plan.global_batch_size),
            "train/tokens_per_second": tokens / seconds,
            "train/skipped": float(result.skipped),
            **{f"seconds/{phase}": value for phase, value in result.seconds.items()},
            "seconds/other": seconds - sum(result.seconds.values()),
            **{f"train/mtp_loss_{k}": value for k, value in enumerate(result.mtp_losses, 1)},
            **({} if result.z_loss is None else {"train/z_loss": result.z_loss}),
        }

    def _plan(self, clock: float) -> BatchPlan:
        """How the coming step's batch is cut: smaller than the full one while the batch grows."""
        full = self.job.batch_plan
        unit = full.micro_batch_size * full.dp_size
        size = batch_at(self.job.config.recipe, clock, full.global_batch_size)
        return replace(full, num_micro_batches=size // unit)

    def _replica(self, plan: BatchPlan) -> Replica:
        """With a pipeline for this many micro-batches."""
        count = plan.num_micro_batches
        if count not in self.replicas:
            self.replicas[count] = with_schedule(
                self.replica, schedule_for(self.job.config, count, self.replica.schedule)
            )
        return self.replicas[count]

    def _validate(self) -> float:
        """Mean loss per target over the fixed validation text; with eval.ema=true of the averaged weights."""
        if self.job.config.eval.ema and self.average is not None:
            with self.average.applied(self.replica.precision.refresh):
                return self._validate_weights()
        return self._validate_weights()

    def _validate_weights(self) -> float:
        per_step = self.job.config.schedule.micro_batches
        plan = self.job.batch_plan
        whole = BatchPlan(plan.micro_batch_size, per_step * self.job.config.eval_batches, plan.dp_size)
        batch = self._on_device(whole.validation_batch(self.val_data, self.mesh.dp))
        results = [evaluate(self.replica, batch[i : i + per_step]) for i in range(0, len(batch), per_step)]
        loss = sum(r.loss * r.num_targets for r in results) / sum(r.num_targets for r in results)
        balance, tables = self.balance.after_validation([r.counts for r in results])
        self.logger.log(self.step, {"val/loss": loss, **balance})
        for name, table in tables.items():
            self.logger.table(self.step, name, table)
        if sample := self.sample(self.job.config.eval.sample_tokens):
            self.logger.text(self.step, "sample", sample)
        return loss

    def _save(self) -> int:
        """Start saving; training goes on while the files are written."""
        state = RunState(
            self.step, self.samples, self.tokens, self.update.updates, to_dict(self.job.config), self.wandb_id,
            self.job.layout.world, self.balance.recorded(), self.guard.recent,
        )  # fmt: skip
        fragments = checkpoint.run_fragments(self.replica.stages, self.update, self.mesh, owned=True)
        averages = self.average.fragments() if self.average is not None else ()
        pause = self.writer.save(state, [*fragments, *averages, checkpoint.random_state(self.mesh.rank)])
        self.logger.log(self.step, {"checkpoint/pause_seconds": pause})
        return self.step

    def _resume(self, newest: Path) -> dict[str, list[int]]:
        """Load the newest sound checkpoint up to this one; returns the router counts that it holds."""
        candidates = [p for p in list_checkpoints(newest.parent) if step_of(p) <= step_of(newest)]
        averages = list(self.average.fragments()) if self.average is not None else []
        _, state = checkpoint.load_newest(candidates, self.replica.stages, self.update, self.mesh, averages)
        self.replica.precision.refresh()
        if self.average is not None and not has_average(state):
            self.average.reset()
        self.step, self.samples, self.tokens = state.step, state.samples, state.tokens
        self.wandb_id = state.wandb_id
        self.guard.restore(state.recent_norms)
        return state.expert_loads

    def _on_device(self, batch: Sequence[MicroBatch]) -> list[MicroBatch]:
        return [mb.to(self.job.device) for mb in batch]
