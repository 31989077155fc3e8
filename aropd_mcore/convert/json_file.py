"""Strict reading of JSON files from other programs, with errors of one line."""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_SIZE = 2**31 - 1
"""Largest size in a config.json: kernels and other readers use 32-bit integers."""
_NAMES = {
    bool: "true or false",
    dict: "an object",
    float: "a number with a decimal point",
    int: "an integer",
    list: "a list",
    str: "a string",
    type(None): "null",
}
_REPR = reprlib.Repr()
_REPR.maxdict = _REPR.maxlist = 8
_REPR.maxstring = _REPR.maxother = 100


class CheckpointError(ValueError):
    """Error: a checkpoint or HF folder cannot be used.

    The message names the file, the key or tensor, and the remedy. It is one printable line of
    limited length, whatever the files contain.
    """

    def __init__(self, message: str):
        if len(message) > 2500:
            message = f"{message[:1500]} ... {message[-500:]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def brief(value: Any) -> str:
    """Return the repr of a JSON value, shortened if it is long or deep."""
    return _REPR.repr(value)


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from pairs, as object_pairs_hook of json.loads.

    Raises:
        ValueError: a key has two different values.
    """
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and repr(values[key]) != repr(value):
            raise ValueError(
                f"the key {brief(key)} occurs twice, as {brief(values[key])} and as {brief(value)}"
            )
        values[key] = value
    return values


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON in UTF-8, or gives one key two values.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error


def same_value(a: Any, b: Any) -> bool:
    """Return whether two JSON values are equal: 1 equals 1.0, but true does not equal 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


class JsonObject:
    """A JSON object whose values are checked for type and range when they are read.

    The methods raise CheckpointError. The message names the file and the key.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        """
        Args:
            where: name of the file in errors.
            prefix: prefix of the keys in errors, such as `rope_parameters.` for a nested object.
        """
        self.values = values
        self.where = where
        self.prefix = prefix
        self.keys_read: set[str] = set()
        """Keys that were read by `get`."""

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return self.values.get(key, default)

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")

    def wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return self.error(f"{self.prefix}{key} is {brief(value)}; expected {expected}")

    def check_types(self, types: Mapping[str, tuple[type, ...]]) -> None:
        """Check the type of each key that is present. true is not an integer."""
        for key, allowed in types.items():
            if key in self.values and type(self.values[key]) not in allowed:
                names = " or ".join(_NAMES[kind] for kind in allowed)
                raise self.wrong(key, self.values[key], names)

    def agree(self, places: Mapping[str, Any], consequence: str) -> Any:
        """Return the common value of all keys for one fact, or None if there are no keys.

        Args:
            places: values by key.
            consequence: behaviour of readers if the keys disagree, for the error.
        """
        items = list(places.items())
        for name, value in items[1:]:
            if not same_value(value, items[0][1]):
                raise self.error(
                    f"{items[0][0]} is {brief(items[0][1])} and {name} is {brief(value)}; "
                    f"{consequence}. Keep the correct one."
                )
        return items[0][1] if items else None

    def is_set(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def size(self, key: str, default: int | None = None, if_null: int | None = None) -> int:
        """Read a positive 32-bit integer.

        Args:
            default: value if the key is missing. None: the key is required.
            if_null: value if the key is null. None: null is refused.
        """
        value = self.get(key, default)
        if value is None and key in self.values:
            value = if_null
        if value is None and key not in self.values:
            raise self.error(f"{self.prefix}{key} is missing")
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise self.wrong(key, value, f"a positive integer up to {MAX_SIZE}")
        return value

    def positive(self, name: str, value: Any) -> float:
        """Convert `value`, the value of key `name`, to a positive finite number."""
        if type(value) in (int, float):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if 0 < number < math.inf:
                return number
        raise self.error(f"{name} is {brief(value)}; expected a positive number")
