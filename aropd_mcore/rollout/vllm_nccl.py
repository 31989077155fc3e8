"""Transfer of weights from the trainer's GPU to the servers' GPUs: one NCCL broadcast per tensor.

For each sync, rank 0 of the trainer and the workers of all servers form a communicator, in which
the trainer is rank 0. The servers get its unique id over HTTP, as vLLM provides for trainers that
do not import vLLM (vllm/distributed/weight_transfer/nccl_common.py). vLLM's communicator sums one
fp32 number when it is created, and every peer must take part.
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
        label: name of the weights on the servers.
        timeout: longest time for the servers to join, and for each tensor, in seconds.
        digests: digests by tensor name, filled as `tensors` is consumed. None: not compared.
    Raises:
        RolloutFailed: a server failed. The communicator and the weights of all servers in it are
            then unusable.
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
                received.result()  # raises the servers' error
            if time.monotonic() > deadline:
                raise ServerError(f"{what}: no progress in {timeout:g} s")
            time.sleep(_POLL_SECONDS)

    try:
        # A missing peer blocks NCCL forever. It must not block this thread, nor the stream on which
        # the next tensor is gathered.
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
        raise RolloutFailed(f"the NCCL transfer of weights failed: {error}") from error


def _join(unique_id: bytes, num_ranks: int, device: torch.device) -> object:
    torch.cuda.set_device(device)  # the current device is per thread
    communicator = nccl.init_rank(num_ranks, unique_id, 0)
    nccl.all_reduce([torch.zeros(1, device=device)], comms=[communicator])
    torch.cuda.synchronize(device)
    return communicator
