"""Several vLLM servers as one: load spread, failures tried again, everyone on the same weights.

A server is *ready* when it holds the weights that are wanted now and a probe has shown it. Whatever
goes wrong with a server makes it unready; it is then waited for, restarted if the run owns it,
given the weights again and probed, while the others go on. After too many failures in a row it is
left out until the next sync.
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
"""Before the second try; twice as long before each further one."""
_POLL_SECONDS = 0.25
_HANGING_SECONDS = 30.0
"""A server of ours that was up once and is silent for so long is started again."""


@dataclass(frozen=True)
class Weights:
    """What servers have to hold."""

    version: int
    """Training steps behind them."""
    label: str
    """Their name at the servers: no two runs, and no two starts of one, give the same."""
    folder: Path | None
    """Where a server can load them; None where they are sent instead."""
    probe_logprobs: Sequence[float]
    """The trainer's, of the probe's tokens but the first."""
    digests: Mapping[str, str] | None = None
    """The trainer's, of every tensor; None: they are not compared."""


class Servers:
    """See the module. Used by one process, and by one thread at a time."""

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
            batch_size: requests at a time on one server.
            probe_ids: tokens that the trainer and the servers score after each sync.
            tolerance: nats, of the mean absolute difference of their log-probs.
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
        """Who takes part in the next transfer, and with how many workers."""

    def sync(self, weights: Weights) -> None:
        """Give the servers these weights. One that fails is seen to in the next `generate`.

        The first time, they are waited for until they are up.

        Raises:
            RolloutFailed: a server's log-probs are not the trainer's.
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
        """Before a transfer: pause every server that is up, and count its workers."""
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
        """Of all servers that take part in the next transfer."""
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
        """Have the prepared servers join rank 0's communicator, take what it sends, and go on.

        Args:
            digests: see Weights; they are there when everything is sent.
        Raises:
            ServerError: one of them failed; it names the server.
            RolloutFailed: a server was given other tensors.
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
        """A response to each prompt, in their order.

        Args:
            on_response: told how many responses there are, of how many, after each.
        Raises:
            RolloutFailed: no server is left; one answers with other weights; or a response failed
                more often than it may.
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
        """Try until the server is ready, or lost."""
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
        """Up, of a known version, with the wanted weights, and proved to have them."""
        weights = self._wanted
        assert weights is not None, "sync comes first"
        if server.process and server.num_failures > 1:  # it runs, and is of no use
            await asyncio.to_thread(server.process.stop)
        server.start()
        api = self._api(http, server)
        if server.process and server.was_ready:
            wait = min(wait, _HANGING_SECONDS)
        await _until_healthy(api, server, wait)
        if await api.weight_version() != weights.label:
            check_version(await api.vllm_version())
            if weights.folder is None:
                raise RefusedByServer("it has no weights, and gets new ones after the next step")
            await api.pause()
            if weights.digests is not None:
                await api.note_digests()
            await api.load_weights(weights.folder)
            if weights.digests is not None:
                check_digests(server, weights.digests, await api.noted_digests())
            await api.resume(weights.label)
        self._prove(server, weights, await api.score(self._probe_ids))

    def _prove(self, server: Server, weights: Weights, logprobs: Sequence[float]) -> None:
        """Raise RolloutFailed unless a server's log-probs of the probe are the trainer's."""
        pairs = list(zip(weights.probe_logprobs, logprobs, strict=True))
        difference = sum(abs(ours - theirs) for ours, theirs in pairs) / len(pairs)
        if not difference <= self._tolerance:
            ours, theirs = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            raise RolloutFailed(
                f"{server.name} does not sample from the weights of step {weights.version}: over "
                f"a probe of {len(pairs)} tokens the mean log-prob is {ours:.6f} in training and "
                f"{theirs:.6f} there, {difference:.2g} apart on the average of the tokens; "
                f"rollout.vllm.probe_tolerance is {self._tolerance:g}"
            )

    def _api(self, http: httpx.AsyncClient, server: Server) -> Api:
        return Api(http, server.url, server.key, self._config.request_timeout)

    def close(self) -> None:
        """End the servers that were started here."""
        for server in self.servers:
            if server.process:
                server.process.stop()


def check_digests(
    server: Server, expected: Mapping[str, str], found: Sequence[Mapping[str, str]]
) -> None:
    """Raise RolloutFailed unless a server's workers loaded the trainer's tensors, bit for bit.

    A worker need not have been given all of them (vLLM leaves out experts of others): what it has
    been given is compared, and together they must have been given everything.

    Args:
        found: each worker's digests.
    """
    for worker, digests in enumerate(found):
        for name, theirs in digests.items():
            if theirs != expected.get(name):
                raise RolloutFailed(
                    f"worker {worker} of {server.name} was given another {name} than training has: "
                    f"its sha256 is {expected.get(name, 'of no tensor')} in training and {theirs} "
                    "there"
                )
    missing = sorted(expected.keys() - set().union(*found))
    if missing:
        raise RolloutFailed(
            f"{server.name} was given {len(expected) - len(missing)} of {len(expected)} tensors; "
            f"the first that it was not is {missing[0]}, sha256 {expected[missing[0]]} in training"
        )


def _client() -> httpx.AsyncClient:
    # Straight to the servers, whatever proxies the environment names, and all at once.
    return httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None))


async def _until_healthy(api: Api, server: Server, wait: float) -> None:
    deadline = time.monotonic() + wait
    while not await api.is_healthy():
        if server.process and not server.process.is_running:
            raise ServerError(server.process.why_ended())
        if time.monotonic() >= deadline:
            raise ServerError("it does not answer" + (f" after {wait:g} s" if wait else ""))
        await asyncio.sleep(_POLL_SECONDS)
