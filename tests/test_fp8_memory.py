"""Copies of weights that are multiplied with: bytes by the formula and as they are, by precision and ZeRO stage."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.fp8.precision import Fp8Precision
from model.fp8.reference import ReferenceBackend
from model.fp8.transformer_engine import TransformerEngineOnPaper
from model.precision import CastPrecision, Precision
from parallel.memory import predict
from parallel.zero import load_deepspeed
from tests.spawn import run_ranks
from tests.test_fp8_training import MICRO_BATCHES, OPTIM, build, join
from tests.test_serial_equality import make_batch
from training.optimizer import make_update

Bytes = tuple[int, int]


def check_copies(rank: int, world: int) -> dict[tuple[str, int], Bytes]:
    """By precision and ZeRO stage: predicted, and what goes when the precision is told to forget its copies."""
    load_deepspeed(torch.device("cpu"))
    found = {}
    for precision in ("fp32", "bf16", "fp8"):
        for zero in (0, 1):
            mesh = join(world, "dualpipe", 2, 2)
            replica = build(mesh, "dualpipe", 2, precision)
            update = make_update(replica, replace(OPTIM, zero=zero))
            predicted = predict(replica.stages.values(), 4, 2, zero, 2).cached
            update.zero_gradients()
            replica.pipeline.step(make_batch(0, MICRO_BATCHES * 2)[mesh.dp :: 2], update.stage_done)
            update.finish_reduction()
            before = live_bytes()
            replica.precision.refresh()
            found[precision, zero] = predicted, before - live_bytes()
            update.close()
    return found


def live_bytes() -> int:
    """Of all tensors of this process, every storage once."""
    gc.collect()
    storages = [item.untyped_storage() for item in gc.get_objects() if isinstance(item, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_copies_take_the_bytes_of_the_formula() -> None:
    for found in run_ranks(4, check_copies):
        for (precision, zero), (predicted, measured) in found.items():
            assert measured == predicted, (precision, zero)
            assert (predicted == 0) == (precision == "fp32" or (precision, zero) == ("bf16", 1)), (precision, zero)
        assert found["fp8", 0][0] - found["fp8", 1][0] > 0, "the head's BF16 copy is stored under ZeRO-1"


@pytest.mark.parametrize(
    ("precision", "stored", "each"),
    [
        (CastPrecision(torch.bfloat16), torch.float32, 2 * 256 * 384),
        (CastPrecision(torch.bfloat16), torch.bfloat16, 0),
        (Fp8Precision(ReferenceBackend()), torch.bfloat16, 256 * 384 + 4 * 2 * 3),
        (TransformerEngineOnPaper(), torch.bfloat16, 4 * 256 * 384 + 4 * (2 * 4 + 3 * 4)),
    ],
)
def test_copies_of_one_weight_and_of_a_stack(precision: Precision, stored: torch.dtype, each: int) -> None:
    products = precision.of("experts_down")
    assert products.copied(torch.Size((256, 384)), stored) == each
    assert products.copied(torch.Size((5, 256, 384)), stored) == 5 * each
