"""Samples from the weights in training, under several layouts, against one process that holds the whole model."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from dualpipe.schedules import make_schedule
from model.decode import Decoder
from model.generate import generate, whole_model
from model.precisions import make_precision
from model.sampling import Sampling
from parallel.build import BuildOptions, build_replica
from parallel.grads import embedding_holders, mirrors
from parallel.mesh import Layout, Mesh
from parallel.whole import empty_model
from tests.spawn import run_ranks
from tests.test_decode import CONFIG
from training.live_sample import holders, sample_live

PROMPT, COUNT, WINDOW = [5, 17, 40], 24, 20
SAMPLING = Sampling(temperature=0.9, seed=2)


def sample(rank: int, world: int, layouts: list[tuple[str, int, int]]) -> list[list[int]]:
    results = []
    for name, pp, ep in layouts:
        layout, schedule = Layout(world, pp, ep), make_schedule(name, pp, 2 * pp)
        mesh = Mesh.create(layout, mirrors(schedule), timedelta(seconds=60), embedding_holders(schedule, CONFIG))
        seam, dtype = make_precision("fp64")
        replica = build_replica(CONFIG, schedule, mesh, seam, BuildOptions(seed=3, param_dtype=dtype))
        results.append(list(sample_live(replica, PROMPT, COUNT, WINDOW, SAMPLING)))
    return results


@pytest.mark.slow
def test_any_layout_samples_what_one_process_does() -> None:
    model = empty_model(CONFIG, "fp64", seed=3)
    wanted = list(generate(whole_model(Decoder(model, WINDOW)), PROMPT, COUNT, WINDOW, SAMPLING))
    layouts = [("dualpipe", 2, 2), ("one_f_one_b", 2, 1), ("one_f_one_b", 1, 4)]
    for of_rank in run_ranks(4, sample, layouts):
        assert of_rank == [wanted] * 3


def test_a_holder_keeps_as_many_stages_in_a_row_as_it_can() -> None:
    assert holders(make_schedule("dualpipe", 2, 4)) == [0, 0]
    assert holders(make_schedule("dualpipe", 4, 8)) == [0, 1, 1, 0]
    assert holders(make_schedule("one_f_one_b", 3, 4)) == [0, 1, 2]


def replica_with_one_process() -> Any:
    seam, dtype = make_precision("fp64")
    mesh = Mesh(Layout(1, 1, 1), 0, None, None, None, None, None)
    options = BuildOptions(seed=3, param_dtype=dtype)
    return build_replica(CONFIG, make_schedule("one_f_one_b", 1, 1), mesh, seam, options)


def test_it_reads_the_weights_where_they_are() -> None:
    """A change of a weight in place shows at once, and nothing of the model was copied."""
    replica = replica_with_one_process()
    before = list(sample_live(replica, PROMPT, COUNT, WINDOW, SAMPLING))
    replica.stages[0].head.weight.data.neg_()
    assert list(sample_live(replica, PROMPT, COUNT, WINDOW, SAMPLING)) != before
    decoder = Decoder(replica.stages[0], WINDOW)
    storages = {p.untyped_storage().data_ptr() for p in replica.stages[0].parameters()}
    assert all(t.untyped_storage().data_ptr() in storages for pair in decoder.absorbed.values() for t in pair)
