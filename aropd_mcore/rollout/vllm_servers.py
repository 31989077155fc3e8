"""A group of vLLM servers: load balancing, retries, and the same weights on every server.

A server is *ready* when it holds the current weights and a probe has shown it. Any failure makes a
server unready. The other servers continue while it is waited for, restarted if the run owns it,
given the weights again, and probed. After too many failures in a row the server is excluded until
the next sync.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from aropd_mcore.config import SamplingConfig, VllmConfig
from aropd_mcore.rollout.engine import RolloutFailed
from aropd_mcore.rollout.vllm_api import Api, RefusedByServer, ServerError, check_version
from aropd_mcore.rollout.vllm_spread import Server, spread
from aropd_mcore.types import Rollout

BACKOFF_SECONDS = 0.5
"""Delay before the first retry; it doubles with each further one."""
_POLL_SECONDS = 0.25
_HANGING_SECONDS = 30.0
"""Time after which a server of the run that was ready once and does not answer is restarted."""


@dataclass(frozen=True)
class Weights:
    """Weights that the servers must hold."""

    version: int
    """Number of training steps of these weights."""
    label: str
    """Name of the weights on the servers, different for every run and every start of a run."""
    folder: Path | None
    """HF folder that servers load; None if the weights are sent instead."""
    probe_logprobs: Sequence[float]
    """Log-probs of all probe tokens but the first, computed by the trainer."""
    digests: Mapping[str, str] | None = None
    """Digest of every tensor of the trainer; None: not compared."""


class Servers:
    """The group of servers. Used by one process, and by one thread at a time."""

    def __init__(
        self,
        servers: Sequence[Server],
        config: VllmConfig,
        *,
        batch_size: int,
        eos_token_ids: Sequence[int],
        probe_ids: Sequence[int],
        tolerance: float,
    ):
        """
        Args:
            batch_size: largest number of simultaneous requests per server.
            probe_ids: tokens that the trainer and the servers score after each sync.
            tolerance: largest mean absolute difference of their log-probs, in nats.
        """
        self.servers = servers
        self._config = config
        self._batch_size = batch_size
        self._eos_token_ids = eos_token_ids
        self._probe_ids = probe_ids
        self._tolerance = tolerance
        self._wanted: Weights | None = None
        self._is_first_sync = True
        self._receivers: list[tuple[Server, int]] = []
        """Servers that take part in the next transfer, and the number of workers of each."""

    def sync(self, weights: Weights) -> None:
        """Give the servers these weights. The next `generate` repairs a server that fails.

        The first call waits until the servers are up.

        Raises:
            RolloutFailed: a server's log-probs differ from the trainer's.
        """
        asyncio.run(self._sync(weights))

    async def _sync(self, weights: Weights) -> None:
        wait = self._first_wait()
        chosen = [s for s in self.servers if s.is_ready or self._is_first_sync]
        self._is_first_sync = False
        self._wanted = weights
        for server in self.servers:
            server.is_ready, server.num_failures = False, 0
        async with _client() as http:
            await asyncio.gather(*(self._try_once(http, server, wait) for server in chosen))

    def _first_wait(self) -> float:
        return self._config.start_timeout if self._is_first_sync else 0.0

    def prepare(self) -> None:
        """Prepare a transfer: pause every server that is up and count its workers."""
        asyncio.run(self._prepare())

    async def _prepare(self) -> None:
        self._receivers = []
        async with _client() as http:
            await asyncio.gather(*(self._pause(http, server) for server in self.servers))

    async def _pause(self, http: httpx.AsyncClient, server: Server) -> None:
        try:
            server.start()
            api = self._api(http, server)
            await _until_healthy(api, server, self._first_wait())
            check_version(await api.vllm_version())
            await api.pause()
            self._receivers.append((server, await api.num_workers()))
        except ServerError as error:
            server.failed(error)

    @property
    def num_workers(self) -> int:
        """Number of workers of all servers that take part in the next transfer."""
        return sum(count for _, count in self._receivers)

    def receive(
        self,
        unique_id_base64: str,
        names: Sequence[str],
        dtype: str,
        shapes: Sequence[tuple[int, ...]],
        label: str,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """Let the prepared servers join rank 0's communicator, receive the weights, and resume.

        Args:
            digests: see Weights; complete once all tensors are sent.
        Raises:
            ServerError: a server failed; the message names the server.
            RolloutFailed: a server received other tensors.
        """
        asyncio.run(self._receive(unique_id_base64, names, dtype, shapes, label, digests))

    async def _receive(
        self,
        unique_id_base64: str,
        names: Sequence[str],
        dtype: str,
        shapes: Sequence[tuple[int, ...]],
        label: str,
        digests: Mapping[str, str] | None,
    ) -> None:
        async def receive(server: Server, first_rank: int) -> None:
            api = self._api(http, server)
            try:
                await api.join_nccl(unique_id_base64, first_rank, self.num_workers + 1)
                if digests is not None:
                    await api.note_digests()
                await api.receive_weights(names, dtype, shapes)
                await api.leave_nccl()
                if digests is not None:
                    check_digests(server, digests, await api.noted_digests())
                await api.resume(label)
            except ServerError as error:
                server.failed(error)
                raise ServerError(f"{server.name}: {error}") from error

        first_rank, calls = 1, []
        async with _client() as http:
            for server, count in self._receivers:
                calls.append(receive(server, first_rank))
                first_rank += count
            await asyncio.gather(*calls)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        on_response: Callable[[int, int], None],
    ) -> list[Rollout]:
        """Sample one response per prompt, in the order of the prompts.

        Args:
            on_response: called after each response with the number of responses so far and in all.
        Raises:
            RolloutFailed: no server is left, a server has other weights, or a response failed too
                often.
        """
        return asyncio.run(self._generate(prompts, seeds, sampling, on_response))

    async def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        on_response: Callable[[int, int], None],
    ) -> list[Rollout]:
        async with _client() as http:
            return await spread(
                range(len(prompts)),
                self.servers,
                lambda i, server: self._respond(http, server, prompts[i], seeds[i], sampling),
                lambda server: self._repair(http, server),
                batch_size=self._batch_size,
                retries=self._config.retries,
                on_response=on_response,
            )

    async def _respond(
        self,
        http: httpx.AsyncClient,
        server: Server,
        prompt: Sequence[int],
        seed: int,
        sampling: SamplingConfig,
    ) -> Rollout:
        assert self._wanted is not None, "sync comes first"
        ids, logprobs = await self._api(http, server).generate(
            prompt,
            seed,
            sampling,
            eos_token_ids=self._eos_token_ids,
            weight_version=self._wanted.label,
        )
        is_finished = ids[-1] in self._eos_token_ids
        return Rollout(tuple(ids), tuple(logprobs), is_finished, self._wanted.version)

    async def _repair(self, http: httpx.AsyncClient, server: Server) -> None:
        """Retry until the server is ready or excluded."""
        while not server.is_settled(self._config.retries):
            if server.num_failures:
                await asyncio.sleep(BACKOFF_SECONDS * 2 ** (server.num_failures - 1))
            await self._try_once(http, server, self._config.start_timeout)

    async def _try_once(self, http: httpx.AsyncClient, server: Server, wait: float) -> None:
        try:
            await self._make_ready(http, server, wait)
        except ServerError as error:
            server.failed(error)
        else:
            server.is_ready = server.was_ready = True

    async def _make_ready(self, http: httpx.AsyncClient, server: Server, wait: float) -> None:
        """Start the server if needed, give it the current weights, and probe it."""
        weights = self._wanted
        assert weights is not None, "sync comes first"
        if server.process and server.num_failures > 1:  # it runs and keeps failing
            await asyncio.to_thread(server.process.stop)
        server.start()
        api = self._api(http, server)
        if server.process and server.was_ready:
            wait = min(wait, _HANGING_SECONDS)
        await _until_healthy(api, server, wait)
        if await api.weight_version() != weights.label:
            check_version(await api.vllm_version())
            if weights.folder is None:
                raise RefusedByServer("it has no weights until the sync after the next step")
            await api.pause()
            if weights.digests is not None:
                await api.note_digests()
            await api.load_weights(weights.folder)
            if weights.digests is not None:
                check_digests(server, weights.digests, await api.noted_digests())
            await api.resume(weights.label)
        self._prove(server, weights, await api.score(self._probe_ids))

    def _prove(self, server: Server, weights: Weights, logprobs: Sequence[float]) -> None:
        """Raise RolloutFailed unless a server's log-probs of the probe agree with the trainer's."""
        pairs = list(zip(weights.probe_logprobs, logprobs, strict=True))
        difference = sum(abs(ours - theirs) for ours, theirs in pairs) / len(pairs)
        if not difference <= self._tolerance:
            ours, theirs = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            raise RolloutFailed(
                f"{server.name} does not sample from the weights of step {weights.version}: over "
                f"a probe of {len(pairs)} tokens the mean log-prob is {ours:.6f} in training and "
                f"{theirs:.6f} on the server, and the mean absolute difference is "
                f"{difference:.2g}; expected at most rollout.vllm.probe_tolerance "
                f"{self._tolerance:g}"
            )

    def _api(self, http: httpx.AsyncClient, server: Server) -> Api:
        return Api(http, server.url, server.key, self._config.request_timeout)

    def close(self) -> None:
        """Stop the servers that the run has started."""
        for server in self.servers:
            if server.process:
                server.process.stop()


def check_digests(
    server: Server, expected: Mapping[str, str], loaded: Sequence[Mapping[str, str]]
) -> None:
    """Raise RolloutFailed unless a server's workers loaded the trainer's tensors bit for bit.

    A worker may have loaded only some of them, because vLLM skips the experts of other workers. Its
    tensors are compared, and together the workers must have loaded all tensors.

    Args:
        loaded: digests of the tensors that each worker loaded.
    """
    for worker, digests in enumerate(loaded):
        for name, theirs in digests.items():
            if theirs != expected.get(name):
                raise RolloutFailed(
                    f"worker {worker} of {server.name} loaded another {name} than training has: "
                    f"sha256 {theirs}; expected {expected.get(name, 'no such tensor')}"
                )
    missing = sorted(expected.keys() - set().union(*loaded))
    if missing:
        raise RolloutFailed(
            f"{server.name} loaded {len(expected) - len(missing)} of {len(expected)} tensors; "
            f"expected also {missing[0]}, sha256 {expected[missing[0]]}"
        )


def _client() -> httpx.AsyncClient:
    # Without the environment's proxies, and without a limit on connections.
    return httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None))


async def _until_healthy(api: Api, server: Server, wait: float) -> None:
    deadline = time.monotonic() + wait
    while not await api.is_healthy():
        if server.process and not server.process.is_running:
            raise ServerError(server.process.why_ended())
        if time.monotonic() >= deadline:
            raise ServerError("it does not answer" + (f" after {wait:g} s" if wait else ""))
        await asyncio.sleep(_POLL_SECONDS)
