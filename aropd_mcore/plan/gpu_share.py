"""Split of a machine's GPUs between the ranks and the vLLM servers that the run starts there."""

from collections.abc import Mapping, Sequence

from aropd_mcore.config import Config, ConfigError, RolloutConfig
from aropd_mcore.plan.layout import plan
from aropd_mcore.plan.memory import worst_stage
from aropd_mcore.plan.setup import build_setup

_RESERVED_BYTES = 3e9
"""Memory of a GPU for two CUDA contexts and NCCL's buffers. Assumed."""
_LEAST_SHARE = 0.1


def server_gpus(rollout: RolloutConfig) -> list[str]:
    """Return the GPUs that training must leave to the servers: those in rollout.vllm.devices.

    Empty if the run starts no servers on given GPUs, or they share the GPUs of training.
    """
    if rollout.engine != "vllm" or rollout.is_colocated:
        return []
    return [gpu.strip() for devices in rollout.vllm.devices for gpu in devices.split(",")]


def training_gpus(rollout: RolloutConfig, visible: Sequence[str]) -> list[str]:
    """Return the visible GPUs that no server uses.

    Args:
        visible: names of the GPUs, as in CUDA_VISIBLE_DEVICES.
    Raises:
        ConfigError: the servers use all of them.
    """
    taken = server_gpus(rollout)
    left = [gpu for gpu in visible if gpu not in taken]
    if visible and not left:
        raise ConfigError(
            f"rollout.vllm.devices {_listed(taken)}: the servers use all {len(visible)} GPUs of "
            "this machine, expected some for training; remove GPUs from the setting"
        )
    return left


def check_rank_gpus(rollout: RolloutConfig, used: Mapping[int, str], *, remedy: str) -> None:
    """Check that ranks use no GPU of the servers.

    Args:
        used: rank -> its GPU, for ranks of the machine that has the servers.
        remedy: how to start the ranks on other GPUs, for the message.
    Raises:
        ConfigError: a rank would share its GPU with a server.
    """
    taken = server_gpus(rollout)
    for rank, gpu in used.items():
        if gpu in taken:
            raise ConfigError(
                f"rollout.vllm.devices {_listed(taken)}: rank {rank} would train on GPU {gpu}, "
                f"which a server uses; {remedy}"
            )


def suggest_share(config: Config, visible: Sequence[str]) -> str | None:
    """Describe the layout that trains on the most GPUs and leaves the others to the servers.

    Args:
        visible: names of this machine's GPUs.
    Returns:
        None if the settings fit no number of GPUs that leaves room for one server.
    """
    size = len(config.rollout.vllm.devices[0].split(","))  # GPUs per server
    for count in range(len(visible) - size, 0, -1):
        try:
            plan(config, count)
        except ValueError:
            continue
        rest = visible[count:]
        servers = [",".join(rest[i : i + size]) for i in range(0, len(rest) - size + 1, size)]
        quoted = ", ".join(f'"{devices}"' for devices in servers)
        return (
            f"{count} + {len(servers) * size} of {len(visible)} GPUs would fit: "
            f"rollout.vllm.servers={len(servers)} 'rollout.vllm.devices=[{quoted}]' "
            f"--nproc-per-node {count}"
        )
    return None


def server_memory_share(config: Config, world_size: int, memory_bytes: int) -> float:
    """Return the share of a GPU's memory that servers on the GPUs of training may use.

    It is what the training state leaves: weights, optimizer and teacher. Activations and gradients
    do not count, since the servers sleep while the model trains.

    Args:
        memory_bytes: memory of a GPU.
    Raises:
        ConfigError: the training state leaves less than a tenth of the GPU.
    """
    parts = worst_stage(build_setup(config, world_size)).state
    state = sum(num_bytes for name, num_bytes in parts.items() if name != "gradients")
    share = 1 - (state + _RESERVED_BYTES) / memory_bytes
    if share < _LEAST_SHARE:
        raise ConfigError(
            f"rollout.vllm.placement colocated: training keeps {state / 1e9:.1f} GB on a GPU of "
            f"{memory_bytes / 1e9:.1f} GB, expected at least {_LEAST_SHARE:.0%} for a server; "
            "split the model over more ranks, or set placement to separate"
        )
    return share


def _listed(gpus: Sequence[str]) -> str:
    return ", ".join(gpus)
