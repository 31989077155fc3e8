"""A vLLM server as a child process, which ends with this process."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from aropd_mcore.config import Config, ConfigError, RolloutConfig
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.rollout.vllm_api import HERE, KEY_VARIABLE, server_command, server_environment

_TAIL_LINES = 30
_STOP_SECONDS = 30.0


class ServerProcess:
    """The server's process, under a watchdog that ends it when this process ends."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        """
        Args:
            log: file to which the server's output is appended.
        """
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        watchdog = [sys.executable, "-I", str(HERE / "aropd_watchdog.py"), str(os.getpid())]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*watchdog, *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches only the run
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def why_ended(self) -> str:
        """Return the exit code and the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        end = "\n  ".join(lines)
        return f"it ended with code {self._process.returncode}; the end of {self.log}:\n  {end}"

    def stop(self) -> None:
        """End the process and wait for it."""
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Serving:
    """Settings of an engine and of the servers that it starts."""

    rollout: RolloutConfig
    model: Path
    """Whole HF folder that a server starts with."""
    dtype: str
    """As model.dtype in a run's config."""
    max_prompt_tokens: int
    folder: Path
    """Folder of the servers' logs, and of the weights unless rollout.vllm.weights_dir is set."""

    @classmethod
    def from_config(cls, config: Config) -> "Serving":
        """Build the settings of a run's engine."""
        model, longest = config.model, config.views.max_prompt_tokens
        return cls(config.rollout, model.path, model.dtype, longest, config.output_dir)


def server_launch(
    serving: Serving, key: str, index: int, port: int
) -> tuple[list[str], dict[str, str]]:
    """Build the command and the environment of server `index`.

    Raises:
        ValueError: the model's config.json cannot be read.
    """
    vllm, dtype = serving.rollout.vllm, serving.dtype
    longest = serving.max_prompt_tokens + serving.rollout.max_response_tokens
    room = read_architecture(serving.model).max_position_embeddings
    if dtype == "auto":
        dtype = "bf16" if torch.cuda.is_available() else "fp32"
    command = server_command(
        vllm, serving.model, dtype=dtype, max_length=min(longest, room), port=port
    )
    devices = vllm.devices[index] if vllm.devices else None
    return command, server_environment(vllm, key, devices=devices)


def start_server(serving: Serving, key: str, index: int) -> tuple[str, ServerProcess]:
    """Start server `index`; return its URL and its process, which is not ready yet.

    Its output goes to vllm-INDEX.log in serving.folder.
    """
    host, port = serving.rollout.vllm.host, serving.rollout.vllm.port
    port = port + index if port else _free_port(host)
    command, environment = server_launch(serving, key, index, port)
    log = serving.folder / f"vllm-{index}.log"
    return f"http://{host}:{port}", ServerProcess(command, environment, log)


def serve(config: Config) -> NoReturn:
    """Replace this process by the first server of a run.

    The key is $VLLM_API_KEY, or a new one that is printed.

    Raises:
        ConfigError: rollout.vllm.port is not set.
        OSError: the interpreter does not exist.
    """
    vllm = config.rollout.vllm
    if not vllm.port:
        raise ConfigError("rollout.vllm.port 0: expected a port, such as 8000, to serve by hand")
    key = os.environ.get(KEY_VARIABLE) or new_key()
    command, environment = server_launch(Serving.from_config(config), key, 0, vllm.port)
    print(f"serving {config.model.path} at http://{vllm.host}:{vllm.port}")
    if KEY_VARIABLE not in os.environ:
        print(f"set the key where the run starts: export {KEY_VARIABLE}={key}")
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def _free_port(host: str) -> int:
    """Return a port that is free now. If another process takes it, the server is restarted."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def new_key() -> str:
    """Create a key for the servers of this run."""
    return secrets.token_urlsafe(32)
