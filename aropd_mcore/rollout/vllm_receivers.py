"""The servers' side of a transfer of weights from GPU to GPU, over HTTP."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import httpx

from aropd_mcore.convert.tensor_bytes import TensorInfo
from aropd_mcore.rollout.vllm_api import Api, ServerError, check_version
from aropd_mcore.rollout.vllm_servers import Servers, check_digests, client, until_healthy
from aropd_mcore.rollout.vllm_spread import Server

T = TypeVar("T")


class Receivers:
    """Servers that take part in transfers. Used by one process, and by one thread at a time.

    A transfer is `prepare`, `join` per sender if needed, `begin`, `receive` per sender, and `end`.
    """

    def __init__(self, servers: Servers):
        self._servers = servers
        self._receivers: list[tuple[Server, int]] = []
        """Servers that take part in this transfer, and the number of workers of each."""
        self._joined: list[tuple[Server, int]] = []
        """Servers that have joined the senders' communicators."""

    def prepare(self) -> tuple[int, str | None]:
        """Prepare a transfer: pause every server that is up.

        Returns:
            Number of workers of all servers that take part, and the name of the communicators that
            all of them have joined. None: they must `join` new ones.
        """
        return asyncio.run(self._prepare())

    async def _prepare(self) -> tuple[int, str | None]:
        async with client() as http:
            counts = await asyncio.gather(*(self._pause(http, s) for s in self._servers.servers))
            paired = zip(self._servers.servers, counts, strict=True)
            self._receivers = [(server, count) for server, count in paired if count]
            names = await self._on_receivers(lambda api, _: api.senders_name(), http)
        name = names[0] if names and names.count(names[0]) == len(names) else None
        return self._num_workers, name if self._receivers == self._joined else None

    async def _pause(self, http: httpx.AsyncClient, server: Server) -> int:
        """Pause a server; return its number of workers, 0 if it is not up."""
        try:
            server.start()
            api = self._servers.api(http, server)
            await until_healthy(api, server, self._servers.first_wait())
            check_version(await api.vllm_version())
            await api.pause()
            return await api.num_workers()
        except ServerError as error:
            server.failed(error)
            return 0

    @property
    def _num_workers(self) -> int:
        return sum(count for _, count in self._receivers)

    def join(self, name: str, sender: int, unique_id_base64: str) -> None:
        """Let all prepared servers join a sender's communicator, in which the sender is rank 0.

        Args:
            name: name of the communicators.
            sender: number of the sender.
        Raises:
            ServerError: a server failed; the message names the server.
        """
        num_ranks = self._num_workers + 1
        self._run(
            lambda api, first: api.join_sender(name, sender, unique_id_base64, first, num_ranks)
        )
        self._joined = list(self._receivers)

    def begin(self, *, digests: bool) -> None:
        """Let the prepared servers begin to replace their weights; errors as in `join`.

        Args:
            digests: let them record digests of what they receive.
        """

        async def begin(api: Api, _: int) -> None:
            if digests:
                await api.note_digests()
            await api.start_weights()

        self._run(begin)

    def receive(self, sender: int, infos: Mapping[str, TensorInfo]) -> None:
        """Let the prepared servers receive and load a sender's tensors; errors as in `join`."""
        self._run(lambda api, _: api.receive_weights(sender, infos))

    def end(self, label: str, digests: Mapping[str, str] | None) -> None:
        """Let the prepared servers resume with the weights that they have received.

        Args:
            digests: see Weights.
        Raises:
            ServerError: as in `join`.
            RolloutFailed: a server received other tensors.
        """
        self._run(lambda api, _: api.finish_weights())
        if digests is not None:
            noted = self._run(lambda api, _: api.noted_digests())
            for (server, _), of_workers in zip(self._receivers, noted, strict=True):
                check_digests(server, digests, of_workers)
        self._run(lambda api, _: api.resume(label))

    def _run(self, call: Callable[[Api, int], Coroutine[Any, Any, T]]) -> list[T]:
        """Call all prepared servers at once, each with the rank of its first worker."""

        async def run() -> list[T]:
            async with client() as http:
                return await self._on_receivers(call, http)

        return asyncio.run(run())

    async def _on_receivers(
        self, call: Callable[[Api, int], Coroutine[Any, Any, T]], http: httpx.AsyncClient
    ) -> list[T]:
        async def one(server: Server, first_rank: int) -> T:
            try:
                return await call(self._servers.api(http, server), first_rank)
            except ServerError as error:
                server.failed(error)
                raise ServerError(f"{server.name}: {error}") from error

        first_rank, calls = 1, []
        for server, count in self._receivers:
            calls.append(one(server, first_rank))
            first_rank += count
        return await asyncio.gather(*calls)
