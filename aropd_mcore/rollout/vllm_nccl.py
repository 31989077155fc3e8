"""Weights from the trainer's GPU to the servers' GPUs: an NCCL broadcast a tensor.

For each sync the trainer's first rank, as rank 0, and the workers of all servers form a
communicator, by a unique id that the servers are told over HTTP (vLLM's way for trainers without
vLLM: vllm/distributed/weight_transfer/nccl_common.py). vLLM's communicator sums one fp32 number
when it is made, which every peer has to join.
"""

import base64
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.cuda import nccl

from aropd_mcore.mcore.rank0 import in_background
from aropd_mcore.rollout.engine import RolloutFailed
from aropd_mcore.rollout.vllm_api import ServerError
from aropd_mcore.rollout.vllm_servers import Servers

_POLL_SECONDS = 0.0005


def send_weights(
    tensors: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    servers: Servers,
    device: torch.device,
    *,
    label: str,
    timeout: float,
    digests: Mapping[str, str] | None = None,
) -> None:
    """Send tensors, one at a time, to the servers that `Servers.prepare` has paused.

    Args:
        tensors: on `device`, in the order of `shapes`, all of this dtype.
        label: what the weights are called at the servers.
        timeout: seconds for the servers to join, and for each tensor.
        digests: of the tensors, filled while they are taken from `tensors`; None: not compared.
    Raises:
        RolloutFailed: a server broke off; the communicator is of no use then, nor are the weights
            of those that were in it.
    """
    unique_id = nccl.unique_id()
    names, sizes = list(shapes), list(shapes.values())
    dtype_name = str(dtype).removeprefix("torch.")
    encoded = base64.b64encode(unique_id).decode()
    received = in_background(
        lambda: servers.receive(encoded, names, dtype_name, sizes, label, digests)
    )

    def wait_for(is_done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + timeout
        while not is_done():
            if received.done():
                received.result()  # raises what went wrong
            if time.monotonic() > deadline:
                raise ServerError(f"{what}: no progress in {timeout:g} s")
            time.sleep(_POLL_SECONDS)

    try:
        # A peer that does not come, or goes, blocks NCCL for good: never this thread, and never
        # the stream on which the next tensor is gathered.
        joined = in_background(lambda: _join(unique_id, servers.num_workers + 1, device))
        wait_for(joined.done, "the servers' workers join")
        communicator, stream = joined.result(), torch.cuda.Stream(device)
        expected = iter(names)
        for name, tensor in tensors:
            assert name == next(expected) and tensor.dtype == dtype, name
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                nccl.broadcast([tensor.contiguous()], 0, None, [communicator])
                sent = stream.record_event()
            wait_for(sent.query, name)
        wait_for(received.done, "the servers load")
        received.result()
    except ServerError as error:
        raise RolloutFailed(f"the NCCL transfer of weights broke off: {error}") from error


def _join(unique_id: bytes, num_ranks: int, device: torch.device) -> object:
    torch.cuda.set_device(device)  # a thread has its own
    communicator = nccl.init_rank(num_ranks, unique_id, 0)
    nccl.all_reduce([torch.zeros(1, device=device)], comms=[communicator])
    torch.cuda.synchronize(device)
    return communicator
