"""Measured and assumed constants of the plan, from constants.yaml."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from aropd_mcore.yaml_core import parse_yaml

_SOURCES = {
    "reasoned": {"value", "reasoned"},
    "measured": {"value", "measured", "machine", "versions", "date", "command"},
}


@dataclass(frozen=True)
class Value:
    """A number and its source."""

    number: float
    machine: str | None
    """Machine that it was measured on; None if it is assumed."""
    source: str
    """Measurement or reason."""


@dataclass(frozen=True)
class Constant:
    """A range, and the value in it that is used where one number is needed."""

    unit: str
    low: Value
    high: Value
    used: Value | None = None


@functools.cache
def constants() -> Mapping[str, Constant]:
    """Return the constants by name."""
    where = files("aropd_mcore.plan") / "constants.yaml"
    tree: dict[str, dict[str, Any]] = parse_yaml(where.read_text(), "constants.yaml")
    return {name: _constant(name, entry) for name, entry in tree.items()}


def used(name: str) -> float:
    """Return the value of a constant that is used where one number is needed."""
    value = constants()[name].used
    assert value is not None, name
    return value.number


def _constant(name: str, entry: dict[str, Any]) -> Constant:
    values = {key: _value(f"{name}.{key}", v) for key, v in entry.items() if key != "unit"}
    constant = Constant(unit=entry["unit"], **values)
    middle = constant.low if constant.used is None else constant.used
    assert constant.low.number <= middle.number <= constant.high.number, name
    return constant


def _value(name: str, entry: dict[str, Any]) -> Value:
    kind = "measured" if "measured" in entry else "reasoned"
    assert entry.keys() == _SOURCES[kind], f"{name}: expected {sorted(_SOURCES[kind])}"
    return Value(float(entry["value"]), entry.get("machine"), entry[kind])
