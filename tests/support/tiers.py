"""Detection of tests that start processes, by the functions that they can call."""

import inspect
import types
from collections.abc import Iterator
from typing import Any

import pytest

STARTERS = frozenset({"run_ranks", "Job", "subprocess", "chromium", "slurm"})
"""Names of modules, classes and functions that start processes."""


def starts_processes(item: pytest.Item) -> bool:
    """Return whether the test, or one of its fixtures, can call a function of STARTERS."""
    function = getattr(item, "function", None)
    if function is None:
        return False
    definitions = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
    functions = [function, *(definition.func for several in definitions for definition in several)]
    seen: set[types.CodeType] = set()
    return any(_reaches(inspect.unwrap(function), seen) for function in functions)


def _reaches(function: Any, seen: set[types.CodeType]) -> bool:
    code = getattr(function, "__code__", None)
    if code is None or code in seen or not function.__module__.startswith("tests."):
        return False
    seen.add(code)
    names = set(_names(code))
    if names & STARTERS:
        return True
    # Only module-level functions are followed, not methods.
    reached = [function.__globals__.get(name) for name in names]
    reached += [inspect.unwrap(value) for value in reached if hasattr(value, "__wrapped__")]
    return any(_reaches(value, seen) for value in reached if isinstance(value, types.FunctionType))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
