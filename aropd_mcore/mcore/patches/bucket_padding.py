"""Checkpoints of optimizer state whose DDP buffers have padding between their buckets."""

from typing import Any


def count_padding(chunk: Any) -> None:
    """Make the padding behind each bucket of a DistributedDataParallel chunk part of the bucket.

    Megatron gathers a buffer's state for a checkpoint without the padding between its buckets. It
    then takes each parameter's state from the parameter's position with the padding, so that behind
    a padded bucket the checkpoint holds the numbers of another parameter (megatron-core 0.16.1 and
    0.19, optimizer/distrib_optimizer.py, get_parameter_state_dp_zero and
    sharded_param_state_fully_reshardable). A tied embedding on several stages, or
    overlap_grad_reduce, makes several buckets.
    """
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
