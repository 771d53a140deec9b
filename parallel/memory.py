"""Bytes of weights, gradients, masters and moments on a rank: by formula, before anything exists, and as they are.

Per parameter, with N copies and moments of m bytes:

                  weights   gradients   masters   moments      copies that are multiplied with
    ZeRO stage 0  4         4           0         2·m          2 in BF16, 1 in FP8
    ZeRO stage 1  4 or 2    4           4/N       2·m/N        0 in BF16, which the weights are stored in; 1 in FP8

In stage 0 the weights are the FP32 masters. FP64 takes eight bytes for each. Only the weights of linear layers have a
copy; in FP8 the scales come with it, 4 bytes for 128×128 weights. The formula leaves out the padding of buckets: at
most two elements per copy and bucket.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from model.layers import GroupedLinear, Linear
from model.names import expert_parameters
from parallel.buckets import compute_dtypes
from parallel.update import Update


@dataclass(frozen=True)
class Memory:
    """In bytes. cached: what the precision keeps beside the weights to multiply with, made once per step."""

    weights: int
    gradients: int
    masters: int
    moments: int
    cached: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments + self.cached


def predict(stages: Iterable[nn.Module], dense: int, routed: int, zero: int, moment_bytes: int) -> Memory:
    """What a rank will need for these stages, which may be on the meta device.

    dense, routed   how many copies there are of its dense parameters, and of its experts
    """
    weights = gradients = masters = moments = cached = 0.0
    seen: set[nn.Parameter] = set()
    for stage in stages:
        dtypes = compute_dtypes(stage)
        experts = expert_parameters(stage)
        products = {m.weight: m.products for m in stage.modules() if isinstance(m, Linear | GroupedLinear)}
        for name, parameter in stage.named_parameters():
            if parameter in seen:
                continue
            seen.add(parameter)
            count, own = parameter.numel(), parameter.element_size()
            share = (routed if name in experts else dense) if zero else 1
            computed = dtypes[parameter].itemsize
            weights += count * (computed if zero else own)
            gradients += count * torch.promote_types(parameter.dtype, torch.float32).itemsize
            masters += count * 4 / share if zero else 0
            moments += count * 2 * max(moment_bytes, own if own > 4 else 0) / share
            if parameter in products:
                cached += products[parameter].copied(parameter.shape, dtypes[parameter] if zero else parameter.dtype)
    return Memory(*(round(value) for value in (weights, gradients, masters, moments, cached)))


def measure(update: Update) -> Memory:
    """What a rank holds now, by its tensors; the copies are the precision's and not counted."""
    parameters = {p for bucket in update.buckets for p in bucket.parameters}
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    own_masters = [s.master for s in update.shards if s.master.untyped_storage().data_ptr() not in storages]
    return Memory(
        weights=sum(storages.values()),
        gradients=sum(bucket.grads.nbytes for bucket in update.buckets),
        masters=sum(master.nbytes for master in own_masters),
        moments=sum(moment.nbytes for shard in update.shards for moment in shard.moments.values()),
    )
