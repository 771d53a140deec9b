"""The whole configuration as typed dataclasses. Hydra composes it from conf/ and the command line.

A mistyped key or a value of the wrong type fails while composing. What only shows in combination (sizes that do not
divide, too few micro-batches) is checked by `training/validate.py`, before any process group exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from model.config import ModelConfig
from model.loss import LossConfig
from model.precisions import PrecisionConfig
from training.guard import GuardConfig
from training.optimizer import OptimConfig, with_moments
from training.profile import ProfileConfig
from training.recipe import Piece, RecipeConfig


@dataclass
class DataConfig:
    path: str | None = None  # a folder (or file) of your own text; null = Python's standard library
    cache_dir: str = ".cache/corpus"
    seq_len: int = 256
    micro_batch_size: int = 8  # sequences
    val_fraction: float = 0.05


@dataclass
class ParallelConfig:
    pp: int = 2  # pipeline ranks
    ep: int = 1  # ranks that share a layer's routed experts; divides the data-parallel ranks
    order: str = "pp_across_nodes"  # pp_across_nodes | ep_across_nodes: which of the two may leave a node
    layers_per_stage: list[int] = field(default_factory=list)  # [] = as split says
    split: str = "equal"  # equal | costs: cut the model so that ranks have equal work, by schedule.costs
    placement: str = "in_order"  # in_order | loads: experts over the EP ranks by the loads recorded in the checkpoint
    overlap: str = "auto"  # auto: hide communication where the schedule has pairs | on: it must have pairs | off
    dispatch: str = "all_to_all"  # all_to_all | hierarchical | deep_ep: what carries tokens to their experts
    ranks_per_node: int = 0  # for hierarchical; 0 = as torchrun says


@dataclass
class ScheduleConfig:
    name: str = "dualpipe"
    micro_batches: int = 4  # per pipeline and step; more of them = gradient accumulation
    costs: str | None = None  # what layers cost: a file of `python -m training.measure`; null = by counting products
    max_activations: float = 0.0  # for auto: memory per rank in stages × micro-batches; 0 = PP + 1, as DualPipe
    effort: int = 300_000  # for auto: how long to search; a million is about four seconds


@dataclass
class BalanceConfig:
    bias_rate: float = 0.001  # γ of the router bias; 0 = the biases stay as they are
    bias_rate_schedule: list[Piece] = field(default_factory=list)  # factors on bias_rate, by tokens; [] = always 1
    sequence_loss: float = 0.0  # α of the sequence-wise balance loss
    aux_loss: float = 0.0  # coefficient of the classic auxiliary loss, per micro-batch; for comparison
    force: str = "none"  # none | uniform: ignore the scores, give every expert the same load; for benchmarks


@dataclass
class EvalConfig:
    ema: bool = False  # validate with the moving average of the weights (optim.ema) instead of the weights
    sample_tokens: int = 0  # length of a text sample at every evaluation, from the weights that it validates; 0 = none


@dataclass
class LoggerConfig:
    name: str = "wandb"  # wandb | tensorboard | wandb+tensorboard | none; metrics.jsonl is always written
    project: str = "dualpipe"
    mode: str = "offline"  # offline | online
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    artifacts: bool = False  # give W&B the last checkpoint


@dataclass
class LaunchConfig:
    device: str = "auto"  # auto | cpu | cuda
    timeout_seconds: float = 120.0  # after which a silent peer is given up
    processes: int = 0  # of each job of a sweep (--multirun), and of a dry run; 0 = PP · EP
    device_gib: float = 80.0  # memory of the device of each rank, for dry_run
    threads: int = 0  # CPU threads per process; 0 = cores divided by local processes


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    dry_run: bool = False  # build on paper, say what it would need and what is wrong, and end
    run: str = "default"  # name of the run: its folder is runs/<run>
    runs_dir: str = "runs"
    resume: str = "auto"  # auto = go on from the newest checkpoint of this run, if any | never
    compile: str = "off"  # on: C++ kernels on a CPU with AVX-512 (model/cpu); else norms and SwiGLU by torch.compile
    init_from: str | None = None  # weights to begin with: a run, a checkpoint, or a public one; null = from the seed
    seed: int = 0
    steps: int = 200
    eval_every: int = 25
    eval_batches: int = 2  # global batches of validation text
    save_every: int = 100
    keep_last: int = 2  # checkpoints
    keep_every: int = 0  # also keep those whose step is a multiple of this; 0 = none
    log_every: int = 10
    trace: bool = False  # record when each rank does what: bubble as a metric, a picture, a trace for Perfetto
    trace_every: int = 25  # steps between recorded ones
    sample_tokens: int = 160  # length of the text sample at the end; 0 = none


_GROUPS = {
    "model": ModelConfig,
    "data": DataConfig,
    "parallel": ParallelConfig,
    "schedule": ScheduleConfig,
    "precision": PrecisionConfig,
    "optim": OptimConfig,
    "recipe": RecipeConfig,
    "balance": BalanceConfig,
    "logger": LoggerConfig,
    "launch": LaunchConfig,
    "profile": ProfileConfig,
}


def register_schemas() -> None:
    """Make the dataclasses known to Hydra: `schema` for the whole, `<group>/schema` for each group."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, schema in _GROUPS.items():
        store.store(group=group, name="schema", node=schema)


def from_hydra(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses. Raises ValueError if a value is missing."""
    config = OmegaConf.to_object(composed)
    if not isinstance(config, Config):
        raise ValueError(
            f"the configuration is a {type(config).__name__}, not built on the schema of training/config.py"
        )
    config.optim = with_moments(config.optim, config.precision.name)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings, for checkpoints and loggers."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]
