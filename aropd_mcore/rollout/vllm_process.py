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
from aropd_mcore.convert.adapter import AdapterSpec
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.gpu_share import server_memory_share
from aropd_mcore.plan.layout import build_adapter_spec
from aropd_mcore.rollout.vllm_command import (
    HERE,
    KEY_VARIABLE,
    adapter_arguments,
    server_command,
    server_environment,
)

_TAIL_LINES = 30
_STOP_SECONDS = 30.0


class ServerProcess:
    """The server's process, under a watchdog that ends it when this process ends."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        scratch: Path | None = None,
    ):
        """
        Args:
            log: file to which the server's output is appended.
            scratch: folder that is removed if this process ends without `stop`.
        """
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        watchdog = [sys.executable, "-I", str(HERE / "aropd_watchdog.py")]
        watchdog += [str(os.getpid()), str(scratch or "")]
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
    max_tokens: int
    """Largest number of tokens of a prompt with its response."""
    folder: Path
    """Folder of the servers' logs, and of the weights unless rollout.vllm.weights_dir is set."""
    scratch: Path | None = None
    """Folder of the weights in the machine's memory, which ends with this process. None: they are
    not in memory."""
    adapter: AdapterSpec | None = None
    """Sizes of the adapter that the servers get after each step. None: they get whole weights."""
    memory_share: float | None = None
    """Share of a GPU's memory for servers on the GPUs of training; see `server_command`."""

    @classmethod
    def from_config(cls, config: Config, world_size: int | None = None) -> "Serving":
        """Build the settings of a run's engine.

        Args:
            world_size: number of ranks of the run. None: nothing trains on the servers' GPUs.
        Raises:
            ConfigError: training leaves too little memory to colocated servers, or the adapter
                does not fit the model.
        """
        model, rollout = config.model, config.rollout
        response = max(rollout.max_response_tokens, config.validation.max_response_tokens or 0)
        longest = config.views.max_prompt_tokens + response
        share = None
        if rollout.is_colocated and world_size and torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory
            share = server_memory_share(config, world_size, memory)
        return cls(
            rollout,
            model.path,
            model.dtype,
            longest,
            config.output_dir,
            adapter=build_adapter_spec(config, read_architecture(model.path)),
            memory_share=share,
        )


def server_launch(
    serving: Serving, key: str, index: int, port: int
) -> tuple[list[str], dict[str, str]]:
    """Build the command and the environment of server `index`.

    Raises:
        ValueError: the model's config.json cannot be read, or vLLM cannot serve the adapter.
    """
    vllm, dtype, adapter = serving.rollout.vllm, serving.dtype, serving.adapter
    architecture = read_architecture(serving.model)
    if dtype == "auto":
        dtype = "bf16" if torch.cuda.is_available() else "fp32"
    command = server_command(
        vllm,
        serving.model,
        dtype=dtype,
        max_length=min(serving.max_tokens, architecture.max_position_embeddings),
        port=port,
        adapter=adapter_arguments(adapter, architecture) if adapter else (),
        receives=torch.cuda.is_available() and adapter is None and vllm.sync != "disk",
        memory_share=serving.memory_share,
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
    return f"http://{host}:{port}", ServerProcess(
        command, environment, log, scratch=serving.scratch
    )


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
