"""Settings of earlier versions, and what to use instead of them."""

import json
from typing import Any

from aropd_mcore.config import ConfigError

REMOVED_KEYS: dict[str, tuple[Any, str]] = {
    "parallel.overlap_param_gather": (
        False,
        "remove the key; updated parameters are gathered right after the update",
    ),
}
"""Key -> its default, and what to do about another value.

The config.yaml of an earlier version's run states every default, so the default is ignored."""

REMOVED_VALUES: dict[tuple[str, str], str] = {
    ("rollout.engine", "megatron"): (
        "expected vllm, the fast engine, or native, which samples in every layout"
    ),
}
"""A removed value of a key that is still there -> what to use now."""

RENAMED_VALUES: dict[tuple[str, str], str] = {("views.partial_cut", "word_end"): "words"}
"""A key and a value's earlier name -> its name. Earlier versions' config.yaml have such values."""


def drop_removed(tree: dict[str, Any], where: str) -> None:
    """Delete the defaults of removed keys from a configuration as YAML holds it, and rename values.

    Args:
        where: opens the message of an error.
    Raises:
        ConfigError: a removed key has another value than its default, or a key a removed value.
    """
    for name, section in tree.items():
        for key, value in list(section.items()) if isinstance(section, dict) else ():
            dotted = f"{name}.{key}"
            if is_removed_default(dotted, value):
                del section[key]
            elif dotted in REMOVED_KEYS:
                _refuse(where, dotted, "key", value, REMOVED_KEYS[dotted][1])
            elif isinstance(value, str) and (dotted, value) in REMOVED_VALUES:
                _refuse(where, dotted, "value", value, REMOVED_VALUES[dotted, value])
            else:
                section[key] = renamed_value(dotted, value)


def is_removed_default(key: str, value: Any) -> bool:
    """Whether `value` is the default of a removed key."""
    return key in REMOVED_KEYS and value == REMOVED_KEYS[key][0]


def renamed_value(key: str, value: Any) -> Any:
    """Return the current name of a key's value."""
    return RENAMED_VALUES.get((key, value), value) if isinstance(value, str) else value


def _refuse(where: str, key: str, what: str, value: Any, instead: str) -> None:
    shown = json.dumps(value, default=str)
    raise ConfigError(f"{where}: {key}: found {shown}, a {what} that was removed; {instead}")
