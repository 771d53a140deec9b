"""ZeRO stage 1 through DeepSpeed: every rank updates its share of each bucket, and the shares are gathered.

DeepSpeed's ZeRO-1 optimizer flattens the weights of a bucket, keeps FP32 masters and the optimizer's state for this
rank's share, writes updated masters back in the weights' own type and gathers them. It is used without DeepSpeed's
engine: gradients, their reduction and their norm are ours, since weight gradients run when the pipeline's schedule
says so and never in an autograd hook.

What is sharded over whom. The copies of a stage's dense parameters are its data-parallel ranks × the two mirrors of
DualPipe; of routed experts, those of them with the same experts. So the mirror costs no optimizer memory. A bucket
with one copy is its own share.

Memory per parameter and rank with N copies: weights 4 bytes (2 where the model computes in BF16), gradients 4, during
the step 4/N for the reduced share, and 12/N for masters and two FP32 moments (8/N with BF16 moments).

DeepSpeed is an optional extra. It is imported where it is used, must be imported before the process group is made
(`load_deepspeed`; imported later it makes processes abort at exit now and then), and compiles nothing: its only
operation that would be built at run time serves inference and is switched off.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.buckets import GradBucket
from parallel.mesh import Mesh
from parallel.update import FlatOptimizer, OptimizerFactory, Shard, Update, moments_of, param_group

INSTALL = "install it with `pip install -e '.[zero]'`, or use optim.zero=0"


def check_deepspeed() -> None:
    """Raise ValueError, saying how to mend it, if DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"optim.zero=1 needs DeepSpeed, which is not installed; {INSTALL}")


def load_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for this device; to be called before the process group is made."""
    check_deepspeed()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it had to find that out
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*", category=FutureWarning)
    import deepspeed.ops

    # On a CPU this is compiled with g++ as soon as DeepSpeed's communication starts; it serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ShardedUpdate(Update):
    """ZeRO stage 1. Collective to make. Weights are stored in the type that the model computes with.

    Raises ValueError for FP64 weights: DeepSpeed's masters are FP32.
    """

    def __init__(self, buckets: Sequence[GradBucket], mesh: Mesh, make: OptimizerFactory) -> None:
        super().__init__(buckets, mesh)
        for bucket in self.buckets:
            if bucket.grads.dtype != torch.float32:
                raise ValueError(f"ZeRO-1 keeps FP32 masters; precision {bucket.grads.dtype} needs optim.zero=0")
        shares = [_share_of_weights(bucket) for bucket in self.buckets]
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.grad = None
                parameter.data = parameter.data.to(bucket.dtype)
        groups = [param_group(i, b, *b.parameters) for i, b in enumerate(self.buckets)]
        self.optimizer: FlatOptimizer = make(groups)
        self._zero = _deepspeed_optimizer(self.optimizer, self.buckets)
        self.optimizer.init_state()
        self.shards = []
        for bucket, share, master in zip(self.buckets, shares, self._zero.single_partition_of_fp32_groups, strict=True):
            bucket.restore_gradients()
            master.data.copy_(share)  # not what rounding to the weights' type has left of it
            moments = moments_of(self.optimizer, master)
            self.shards.append(Shard(bucket, bucket.share, master.detach(), moments))

    def _reduce(self, bucket: GradBucket) -> Any:
        if bucket.group is None:
            return None
        if dist.get_backend(bucket.group) == "gloo":
            return ExchangedSum(bucket)
        # In place: the share is a slice of the bucket, the rest of which is of no further use.
        return dist.reduce_scatter_single(bucket.grads[bucket.share], bucket.grads, group=bucket.group, async_op=True)

    def _used(self, bucket: GradBucket) -> slice:
        return bucket.share

    def _apply(self) -> None:
        self._zero.feed([bucket.grads[bucket.share] for bucket in self.buckets])
        self._zero.step()

    def publish(self) -> None:
        self._zero.update_lp_params()

    def close(self) -> None:
        """DeepSpeed's optimizer must be gone before the process group is: else some processes abort at exit."""
        self._zero.destroy()
        del self._zero
        self.shards.clear()
        gc.collect()


class ExchangedSum:
    """Reduce-scatter for gloo, whose own is an all-reduce inside: every share goes to its owner, who adds them up.

    Half the traffic, for memory of the bucket's size while it lasts.
    """

    def __init__(self, bucket: GradBucket) -> None:
        self._bucket = bucket
        self._arrived = torch.empty_like(bucket.grads)
        self._work: Any = dist.all_to_all_single(self._arrived, bucket.grads, group=bucket.group, async_op=True)

    def wait(self) -> None:
        self._work.wait()
        bucket = self._bucket
        torch.sum(self._arrived.view(bucket.copies, -1), dim=0, out=bucket.grads[bucket.share])


def _share_of_weights(bucket: GradBucket) -> torch.Tensor:
    """This rank's share of a bucket's weights, as they are before they are stored in a smaller type."""
    flat = torch.zeros_like(bucket.grads)
    for parameter, start in bucket.offsets():
        flat[start : start + parameter.numel()] = parameter.detach().flatten()
    return flat[bucket.share].clone()


def _deepspeed_optimizer(optimizer: Any, buckets: Sequence[GradBucket]) -> Any:
    """DeepSpeed's ZeRO-1 optimizer over one parameter group per bucket, without its engine and hooks."""
    import deepspeed
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
    from deepspeed.utils.timer import NoopTimer

    deepspeed.init_distributed(dist_init_required=False)
    groups = [b.group if b.group is not None else _group_of_one() for b in buckets]

    class BucketOptimizer(DeepSpeedZeroOptimizer):
        """Takes each bucket's own group, and reduced gradients through `feed`."""

        def _configure_moe_settings(self) -> None:
            self.real_dp_process_group = groups
            self.partition_count = [b.copies for b in buckets]
            self.is_moe_param_group = [False] * len(buckets)

        def create_gradient_handling_hooks(self) -> None:
            self._remaining_grad_acc_hooks = 0

        def free_grad_in_param_list(self, param_list: Any) -> None:
            """Gradients are views into the buckets and stay."""

        def feed(self, shares: Sequence[torch.Tensor]) -> None:
            for index, share in enumerate(shares):
                self.averaged_gradients[index] = GradPartitionBufferGroup([share], share)

    return BucketOptimizer(
        optimizer,
        param_names={p: piece for b in buckets for p, piece in b.names()},
        timers=NoopTimer(),
        optimizer_params={},
        verbose=False,
        contiguous_gradients=False,
        dp_process_group=groups[0],
        reduce_scatter=True,
        overlap_comm=False,
        partition_grads=False,
        has_moe_layers=True,
        clip_grad=0.0,
        check_grad_overflow=False,
        compute_grad_norm=False,
        communication_data_type=torch.float32,
    )


def _group_of_one() -> dist.ProcessGroup:
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
