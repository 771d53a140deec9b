"""From a configuration to its schedule and its cut: `schedule=auto`, `parallel.split=costs`, and what layers cost."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dualpipe.clock import HostClock
from dualpipe.lanes import Mark
from dualpipe.simulator import simulate
from dualpipe.split import ModelWork, Work, balanced_sizes
from dualpipe.stage import Lane
from model.config import ModelConfig
from tests.test_config import check, compose
from training import measure
from training.plan import choose_schedule, schedule_for, stage_costs, stage_sizes
from training.work import counted, work_of

QUICK = "schedule.effort=2000"

# -- where to cut ------------------------------------------------------------------------------------------------------


def all_sizes(layers: int, stages: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, layers), stages - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, layers))) for cut in cuts]


@pytest.mark.parametrize("mirrored", [False, True])
def test_no_cut_is_more_even(mirrored: bool) -> None:
    rng = random.Random(0)
    for _ in range(60):
        stages = rng.choice((2, 4, 6) if mirrored else (1, 2, 3, 5))
        times = [rng.choice((0.5, 1.0, rng.random())) for _ in range(rng.randint(stages, 10))]
        first, last = rng.random(), 2 * rng.random()

        def judge(sizes: tuple[int, ...], times: list[float] = times, ends: Any = (first, last)) -> tuple[float, float]:
            parts = iter(times)
            loads = [sum(itertools.islice(parts, size)) for size in sizes]
            loads[0], loads[-1] = loads[0] + ends[0], loads[-1] + ends[1]
            sums = max(a + b for a, b in zip(loads, loads[::-1], strict=True)) if mirrored else 0.0
            return round(max(loads), 9), sums

        sizes = balanced_sizes(times, stages, first, last, mirrored)
        assert (sum(sizes), len(sizes), min(sizes) > 0) == (len(times), stages, True)
        assert judge(sizes) == pytest.approx(min(map(judge, all_sizes(len(times), stages))))


def test_the_costs_of_stages_are_those_of_their_layers() -> None:
    dense, moe, head = Work(1, 1, 1), Work(2, 3, 1, 0.5), Work(4, 4, 4)
    costs = ModelWork((dense, moe, moe), Work(0.5, 0, 0.5), head, latency=0.1).stages((2, 1))
    assert (costs.forward, costs.inputs, costs.weights) == ((3.5, 6.0), (4.0, 7.0), (2.5, 5.0))
    assert costs.overlaps == pytest.approx(((4 + 3) / 10, (3 + 12) / 18))
    assert costs.latency == 0.1
    one = ModelWork((dense,), Work(0.5, 0, 0.5), head).stages((1,))
    assert one.forward == (5.5,)
    with pytest.raises(ValueError, match=r"stages of \[2, 2\] layers do not add up to the model's 3"):
        ModelWork((dense, moe, moe)).stages((2, 2))
    with pytest.raises(ValueError, match="3 layers cannot fill 4 stages"):
        ModelWork((dense, moe, moe)).balanced(4, mirrored=True)


# -- configurations ----------------------------------------------------------------------------------------------------

DEEP = "model.num_layers=9 model.mtp_depth=1 model.vocab_size=4096 parallel.pp=4 schedule.micro_batches=8"


def test_auto_is_never_slower_than_dualpipe_at_the_models_costs() -> None:
    config = compose(f"schedule=auto {DEEP} {QUICK}")
    schedule = check(f"schedule=auto {DEEP} {QUICK}", 4)[1]
    assert schedule == choose_schedule(config), "every rank must come to the same"
    named = compose(f"schedule=dualpipe {DEEP}")
    dualpipe = choose_schedule(named)
    ours = simulate(schedule, stage_costs(config, schedule)).makespan
    assert ours <= simulate(dualpipe, stage_costs(named, dualpipe)).makespan


def test_split_by_costs_is_faster_than_equal_layers() -> None:
    def makespan(line: str) -> float:
        config = compose(line)
        schedule = choose_schedule(config)
        return simulate(schedule, stage_costs(config, schedule)).makespan

    for name in ("dualpipe", "one_f_one_b", "zbv", f"auto {QUICK}"):
        line = f"schedule={name} {DEEP}"
        assert makespan(f"{line} parallel.split=costs") <= (1.0 if name == "zbv" else 0.97) * makespan(line), name
    config = compose(f"schedule=dualpipe {DEEP} parallel.split=costs parallel.layers_per_stage=[3,2,2,2]")
    assert stage_sizes(config, choose_schedule(config)) == (3, 2, 2, 2), "a list says more"


def test_a_growing_batch_keeps_the_placement() -> None:
    line = f"schedule=auto {DEEP} {QUICK} recipe.batch_start=32 recipe.batch_increment=16 recipe.batch_tokens=1e5"
    config, schedule = compose(line), check(line, 4)[1]
    smaller = schedule_for(config, 6, schedule)
    assert (smaller.placement, smaller.num_micro_batches) == (schedule.placement, 6)


def test_costs_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    layer = {"forward": 1, "inputs": 2.0, "weights": 0.5}
    file.write_text(json.dumps({"dense": layer, "moe": {**layer, "overlap": 0.75}, "latency": 0.1, "transfer": 0.2}))
    work = work_of(compose(f"schedule.costs={file}"))
    assert work == ModelWork((Work(1, 2, 0.5), *[Work(1, 2, 0.5, 0.75)] * 3), latency=0.1, transfer=0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "must hold an object with dense, moe"),
        ('{"dense": 3}', "dense must have forward, inputs, weights"),
        ('{"dense": {"forward": 1, "inputs": -1, "weights": 1}}', "dense.inputs=-1 must be a number of at least 0"),
        ('{"dense": {"forward": 1, "inputs": 1, "weights": 1, "x": 1}}', "dense must have forward"),
        ('{"dense": {"forward": 1, "inputs": 1}}', "dense.weights=None must be a number"),
        ('{"dense": {"forward": 1, "inputs": 1, "weights": 1}}', "has no 'moe', which the model has"),
        ('{"latency": true}', "latency=True must be a number"),
    ],
)
def test_a_bad_file_of_costs_gives_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        check(f"schedule=auto schedule.costs={file}", 2)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("schedule.costs=nowhere.json parallel.split=costs", "schedule.costs=nowhere.json cannot be read"),
        ("schedule=auto parallel.layers_per_stage=[1,2,1]", "schedule=auto takes PP or 2·PP stages"),
        ("schedule=auto schedule.max_activations=0.5", "max_activations=0.5 leaves no room"),
        ("schedule=auto schedule.effort=0", "schedule.effort=0 must be between 1"),
        ("parallel.split=even", "parallel.split='even' is unknown; choose one of equal, costs"),
        ("schedule=auto model.num_layers=1 model.num_dense_layers=1", "model.num_layers=1 cannot fill 2 stages"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_override(line: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(line, 2)
    assert message in str(caught.value)


# -- what layers cost --------------------------------------------------------------------------------------------------


def test_counting_products() -> None:
    """The published DeepSeek-V3: 37B active parameters, less the embedding, which multiplies nothing."""
    config = ModelConfig(
        vocab_size=129_280, num_layers=61, num_dense_layers=3, hidden_size=7168, dense_ffn_size=18_432, num_heads=128,
        query_rank=1536, key_value_rank=512, head_dim=128, rope_dim=64, value_dim=128, num_experts=256,
        experts_per_token=8, num_shared_experts=1, expert_ffn_size=2048, num_groups=8, groups_per_token=4,
    )  # fmt: skip
    kinds = counted(config, 4096, ep=64)
    active = 3 * kinds["dense"].weights + 58 * kinds["moe"].weights + kinds["head"].weights
    assert active == pytest.approx(36.6e9, rel=0.01)
    assert kinds["moe"].overlap < 1 == kinds["dense"].overlap
    assert counted(config, 4096, ep=1)["moe"].overlap == 1


def test_marks_are_added_up_by_kind_and_part() -> None:
    marks = [
        Mark(Lane.COMPUTE, "embedding(F) of 0.0", 0.0, 1.0),
        Mark(Lane.COMPUTE, "0.mlp(F) of 0.0", 1.0, 3.0),
        Mark(Lane.COMPUTE, "1.experts(W) of 0.0", 3.0, 7.0),
        Mark(Lane.COMM, "1.dispatch(F) of 0.0", 7.0, 15.0),
        Mark(Lane.COMPUTE, "mtp.1.head(I) of 0.0", 15.0, 31.0),
        Mark(Lane.COMPUTE, "loss(F) of 0.0", 31.0, 63.0),
    ]
    each = measure.MICRO_BATCHES
    compute = measure.add_up(marks, Lane.COMPUTE, HostClock(), num_dense=1)
    assert {k: v * each for k, v in compute.items()} == {
        ("embedding", "forward"): 1, ("dense", "forward"): 2, ("moe", "weights"): 4, ("mtp", "inputs"): 16,
        ("head", "forward"): 32,
    }  # fmt: skip
    found = measure.summary(compute, measure.add_up(marks, Lane.COMM, HostClock(), 1))
    assert found["moe"] == {"forward": 8 / each, "inputs": 0, "weights": 4 / each, "overlap": 0.5}


def test_a_measurement_can_be_trained_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "costs.json"
    small = ["model.hidden_size=32", "data.seq_len=16", "data.micro_batch_size=1", "model.mtp_depth=1"]
    data = [f"data.path={Path(__file__).parent.parent / 'docs'}", f"data.cache_dir={tmp_path}", f"runs_dir={tmp_path}"]
    assert measure.main([f"out={file}", *small, *data]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {
        "dense", "moe", "embedding", "head", "mtp", "latency", "transfer",
    }  # fmt: skip
    check(f"schedule=auto {QUICK} schedule.costs={file} {' '.join(small)} parallel.split=costs", 2)
    assert measure.main(small) == 2
    assert capsys.readouterr().err == "error: say where to write the costs: out=costs.json\n"
