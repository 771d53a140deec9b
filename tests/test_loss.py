"""The fused loss equals plain cross entropy, in one piece and in chunks, with the z-loss and with ignored targets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model.loss
from dualpipe.wgrad import WeightGradQueue
from model.batch import IGNORE
from model.loss import head_loss
from model.precisions import make_precision
from model.protocols import AtOnce


def setup(
    precision: str, queue: WeightGradQueue
) -> tuple[Tensor, nn.Parameter, Tensor, Callable[[Tensor, bool], Tensor]]:
    seam, dtype = make_precision(precision)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator, dtype=torch.float64).to(seam.dtype).requires_grad_()
    weight = nn.Parameter(torch.randn(37, 16, generator=generator, dtype=torch.float64).to(dtype))
    targets = torch.randint(0, 37, (300,), generator=generator)
    targets[::7] = IGNORE

    def head(h: Tensor, may_defer: bool) -> Tensor:
        return seam.of("head").linear(h, weight, queue if may_defer else AtOnce())

    return hidden, weight, targets, head


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.t()
    z = logits.logsumexp(-1).square()[targets != IGNORE].sum()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / 200, 0.01 * z


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-13), ("fp32", 1e-5), ("bf16", 2e-2)])
def test_it_equals_plain_cross_entropy(
    precision: str, tolerance: float, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(model.loss, "MAX_LOGITS", 37 * 70)
    queue = WeightGradQueue()
    hidden, weight, targets, head = setup(precision, queue)
    loss, z_loss = head_loss(hidden, head, 37, targets, 1 / 200, 0.01)
    with queue.record("head"):
        (loss * 2 + z_loss * 3).backward()
    assert (weight.grad is None) == (not chunked)  # in one piece the weight gradient waits for its turn
    queue.run("head")
    their_hidden = hidden.detach().double().requires_grad_()
    their_weight = weight.detach().double().requires_grad_()
    theirs = plain(their_hidden, their_weight, targets)
    (theirs[0] * 2 + theirs[1] * 3).backward()
    assert weight.grad is not None
    for ours, wanted in (
        (loss, theirs[0]), (z_loss, theirs[1]), (hidden.grad, their_hidden.grad), (weight.grad, their_weight.grad)
    ):  # fmt: skip
        assert ours is not None
        assert wanted is not None
        assert float((ours.double() - wanted).detach().norm() / wanted.detach().norm()) <= tolerance


def test_logits_never_live_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    monkeypatch.setattr(model.loss, "MAX_LOGITS", 37 * 70)
    hidden, _, targets, head = setup("fp32", WeightGradQueue())

    def watched(h: Tensor, may_defer: bool) -> Tensor:
        nonlocal largest
        logits = head(h, may_defer)
        largest = max(largest, logits.numel())
        return logits

    loss, _ = head_loss(hidden, watched, 37, targets, 1.0)
    loss.backward()
    assert largest <= 37 * 70
