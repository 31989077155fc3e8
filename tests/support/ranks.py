"""`run_ranks`: call a function on every rank of a small gloo world.

Importing torch, megatron and transformers costs seconds a process, so the ranks are a pool of
spawned processes that live as long as the test session; each call makes a fresh process group
among the first `world_size` of them.
"""

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=60)
"""A collective that a peer never joins ends in an error, on the rank that waits, after this."""
GRACE_SECONDS = 5.0
"""How long the other ranks' tracebacks are waited for after the first failure."""


class RankError(AssertionError):
    """A rank raised, died or did not finish in time; the message shows every rank's traceback."""


def run_ranks(fn: Callable, world_size: int, *args, timeout: float = 180.0) -> list[Any]:
    """`fn(*args)` on every rank of a gloo world of `world_size`; the return values in rank order.

    `fn` is a function at the top of an importable module, and arguments and results are pickled
    by value. The default process group is initialized (the rank is `dist.get_rank()`), torch is
    seeded with 0 and uses one thread; afterwards Megatron's parallel state and the group are
    destroyed. Modules stay imported from call to call, so a rank must leave no global changed.

    Raises:
        RankError: a rank raised, died, or was not done within `timeout` seconds. The first rank to
            fail is shown first, and ranks that hang with the stack they hang in.
    """
    workers = _pool(world_size)
    # The store's server lives here, on a port the system chose: no race, and no rank is special.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    call = pickle.dumps((fn, args))
    try:
        for rank, worker in enumerate(workers):
            worker.pipe.send((store.port, rank, world_size, call))
        results, failures = _collect(workers, timeout)
    except BaseException:  # an interrupt: the ranks are in the middle of something
        shutdown_pool()
        raise
    if failures:
        shutdown_pool()  # peers of a failed rank may hang in a collective
        reports = (f"--- rank {rank} of {world_size} ---\n{text}" for rank, text in failures)
        raise RankError(f"{fn.__qualname__} failed\n" + "\n".join(reports))
    return [results[rank] for rank in range(world_size)]


class _Worker:
    """A pool process, the pipe to it, and the file it writes its stack to on SIGUSR1."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.stack = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        self.process = context.Process(
            target=_serve, args=(theirs, self.stack.name), daemon=True, name="rank"
        )
        self.process.start()
        theirs.close()  # so that the worker's death is an EOF here

    def kill(self) -> None:
        """End the process, and what it started: Megatron's checkpointing leaves one behind."""
        assert self.process.pid, "started"
        with suppress(ProcessLookupError):  # where it has not come to lead its group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()

    def hung(self, why: str) -> str:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGUSR1)
        time.sleep(0.2)
        return f"{why}; it was in\n{self.stack.read() or '(no stack: still importing)'}"


_workers: list[_Worker] = []


def _pool(world_size: int) -> list[_Worker]:
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read once, when the child imports torch
    try:
        while len(_workers) < world_size:
            _workers.append(_Worker())
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
    return _workers[:world_size]


@atexit.register
def shutdown_pool() -> None:
    """End the processes; the next call starts new ones."""
    for worker in _workers:
        worker.kill()
    for worker in _workers:
        worker.process.join()
        worker.pipe.close()
        worker.stack.close()
    _workers.clear()


def _collect(
    workers: list[_Worker], timeout: float
) -> tuple[dict[int, Any], list[tuple[int, str]]]:
    results, failures = {}, []
    waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            why = "did not finish" if failures else f"did not finish in {timeout:g} s"
            failures += [(rank, workers[rank].hung(why)) for rank in waiting.values()]
            break
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            try:
                succeeded, value = pickle.loads(workers[rank].pipe.recv())
            except EOFError:
                workers[rank].process.join()
                succeeded, value = False, f"died, exit code {workers[rank].process.exitcode}"
            if succeeded:
                results[rank] = value
            else:
                if not failures:
                    deadline = time.monotonic() + GRACE_SECONDS
                failures.append((rank, value))
    return results, failures


def _serve(pipe: connection.Connection, stack_path: str) -> None:
    """A pool process's life: calls from the pipe until it closes or a call fails."""
    # Daemonic, so that it ends with the session, yet allowed children: dist_checkpointing has some.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.setpgid(0, 0)  # so that they can be ended together
    torch.set_num_threads(1)
    # The suite's rule (pyproject, filterwarnings) holds on every rank.
    warnings.filterwarnings("error", ".*autograd kernel was not registered.*")
    with open(stack_path, "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        while True:
            try:
                port, rank, world_size, call = pipe.recv()
            except EOFError:
                return
            try:
                fn, args = pickle.loads(call)
                reply = pickle.dumps((True, _in_world(port, rank, world_size, fn, args)))
            except BaseException:
                pipe.send(pickle.dumps((False, traceback.format_exc())))
                os._exit(1)  # closes this rank's sockets, so that peers fail now and report too
            pipe.send(reply)


def _in_world(port: int, rank: int, world_size: int, fn: Callable, args: tuple) -> Any:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT
    )
    torch.manual_seed(0)
    result = fn(*args)
    dist.barrier()  # nobody tears down while a peer still works
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None and parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return result
