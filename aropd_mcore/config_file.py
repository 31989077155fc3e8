"""A run's configuration from YAML with dotted overrides, and back to YAML.

Files and overrides go through one reader (yaml_core). Unknown keys are refused with the nearest
known name.
"""

import difflib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from aropd_mcore.config import Config, ConfigError, Section
from aropd_mcore.yaml_core import dump_yaml, parse_yaml

T = TypeVar("T", bound=Section)


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Load the YAML file at `path` and apply dotted overrides such as `optimizer.lr=1e-5`.

    Values of overrides are YAML too: `objective.residual_clip=null`, `data.train=[a.jsonl]`. Of
    several overrides of one key the last wins.

    Raises:
        ConfigError: no such file, broken YAML, a key given twice, an unknown key (with the nearest
            known name), a missing key, or a value out of range; the message names the key and the
            value.
    """
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    if tree is None:
        raise ConfigError(f"{path}: the file holds no settings; expected a mapping at the top")
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


def _apply_override(tree: dict, override: str) -> None:
    where = f"override {_shown(override)}"
    dotted, equals, value = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"{where}: expected section.key=value")
    *sections, key = dotted.split(".")
    for depth, section in enumerate(sections):
        if tree.get(section) is None:  # absent, or an empty section
            tree[section] = {}
        node = tree[section]
        if not isinstance(node, dict):
            name = _printable(".".join(sections[: depth + 1]))
            raise ConfigError(f"{where}: {name} is a value, not a section")
        tree = node
    tree[key] = parse_yaml(value, where)


def _explain(error: ValidationError, path: str) -> str:
    lines = []
    for problem in error.errors():
        location = problem["loc"]
        key = _printable(".".join(str(part) for part in location)) or "(top level)"
        if problem["type"] == "extra_forbidden":
            known = _known_keys(location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"{key}: unknown key; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: required, and missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            is_complete = problem["type"] == "value_error"
            found = "" if is_complete else f", found {_shown(problem['input'])}"
            lines.append(f"{key}: {message}{found}")
    return f"{path}: " + "\n  ".join(lines)


def _printable(text: str) -> str:
    """The text, or an escaped form of it where a terminal would not show it in one line."""
    return _shortened(text if text.isprintable() else ascii(text))


def _shown(value: Any) -> str:
    try:
        return _shortened(repr(value))
    except ValueError:  # Python writes no decimal of thousands of digits
        return f"{type(value).__name__} of thousands of digits"


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _known_keys(sections: tuple) -> list[str]:
    model: Any = Config
    for name in sections:
        model = model.model_fields[name].annotation
    return list(model.model_fields)


def dump_config(config: Config) -> str:
    """Write the resolved configuration as YAML; loading it again gives an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))
