"""A run's configuration from YAML with dotted overrides, and back to YAML.

Unknown keys are refused with the nearest known name.
"""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from aropd_mcore.config import Config, ConfigError, Section

T = TypeVar("T", bound=Section)


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """The YAML file at `path` with dotted overrides such as `optimizer.lr=1e-5` applied.

    Values of overrides are YAML too: `objective.residual_clip=null`, `data.train=[a.jsonl]`.

    Raises:
        ConfigError: no such file, broken YAML, an unknown key (with the nearest known name), a
            missing key, or a value out of range; the message names the key and the value.
    """
    try:
        tree = _parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(tree).__name__}")
    for override in overrides or []:
        _apply_override(tree, override)
    return validated(Config, tree, str(path))


def validated(section: type[T], values: dict, where: str) -> T:
    """A section with these values; `where` opens the message of a ConfigError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from error


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: `1e-5` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error


def _apply_override(tree: dict, override: str) -> None:
    dotted, equals, value = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    *sections, key = dotted.split(".")
    for depth, section in enumerate(sections):
        node = tree.setdefault(section, {})
        if not isinstance(node, dict):
            name = ".".join(sections[: depth + 1])
            raise ConfigError(f"override {override!r}: {name} is a value, not a section")
        tree = node
    tree[key] = _parse_yaml(value, f"override {override!r}")


def _explain(error: ValidationError, path: str) -> str:
    lines = []
    for problem in error.errors():
        location = problem["loc"]
        key = ".".join(str(part) for part in location) or "(top level)"
        if problem["type"] == "extra_forbidden":
            known = _known_keys(location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"{key}: unknown key; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: required, and missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if problem["type"] == "value_error" else f", found {problem['input']!r}"
            lines.append(f"{key}: {message}{found}")
    return f"{path}: " + "\n  ".join(lines)


def _known_keys(sections: tuple) -> list[str]:
    model: Any = Config
    for name in sections:
        model = model.model_fields[name].annotation
    return list(model.model_fields)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loading it again gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
