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
    """HF or PEFT folder that servers load; None if the weights are sent instead."""
    probe_logprobs: Sequence[float]
    """Log-probs of all probe tokens but the first, computed by the trainer."""
    digests: Mapping[str, str] | None = None
    """Digest of every tensor of the trainer; None: not compared."""
    is_adapter: bool = False
    """Whether the folder is a PEFT folder. The servers started with the base model."""

    @property
    def adapter(self) -> str | None:
        """Name of the adapter on the servers, different for every version."""
        return self.label if self.is_adapter else None


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

    def sync(self, weights: Weights) -> None:
        """Give the servers these weights. The next `generate` repairs a server that fails.

        The first call waits until the servers are up.

        Raises:
            RolloutFailed: a server's log-probs differ from the trainer's.
        """
        asyncio.run(self._sync(weights))

    async def _sync(self, weights: Weights) -> None:
        wait = self.first_wait()
        # A server that sleeps between the steps is not ready, and is woken.
        is_woken = self._config.placement == "colocated"
        chosen = [s for s in self.servers if s.is_ready or self._is_first_sync or is_woken]
        self._is_first_sync = False
        self._wanted = weights
        for server in self.servers:
            server.is_ready, server.num_failures = False, 0
        async with client() as http:
            await asyncio.gather(*(self._try_once(http, server, wait) for server in chosen))

    def first_wait(self) -> float:
        """Return the seconds to wait for a server that does not answer."""
        return self._config.start_timeout if self._is_first_sync else 0.0

    def sleep(self) -> None:
        """Let every ready server release its memory. The next `generate` or `sync` wakes it."""
        asyncio.run(self._sleep())

    async def _sleep(self) -> None:
        assert self._wanted is not None, "sync comes first"
        # The base model of an adapter stays the same.
        keeps_weights = self._wanted.is_adapter

        async def sleep(server: Server) -> None:
            server.is_ready = False
            try:
                await self.api(http, server).sleep(keeps_weights=keeps_weights)
            except ServerError as error:
                server.failed(error)
                raise RolloutFailed(
                    f"{server.name} did not release the GPU that it shares with training: {error}"
                ) from error

        async with client() as http:
            await asyncio.gather(*(sleep(server) for server in self.servers if server.is_ready))

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
        async with client() as http:
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
        ids, logprobs = await self.api(http, server).generate(
            prompt,
            seed if self._config.seeded else None,
            sampling,
            eos_token_ids=self._eos_token_ids,
            weight_version=self._wanted.label,
            adapter=self._wanted.adapter,
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
        api = self.api(http, server)
        if server.process and server.was_ready:
            wait = min(wait, _HANGING_SECONDS)
        await until_healthy(api, server, wait)
        if await api.weight_version() != weights.label:
            check_version(await api.vllm_version())
            if weights.folder is None:
                raise RefusedByServer("it has no weights until the sync after the next step")
            if self._config.placement == "colocated":
                await api.wake()
            await api.pause()
            if weights.digests is not None:
                await api.note_digests()
            if weights.is_adapter:
                await api.load_adapter(weights.label, weights.folder)
            else:
                await api.load_weights(weights.folder)
            if weights.digests is not None:
                check_digests(server, weights.digests, await api.noted_digests())
            await api.resume(weights.label)
        self._prove(server, weights, await api.score(self._probe_ids, weights.adapter))

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

    def api(self, http: httpx.AsyncClient, server: Server) -> Api:
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


def client() -> httpx.AsyncClient:
    # Without the environment's proxies, and without a limit on connections.
    return httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None))


async def until_healthy(api: Api, server: Server, wait: float) -> None:
    deadline = time.monotonic() + wait
    while not await api.is_healthy():
        if server.process and not server.process.is_running:
            raise ServerError(server.process.why_ended())
        if time.monotonic() >= deadline:
            raise ServerError("it does not answer" + (f" after {wait:g} s" if wait else ""))
        await asyncio.sleep(_POLL_SECONDS)
