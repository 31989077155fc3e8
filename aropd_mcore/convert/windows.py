"""Sliding-window attention as config.json describes it."""

from dataclasses import dataclass

from aropd_mcore.convert.families import Family
from aropd_mcore.convert.json_file import JsonObject

_KINDS = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True)
class Windows:
    """Sliding windows of a model's attention."""

    size: int
    """Number of tokens that each token attends to, including itself."""
    layers: tuple[bool, ...]
    """Whether each layer has a window. The other layers attend to all previous tokens."""


def read_windows(config: JsonObject, family: Family, num_layers: int) -> Windows | None:
    """Read the windows. None if every layer attends to all previous tokens.

    Raises:
        CheckpointError: a value is out of range, or of a type that the family does not have.
    """
    size = config.get("sliding_window", family.defaults.sliding_window)
    rule = family.windows
    if size is not None and not (rule is None and type(size) is int and size == 0):
        # transformers 5 writes 0 for families without windows.
        size = config.size("sliding_window", default=size)
    if rule is None or (rule.has_switch and not config.is_set("use_sliding_window", False)):
        size = None
    layers = [size is not None] * num_layers
    if size is not None and rule is not None and rule.per_layer:
        first = config.get("max_window_layers", 28)
        layers = [number >= first for number in range(num_layers)]
        if rule.alternates:
            layers = [number % 2 == 0 for number in range(num_layers)]
    types = config.get("layer_types")
    if types is not None:
        listed = [_KINDS.get(kind) if isinstance(kind, str) else None for kind in types]
        free = size is not None and rule is not None and rule.per_layer
        if None in listed or len(listed) != num_layers or not (free or listed == layers):
            allowed = [name for name, windowed in _KINDS.items() if free or windowed in layers]
            other = [str(kind) for kind in types if kind not in allowed]
            raise config.error(
                f"layer_types has {', '.join(other[:3]) or f'{len(types)} entries'}; expected "
                f"{' or '.join(allowed)}, with one entry per layer (num_hidden_layers {num_layers})"
                f"{'' if size is not None else '; no window is set by use_sliding_window'}"
            )
        layers = [bool(windowed) for windowed in listed]
    return Windows(size, tuple(layers)) if size is not None and any(layers) else None
