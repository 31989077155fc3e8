"""A fix for checkpoints of optimizer state if DDP buffers have padding between their buckets."""

from typing import Any


def count_padding(chunk: Any) -> None:
    """Count the padding after each bucket of a DistributedDataParallel chunk as part of the bucket.

    For a checkpoint, Megatron gathers a buffer's state without the padding between buckets. It then
    reads each parameter's state at an offset that includes the padding. After a padded bucket, the
    checkpoint would hold another parameter's values (megatron-core 0.16.1 and 0.19,
    optimizer/distrib_optimizer.py, get_parameter_state_dp_zero and
    sharded_param_state_fully_reshardable). A buffer has several buckets if a tied embedding is on
    several stages, or with overlap_grad_reduce.
    """
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
