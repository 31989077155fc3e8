"""Transfer of weights from the trainer's GPUs to the servers' GPUs: one NCCL broadcast per bucket.

The first rank of every pipeline stage sends the tensors of its stage. It is rank 0 of a
communicator with the workers of all servers. vLLM receives from one communicator at a time, so the
stages send in turn; each gathers its first buckets meanwhile. Communicators are created at the
first transfer and again when the set of servers changes.

The servers get the unique ids over HTTP from rank 0 of the job, as vLLM provides for trainers that
do not import vLLM (vllm/distributed/weight_transfer/nccl_common.py). vLLM's communicator sums one
fp32 number when it is created, and every peer must take part.
"""

import base64
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl
from torch.distributed.distributed_c10d import _get_default_store

from aropd_mcore.convert.buckets import receiver_buckets
from aropd_mcore.convert.tensor_bytes import BUCKET_BYTES, TensorInfo
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.rank0 import in_background, run_on_rank0
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weight_buckets import WeightBuckets, stage_infos
from aropd_mcore.rollout.engine import RolloutFailed
from aropd_mcore.rollout.vllm_api import ServerError
from aropd_mcore.rollout.vllm_receivers import Receivers
from aropd_mcore.rollout.vllm_servers import Servers
from aropd_mcore.rollout.vllm_side.aropd_worker import noted

_POLL_SECONDS = 0.0005
_CHECK_SECONDS = 0.1
"""Interval at which a sender checks whether a server has failed."""
_IN_FLIGHT = 2
"""Number of buckets that may be on their way at once."""

Wait = Callable[[Callable[[], bool], str], None]
"""Wait until a function returns True, or raise ServerError that names what was waited for."""


class Link:
    """Communicator between this rank, which is its rank 0, and the workers of all servers."""

    def __init__(self, unique_id: bytes, num_ranks: int, device: torch.device):
        """Join the communicator. Blocks until every rank has joined."""
        torch.cuda.set_device(device)  # the current device is per thread
        self._communicator = nccl.init_rank(num_ranks, unique_id, 0)
        nccl.all_reduce([torch.zeros(1, device=device)], comms=[self._communicator])
        torch.cuda.synchronize(device)
        # A missing peer blocks NCCL forever. It must not block the stream of the next gather.
        self._stream = torch.cuda.Stream(device)

    @staticmethod
    def new_id() -> bytes:
        return nccl.unique_id()

    def broadcast(self, flat: Tensor) -> Callable[[], bool]:
        """Start to send a tensor, which must not change; return whether it has been sent."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            nccl.broadcast([flat], 0, None, [self._communicator])
            return self._stream.record_event().query


class WeightTransfer:
    """Transfers to the servers, on every rank of the job."""

    def __init__(
        self, model: StageModel, runtime: Runtime, servers: Servers | None, *, timeout: float
    ):
        """
        Args:
            servers: the servers, on rank 0 only.
            timeout: longest time for the servers to join, and for each bucket, in seconds.
        """
        self._model = model
        self._runtime = runtime
        self._receivers = Receivers(servers) if servers else None
        self._timeout = timeout
        self._joined: str | None = None
        """Name of the communicators, which the servers know, too."""
        self._link: Link | None = None
        """This rank's communicator, on senders only."""

    def send(self, label: str, *, digests: bool) -> dict[str, str] | None:
        """Send the model's weights to every server that is up.

        Args:
            label: name of the weights on the servers. Only rank 0's is used.
            digests: compute a digest of every tensor, and compare it with the servers'.
        Returns:
            The digests by tensor name, on rank 0. None without `digests`.
        Raises:
            RolloutFailed: a server failed, on every rank. The weights of all servers are then
                unusable.
        Collectives: those of WeightBuckets.gather_on_sender, broadcasts and all-gathers of objects
            over the job. Every rank must call it.
        """
        try:
            return self._send(label, digests=digests)
        except ServerError as error:
            self._joined = self._link = None
            raise RolloutFailed(f"the NCCL transfer of weights failed: {error}") from error
        except RolloutFailed:
            self._joined = self._link = None
            raise

    def _send(self, label: str, *, digests: bool) -> dict[str, str] | None:
        buckets = WeightBuckets(self._model, self._runtime)
        label, num_workers, joined = run_on_rank0(partial(self._prepare, label), takes_long=True)
        if num_workers == 0:
            return {} if digests else None  # the sync reports why no server is up
        held = self._runtime.gather(buckets.held if buckets.is_sender else None)
        senders = [rank for rank, part in enumerate(held) if part is not None]
        if joined is None or joined != self._joined:
            self._connect(label, senders, num_workers + 1)
        noted_digests: dict[str, str] = {}
        run_on_rank0(lambda: self._on_servers.begin(digests=digests), takes_long=True)
        for number, rank in enumerate(senders):
            model = self._model
            infos = stage_infos(
                model.architecture, held[rank] or frozenset(), model.config.params_dtype
            )
            receive = partial(self._receive, number, infos)
            send = partial(self._send_stage, buckets, noted_digests if digests else None)
            is_own_stage = held[rank] == buckets.held
            self._together(f"{label}/{number}", receive, send if is_own_stage else _nothing)
        if digests:
            for part in self._runtime.gather(noted_digests):
                noted_digests |= part
        expected = noted_digests if digests else None
        run_on_rank0(lambda: self._on_servers.end(label, expected), takes_long=True)
        return expected

    def _prepare(self, label: str) -> tuple[str, int, str | None]:
        return label, *self._on_servers.prepare()

    @property
    def _on_servers(self) -> Receivers:
        assert self._receivers is not None, "on rank 0 only"
        return self._receivers

    def _connect(self, name: str, senders: list[int], num_ranks: int) -> None:
        """Create the communicator of every sender, one after another."""
        rank, device = self._runtime.rank, self._runtime.device
        self._link = None
        ids = self._runtime.gather(Link.new_id() if rank in senders else None)
        for number, sender in enumerate(senders):
            unique_id = ids[sender]

            def join_own(wait: Wait, unique_id: bytes = unique_id) -> None:
                # Not in this thread: a missing peer blocks NCCL forever.
                joined = in_background(lambda: Link(unique_id, num_ranks, device))
                wait(joined.done, "the servers' workers join")
                self._link = joined.result()

            encoded = base64.b64encode(unique_id).decode()
            join = partial(self._join_servers, name, number, encoded)
            self._together(f"{name}/join/{number}", join, join_own if rank == sender else _nothing)
        self._joined = name

    def _join_servers(self, name: str, number: int, unique_id: str) -> None:
        self._on_servers.join(name, number, unique_id)

    def _receive(self, number: int, infos: dict[str, TensorInfo]) -> None:
        self._on_servers.receive(number, infos)

    def _send_stage(
        self, buckets: WeightBuckets, digests: dict[str, str] | None, wait: Wait
    ) -> None:
        """Gather this stage's buckets, and send them if this rank is the sender."""
        tensors = _tensors(buckets)
        try:
            if buckets.is_sender:
                self._broadcast(tensors if digests is None else noted(tensors, digests), wait)
        finally:
            for _ in tensors:  # to the end, also after an error: other ranks take part
                pass

    def _broadcast(self, tensors: Iterable[tuple[str, Tensor]], wait: Wait) -> None:
        assert self._link is not None, "the sender has joined"
        in_flight: deque[tuple[Callable[[], bool], Tensor]] = deque()
        for flat in packed(tensors, BUCKET_BYTES):
            if len(in_flight) == _IN_FLIGHT:
                wait(in_flight[0][0], "a bucket of weights")
                in_flight.popleft()
            in_flight.append((self._link.broadcast(flat), flat))
        for is_sent, _ in in_flight:
            wait(is_sent, "a bucket of weights")

    def _together(
        self, name: str, on_servers: Callable[[], None], here: Callable[[Wait], None]
    ) -> None:
        """Call `on_servers` on rank 0 and `here` on every rank, at the same time.

        Raises:
            ServerError: either failed, on every rank.
        """
        store, key = _get_default_store(), f"aropd-transfer/{name}"

        def serve() -> None:
            try:
                on_servers()
            except BaseException:
                store.set(key, "failed")
                raise

        def wait(is_done: Callable[[], bool], what: str) -> None:
            checked = started = time.monotonic()
            while not is_done():
                now = time.monotonic()
                if now - started > self._timeout:
                    raise ServerError(f"{what}: no progress in {self._timeout:g} s")
                if now - checked > _CHECK_SECONDS:
                    checked = now
                    if store.check([key]):
                        raise ServerError(f"{what}: a server has failed")
                time.sleep(_POLL_SECONDS)

        served = in_background(serve) if self._runtime.rank == 0 else None
        error: str | None = None
        try:
            here(wait)
        except Exception as raised:
            error = f"rank {dist.get_rank()}: {raised}"
        run_on_rank0(lambda: served.result() if served else None, takes_long=True)
        for text in self._runtime.gather(error):
            if text is not None:
                raise ServerError(text)


def packed(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[Tensor]:
    """Yield flat buckets of tensors, cut where vLLM's receiver cuts them.

    Args:
        tensors: in the order of the names that the receiver knows.
        limit: a bucket ends with the first tensor that makes it larger than this number of bytes.
    """
    parts = (tensor.reshape(-1).view(torch.uint8) for _, tensor in tensors)
    for bucket in receiver_buckets(parts, Tensor.numel, limit):
        yield torch.cat(bucket)


def _tensors(buckets: WeightBuckets) -> Iterator[tuple[str, Tensor]]:
    """Gather the stage's buckets; yield their tensors, on the sender only."""
    for bucket in buckets.sent():
        flat = buckets.gather_on_sender(bucket)
        if flat is not None and buckets.is_sender:
            yield from bucket.views(flat)


def _nothing(_: Wait) -> None:
    """Take no part in a transfer."""
