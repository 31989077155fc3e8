"""`run_ranks`: call a function on every rank of a small gloo world.

Importing torch, megatron and transformers takes seconds per process. The ranks are therefore a pool
of spawned processes that live until the end of the test session. Each call creates a process group
of the first `world_size` processes.
"""

import atexit
import faulthandler
import gc
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
"""Timeout of collectives, after which a rank that waits for a missing peer raises an error."""
IMPORT_TIMEOUT = timedelta(seconds=600)
"""Time for a peer to import a test module."""
GRACE_SECONDS = 5.0
"""Time to wait for the other ranks' tracebacks after the first failure."""


class RankError(AssertionError):
    """Error: a rank raised, died or timed out. The message has every rank's traceback."""


def run_ranks(fn: Callable, world_size: int, *args, timeout: float = 180.0) -> list[Any]:
    """Call `fn(*args)` on every rank of a gloo world, and return the results in rank order.

    On each rank the default process group is initialized, torch is seeded with 0 and torch uses one
    thread. Afterwards Megatron's parallel state and the group are destroyed. Modules remain
    imported between calls, so `fn` must restore all globals that it changes.

    Args:
        fn: a module-level function of an importable module. Arguments and results are pickled.
        timeout: time limit of the call in seconds.
    Raises:
        RankError: a rank raised, died, or did not finish in time. The first rank that failed comes
            first. A rank that hangs is reported with its stack.
    """
    workers = _pool(world_size)
    # The store's server is in this process, on a port that the system chose: there is no race, and
    # all ranks are clients.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    call = pickle.dumps((fn, args))
    try:
        for rank, worker in enumerate(workers):
            worker.pipe.send((store.port, rank, world_size, call))
        results, failures = _collect(workers, timeout)
    except BaseException:  # an interrupt, during which the ranks are still running
        shutdown_pool()
        raise
    if failures:
        shutdown_pool()  # peers of a failed rank may hang in a collective
        reports = (f"--- rank {rank} of {world_size} ---\n{text}" for rank, text in failures)
        raise RankError(f"{fn.__qualname__} failed\n" + "\n".join(reports))
    return [results[rank] for rank in range(world_size)]


class _Worker:
    """A pool process, the pipe to it, and the file to which it writes its stack on SIGUSR1."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, worker_pipe = context.Pipe()
        self.stack = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        self.process = context.Process(
            target=_serve, args=(worker_pipe, self.stack.name), daemon=True, name="rank"
        )
        self.process.start()
        worker_pipe.close()  # so that the worker's death is an EOF here

    def kill(self) -> None:
        """Kill the process and its children. Megatron's checkpointing leaves a child behind."""
        assert self.process.pid, "started"
        with suppress(ProcessLookupError):  # it may not lead its process group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()

    def report_hang(self, reason: str) -> str:
        """Return the reason with the stack of the process."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGUSR1)
        time.sleep(0.2)
        return f"{reason}; stack:\n{self.stack.read() or '(no stack: still importing)'}"


_workers: list[_Worker] = []


def _pool(world_size: int) -> list[_Worker]:
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the child imports torch
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
    """End the processes. The next call starts new ones."""
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
            reason = "did not finish" if failures else f"did not finish in {timeout:g} s"
            failures += [(rank, workers[rank].report_hang(reason)) for rank in waiting.values()]
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
    """Serve calls from the pipe until it closes or a call fails. Runs in a pool process."""
    # The process is daemonic, so that it ends with the test session. dist_checkpointing starts
    # children, which multiprocessing forbids to daemonic processes.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.setpgid(0, 0)  # so that the process and its children can be killed together
    torch.set_num_threads(1)
    # The filter of pyproject.toml (filterwarnings), for the ranks.
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
                os._exit(1)  # closes this rank's sockets, so that its peers fail and report too
            pipe.send(reply)


def _in_world(port: int, rank: int, world_size: int, fn: Callable, args: tuple) -> Any:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    # A rank arrives after it has imported the modules of `fn`. On a busy machine that takes longer
    # than the timeout of the group.
    store.set(f"arrived/{rank}", "")
    store.wait([f"arrived/{peer}" for peer in range(world_size)], IMPORT_TIMEOUT)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT
    )
    torch.manual_seed(0)
    result = fn(*args)
    dist.barrier()  # wait for peers before the groups are destroyed
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None and parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    # Models are in cycles and hold groups, whose threads wake 100 times per second: 400 groups that
    # are left behind take half a core.
    gc.collect()
    return result
