"""Distribution of a batch over several servers, each of which may fail at any time."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from aropd_mcore.rollout.engine import RolloutFailed
from aropd_mcore.rollout.vllm_api import RefusedByServer, ServerError
from aropd_mcore.rollout.vllm_process import ServerProcess
from aropd_mcore.types import Rollout


class Server:
    """State of one server as of the last request."""

    def __init__(self, name: str, key: str | None, *, start: Callable[[], tuple] | None = None):
        """
        Args:
            name: URL of the server, or a name for a server that the run starts.
            start: starts the server and returns its URL and process. None: the server was started
                by hand.
        """
        self.name = name
        self.key = key
        self.url = name
        self.process: ServerProcess | None = None
        self._start = start
        self.is_ready = False
        self.was_ready = False
        """Whether the server was ready since its start."""
        self.num_in_flight = 0
        self.num_failures = 0
        """Number of failures in a row."""
        self.last_error: ServerError | None = None

    def start(self) -> None:
        """Start the server if the run owns it and it does not run."""
        if self._start and not (self.process and self.process.is_running):
            self.was_ready = False
            try:
                self.url, self.process = self._start()
            except OSError as error:
                raise ServerError(f"it cannot be started: {error}") from error

    def failed(self, error: ServerError) -> None:
        self.is_ready = False
        self.num_failures += 1
        self.last_error = error

    def is_settled(self, retries: int) -> bool:
        """Return whether the server is ready or excluded.

        It is excluded if it refused or failed more than `retries` times in a row.
        """
        refused = isinstance(self.last_error, RefusedByServer) and self.num_failures > 0
        return self.is_ready or refused or self.num_failures > retries


async def spread(
    indices: Sequence[int],
    servers: Sequence[Server],
    respond: Callable[[int, Server], Coroutine[Any, Any, Rollout]],
    repair: Callable[[Server], Coroutine[Any, Any, None]],
    *,
    batch_size: int,
    retries: int,
    on_response: Callable[[int, int], None],
) -> list[Rollout]:
    """Return the response of every index, in order. Failed requests are retried.

    Args:
        respond: requests a response from a server; raises ServerError.
        repair: makes a server ready again or excludes it, and updates the Server.
        batch_size: largest number of simultaneous requests per server.
        retries: number of retries of a response per server.
        on_response: called after each response with the number of responses so far and in all.
    Raises:
        RolloutFailed: no server is left, or a response failed too often.
    """
    done: dict[int, Rollout] = {}
    todo = list(indices)
    failed_on: dict[int, list[Server]] = {index: [] for index in indices}
    responses: dict[asyncio.Task[Rollout], tuple[int, Server]] = {}
    repairs: dict[asyncio.Task[None], Server] = {}
    try:
        while len(done) < len(indices):
            for server in servers:
                if not server.is_settled(retries) and server not in repairs.values():
                    repairs[asyncio.create_task(repair(server))] = server
            for index, server in _next_responses(todo, servers, failed_on, batch_size):
                todo.remove(index)
                responses[asyncio.create_task(respond(index, server))] = index, server
            if not responses and not repairs:
                raise RolloutFailed(_no_server_left(servers))
            waited_for = [*responses, *repairs]
            finished, _ = await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
            for task in finished & repairs.keys():
                del repairs[task]
                task.result()
            for task in finished & responses.keys():
                index, server = responses.pop(task)
                server.num_in_flight -= 1
                try:
                    done[index] = task.result()
                except ServerError as error:
                    failed_on[index].append(server)
                    todo.append(index)
                    if server.is_ready:  # one failure for all its requests in flight
                        server.failed(error)
                    if len(failed_on[index]) > retries * len(servers):
                        raise RolloutFailed(_too_often(failed_on[index], error)) from error
                else:
                    server.num_failures = 0
                    on_response(len(done), len(indices))
    finally:
        for server in servers:
            server.num_in_flight = 0
        for task in (*responses, *repairs):
            task.cancel()
        await asyncio.gather(*responses, *repairs, return_exceptions=True)
    return [done[index] for index in indices]


def _next_responses(
    todo: Sequence[int],
    servers: Sequence[Server],
    failed_on: dict[int, list[Server]],
    batch_size: int,
) -> list[tuple[int, Server]]:
    """Choose the next requests and their servers, and count them as in flight.

    A request goes to the server with the fewest in flight, among the servers that have failed it
    least often.
    """
    chosen = []
    ready = [server for server in servers if server.is_ready]
    for index in todo:
        if all(server.num_in_flight >= batch_size for server in ready):
            break
        failed = failed_on[index]
        fewest = min(failed.count(server) for server in ready)
        able = [
            server
            for server in ready
            if server.num_in_flight < batch_size and failed.count(server) == fewest
        ]
        if able:
            server = min(able, key=lambda server: server.num_in_flight)
            server.num_in_flight += 1
            chosen.append((index, server))
    return chosen


def _too_often(failed_on: Sequence[Server], error: ServerError) -> str:
    last = failed_on[-1].name
    return f"a response failed {len(failed_on)} times, the last time at {last}: {error}"


def _no_server_left(servers: Sequence[Server]) -> str:
    errors = (f"{server.name}: {server.last_error}" for server in servers)
    return "no vLLM server is left:\n" + "\n".join(errors)
