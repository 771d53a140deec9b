"""Configurations: the good ones compose and validate, each bad one ends at once, saying what to change.

Most of it happens in this process: what torchrun would start, without starting it. Some command lines are then run
for real.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dualpipe.schedule import Schedule
from parallel.mesh import Layout
from training.config import Config, from_hydra, register_schemas, to_dict
from training.validate import validate

ROOT = Path(__file__).parent.parent
REFUSED = (HydraException, OmegaConfBaseException)  # a mistyped key or value ends while composing


def compose(command_line: str) -> Config:
    """The configuration of `train.py <command line>`."""
    register_schemas()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return from_hydra(hydra.compose("config", command_line.split()))


def check(command_line: str, world: int) -> tuple[Layout, Schedule]:
    return validate(compose(command_line), world)


# -- good ones ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "command_line"),
    [
        (2, ""),
        (8, "model=tiny parallel.pp=4 parallel.ep=2 data.seq_len=256 schedule=one_f_one_b"),
        (8, "parallel.pp=4 parallel.ep=2 schedule.micro_batches=8"),
        (4, "parallel.ep=2"),
        (4, "parallel.pp=1 parallel.ep=4 schedule=one_f_one_b schedule.micro_batches=1"),
        (1, "parallel.pp=1"),
        (2, "model=small precision=bf16 balance=none logger=none resume=never"),
        (2, "experiment=bf16_one_f_one_b"),
        (1, "experiment=balance balance=aux"),
        (2, "balance=report balance.bias_rate_schedule=[{tokens:1e6,start:1,end:0.5}] balance.force=uniform"),
        (2, "parallel.layers_per_stage=[1,3] parallel.overlap=off"),
        (2, "logger.tags=[a,b] logger.group=g launch.threads=1 launch.device=cpu"),
        (2, f"data.path={ROOT}/docs precision=fp64 steps=1"),
    ],
)
def test_valid_command_lines(world: int, command_line: str) -> None:
    layout, schedule = check(command_line, world)
    config = compose(command_line)
    assert (layout.world, layout.pp, layout.ep) == (world, config.parallel.pp, config.parallel.ep)
    assert schedule.name == config.schedule.name
    assert schedule.num_micro_batches == config.schedule.micro_batches


def test_the_command_line_reaches_the_dataclasses() -> None:
    config = compose("model=small parallel.pp=4 optim.lr=1e-4 data.path=/x run=r2 schedule=one_f_one_b precision=bf16")
    assert config.model.hidden_size == 256
    assert (config.parallel.pp, config.optim.lr, config.data.path, config.run) == (4, 1e-4, "/x", "r2")
    assert (config.schedule.name, config.precision.name) == ("one_f_one_b", "bf16")


def test_every_option_of_every_group_composes() -> None:
    options = [(f.parent.name, f.stem) for f in sorted((ROOT / "conf").glob("*/*.yaml"))]
    assert {"model", "data", "parallel", "schedule", "precision", "optim", "balance", "logger", "launch"} <= {
        group for group, _ in options
    }
    for group, option in options:
        validate(compose(f"{group}={option}"), 2)


def test_a_config_survives_the_way_to_plain_data() -> None:
    config = compose("parallel.layers_per_stage=[1,3] data.path=/x")
    plain = to_dict(config)
    assert plain["parallel"]["layers_per_stage"] == [1, 3]
    assert plain["data"]["path"] == "/x"
    assert to_dict(compose("parallel.layers_per_stage=[1,3] data.path=/x")) == plain


# -- bad ones ----------------------------------------------------------------------------------------------------------

BAD = [  # processes, command line, what the message must name
    (2, "parallel.pp=3", ["parallel.pp=3", "nproc-per-node"]),
    (2, "parallel.pp=10000000000000", ["parallel.pp=10000000000000", "nproc-per-node"]),
    (3, "parallel.pp=3 schedule.micro_batches=6", ["parallel.pp=3", "even"]),
    (2, "schedule.micro_batches=2", ["schedule.micro_batches=2", "at least 4"]),
    (2, "schedule.micro_batches=5", ["schedule.micro_batches=5", "even"]),
    (2, "schedule=one_f_one_b schedule.micro_batches=1", ["schedule.micro_batches=1"]),
    (2, "schedule.micro_batches=10000000000000", ["schedule.micro_batches=10000000000000"]),
    (2, "schedule.micro_batches=0", ["schedule.micro_batches=0"]),
    (3, "", ["parallel.pp=2", "nproc-per-node"]),
    (1, "", ["parallel.pp=2", "nproc-per-node"]),
    (2, "parallel.pp=4 schedule.micro_batches=8", ["parallel.pp=4", "nproc-per-node"]),
    (2, "parallel.ep=2", ["parallel.ep=2"]),
    (6, "parallel.ep=3", ["model.num_experts=16", "parallel.ep=3"]),
    (2, "parallel.pp=0", ["parallel.pp=0"]),
    (2, "parallel.ep=0", ["parallel.ep=0"]),
    (2, "parallel.pp=-2", ["parallel.pp=-2"]),
    (2, "model.num_layers=1", ["model.num_layers=1", "parallel.pp"]),
    (8, "parallel.pp=8 schedule.micro_batches=16", ["model.num_layers=4", "parallel.pp"]),
    (2, "parallel.layers_per_stage=[4]", ["parallel.layers_per_stage=[4]"]),
    (2, "parallel.layers_per_stage=[1,2]", ["parallel.layers_per_stage=[1, 2]", "model.num_layers=4"]),
    (2, "parallel.layers_per_stage=[0,4]", ["parallel.layers_per_stage=[0, 4]"]),
    (2, "parallel.layers_per_stage=[-1,5]", ["parallel.layers_per_stage=[-1, 5]"]),
    (2, "parallel.placement=random", ["parallel.placement='random'", "loads"]),
    (2, "parallel.overlap=maybe", ["parallel.overlap='maybe'", "auto"]),
    (2, "schedule=one_f_one_b parallel.overlap=on", ["no pairs", "parallel.overlap=auto"]),
    (2, "parallel.dispatch=pigeon", ["parallel.dispatch='pigeon'", "all_to_all, hierarchical, deep_ep"]),
    (2, "parallel.dispatch=deep_ep", ["parallel.dispatch=deep_ep", "GPU", "hierarchical"]),
    (8, "parallel.ep=4 parallel.dispatch=hierarchical parallel.ranks_per_node=3", ["parallel.ranks_per_node=3"]),
    (2, "schedule.name=foo", ["schedule.name='foo'", "dualpipe"]),
    (2, "precision.name=fp3", ["precision", "fp3"]),
    (2, "logger.name=mlflow", ["logger.name='mlflow'"]),
    (2, "logger.mode=sometimes", ["logger.mode='sometimes'"]),
    (2, "resume=maybe", ["resume='maybe'", "auto"]),
    (2, "run=a/b", ["run='a/b'"]),
    (2, "run=..", ["run='..'"]),
    (2, "launch.device=tpu", ["launch.device='tpu'"]),
    (2, "launch.timeout_seconds=0", ["launch.timeout_seconds=0"]),
    (2, "launch.timeout_seconds=nan", ["launch.timeout_seconds=nan"]),
    (2, "launch.threads=-1", ["launch.threads=-1"]),
    (2, "data.path=/no/such/folder", ["data.path=/no/such/folder"]),
    (2, "data.seq_len=1", ["data.seq_len=1"]),
    (2, "data.micro_batch_size=0", ["data.micro_batch_size=0"]),
    (2, "data.val_fraction=0", ["data.val_fraction=0"]),
    (2, "data.val_fraction=1.0", ["data.val_fraction=1.0"]),
    (2, "steps=0", ["steps=0"]),
    (2, "save_every=0", ["save_every=0"]),
    (2, "eval_every=-3", ["eval_every=-3"]),
    (2, "keep_last=0", ["keep_last=0"]),
    (2, "sample_tokens=-1", ["sample_tokens=-1"]),
    (2, "eval.sample_tokens=-1", ["eval.sample_tokens=-1"]),
    (2, "seed=-1", ["seed=-1"]),
    (2, "balance.bias_rate=-0.1", ["balance.bias_rate=-0.1"]),
    (2, "balance.bias_rate=nan", ["balance.bias_rate=nan"]),
    (2, "balance.sequence_loss=-1", ["balance.sequence_loss=-1"]),
    (2, "balance.aux_loss=inf", ["balance.aux_loss=inf"]),
    (2, "balance.force=even", ["balance.force='even'", "uniform"]),
    (2, "balance.bias_rate_schedule=[{tokens:-1}]", ["balance.bias_rate_schedule[0].tokens=-1"]),
    (2, "balance.bias_rate_schedule=[{start:1},{start:0}]", ["balance.bias_rate_schedule[0].tokens"]),
    (2, "guard.max_skipped=0", ["guard.max_skipped=0"]),
    (2, "guard.spike=0.5", ["guard.spike=0.5"]),
    (2, "optim.lr=0", ["optim.lr=0"]),
    (2, "optim.lr=nan", ["optim.lr=nan"]),
    (2, "optim.eps=0", ["optim.eps=0"]),
    (2, "precision=fp64 optim.moments=bf16", ["optim.moments=fp32", "precision=fp64"]),
    (2, "optim.lr_final=1", ["optim.lr_final=1"]),
    (2, "optim.beta2=1", ["optim.beta2=1"]),
    (2, "optim.clip=-1", ["optim.clip=-1"]),
    (2, "optim.constant_fraction=2", ["optim.constant_fraction=2"]),
    (2, "model.num_experts=15", ["model.num_experts=15", "model.num_groups=4"]),
    (2, "model.groups_per_token=5", ["model.groups_per_token=5"]),
    (2, "model.experts_per_token=9", ["model.experts_per_token=9", "model.groups_per_token"]),
    (2, "model.rope_dim=3", ["model.rope_dim=3", "even"]),
    (2, "model.num_dense_layers=5", ["model.num_dense_layers=5"]),
    (2, "model.hidden_size=0", ["model.hidden_size=0"]),
    (2, "model.num_layers=10000000000000", ["model.num_layers=10000000000000"]),
    (2, "eval_batches=10000000000000", ["eval_batches=10000000000000"]),
    (2, "model.init_std=-1", ["model.init_std=-1"]),
    (2, "model.norm_eps=nan", ["model.norm_eps=nan"]),
    (2, "model.rope_base=0", ["model.rope_base=0"]),
    (2, "model.route_scale=inf", ["model.route_scale=inf"]),
]


@pytest.mark.parametrize(("world", "command_line", "named"), BAD, ids=lambda v: str(v) if isinstance(v, str) else "")
def test_invalid_command_lines(world: int, command_line: str, named: list[str]) -> None:
    config = compose(command_line)
    with pytest.raises(ValueError) as caught:
        validate(config, world)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    ("command_line", "named"),
    [
        ("nokey=1", "nokey"),
        ("model.hidden=64", "hidden"),
        ("steps=many", "steps"),
        ("optim.lr=[1]", "lr"),
        ("schedule=foo", "schedule/foo"),
        ("model=huge", "model/huge"),
        ("parallel.layers_per_stage=[a]", "layers_per_stage"),
        ("steps", "steps"),
    ],
)
def test_mistyped_keys_and_values_do_not_compose(command_line: str, named: str) -> None:
    with pytest.raises(REFUSED) as caught:
        compose(command_line)
    assert named in str(caught.value)


VALUES = st.one_of(
    st.integers(-2, 9).map(str),
    st.integers(0, 12).map(lambda n: str(2**n)),
    st.sampled_from(["10000000000000000000000", "1.5", "-0.1", "1e-4", "nan", "inf", "null", "true", "x", "''", "[]"]),
    st.lists(st.integers(-1, 4), max_size=4).map(lambda v: str(v).replace(" ", "")),
    st.sampled_from(["dualpipe", "one_f_one_b", "zb1p", "zbv", "dualpipev", "interleaved_1f1b", "gpipe", "bf16"]),
)


def leaves(value: object, prefix: str = "") -> list[str]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{prefix}{key}.")]
    return [prefix[:-1]]


KEYS = [*leaves(to_dict(Config())), "nokey", "model.nokey"]


@given(
    st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=4, unique_by=lambda change: change[0]),
    st.integers(1, 9),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_config_is_accepted_or_refused_with_a_message(changes: list[tuple[str, str]], world: int) -> None:
    """Without Hydra's search for files, so that there is time for many."""
    try:
        typed = OmegaConf.merge(Config, OmegaConf.from_dotlist([f"{key}={value}" for key, value in changes]))
        config = from_hydra(cast(DictConfig, typed))
    except OmegaConfBaseException as error:
        assert str(error)
        return
    try:
        layout, schedule = validate(config, world)
    except ValueError as error:
        assert any(f"{key}=" in str(error) for key in KEYS), error
    else:
        assert layout.pp * layout.dp == world
        assert schedule.num_ranks == layout.pp
        assert schedule.num_micro_batches == config.schedule.micro_batches


# -- real command lines ------------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


def run(command: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit code, output, errors. The processes may write nowhere but in `folder`."""
    places = [] if "--cfg" in command else [f"runs_dir={folder}/runs", f"data.cache_dir={folder}/cache"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*command, *places],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,  # far more than it takes: a process group would be waited for in vain for as long
    )
    return done.returncode, done.stdout, done.stderr


def own_words(errors: str) -> str:
    """What our processes wrote, without the log lines and the summary of torchrun."""
    lines = errors.splitlines()
    cut = next((i for i, line in enumerate(lines) if line.startswith("Traceback")), len(lines))
    return "\n".join(line for line in lines[:cut] if "torch/distributed" not in line and "*****" not in line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.pp=3", "error: 2 processes cannot be divided into pipelines of parallel.pp=3"),
        ("parallel.ep=2", "error: parallel.ep=2 does not divide"),
        ("data.path=/no/such/folder", "error: data.path=/no/such/folder does not exist"),
        ("schedule.micro_batches=2", "error: DualPipe on 2 ranks needs"),
        ("nokey=1", "error: Could not override 'nokey'"),
        ("steps=many", "error: Error merging override steps=many"),
    ],
)
def test_a_bad_override_ends_torchrun_with_one_message(override: str, message: str, tmp_path: Path) -> None:
    code, _, errors = run([*TORCHRUN, "train.py", override], tmp_path)
    words = own_words(errors)
    assert code != 0
    assert words.startswith(message), errors
    assert words.count(message) == 1
    assert "Traceback" not in words
    if "override" not in message:  # Hydra's own words take several lines
        assert len(words.splitlines()) == 1, words
    assert not list(tmp_path.iterdir()), "a refused configuration must leave nothing behind"


@pytest.mark.slow
def test_without_torchrun_the_message_says_how_to_start(tmp_path: Path) -> None:
    code, _, errors = run([sys.executable, "train.py"], tmp_path)
    assert code == 2
    assert errors.startswith("error: 1 processes cannot be divided into pipelines of parallel.pp=2")
    assert "torchrun --nproc-per-node" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.slow
def test_cfg_job_prints_the_composed_configuration(tmp_path: Path) -> None:
    code, output, _ = run([sys.executable, "train.py", "--cfg", "job", "model=small", "steps=7"], tmp_path)
    assert code == 0
    assert "hidden_size: 256" in output
    assert "steps: 7" in output.splitlines()
