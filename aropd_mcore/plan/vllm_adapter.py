"""The adapters that vLLM serves. Written from vLLM 0.32's source."""

from aropd_mcore.convert.adapter import AdapterSpec, adapted_modules
from aropd_mcore.convert.architecture import Architecture

_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank."""


def served_adapter(spec: AdapterSpec, architecture: Architecture) -> tuple[int, list[str]]:
    """Return the values of vLLM's --max-lora-rank and --lora-target-modules for an adapter.

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
    return ranks[0], [*spec.targets, *(["experts"] if of_experts and not missing else [])]
