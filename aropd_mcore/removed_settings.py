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


def drop_removed(tree: dict[str, Any], where: str) -> None:
    """Delete the defaults of removed keys from a configuration as YAML holds it.

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


def is_removed_default(key: str, value: Any) -> bool:
    """Whether `value` is the default of a removed key."""
    return key in REMOVED_KEYS and value == REMOVED_KEYS[key][0]


def _refuse(where: str, key: str, what: str, value: Any, instead: str) -> None:
    shown = json.dumps(value, default=str)
    raise ConfigError(f"{where}: {key}: found {shown}, a {what} that was removed; {instead}")
