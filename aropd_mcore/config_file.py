"""A run's configuration from YAML with a preset and dotted overrides, and back to YAML.

One reader (yaml_core) parses files and overrides. An unknown key is an error that suggests the
nearest known key. Precedence: defaults < YAML file < preset < overrides.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from aropd_mcore.config import Config, ConfigError, Section, ViewsConfig
from aropd_mcore.removed_settings import drop_removed
from aropd_mcore.yaml_core import dump_yaml, parse_yaml

T = TypeVar("T", bound=Section)

_PRESETS = Path(__file__).with_name("presets")
PRESETS = tuple(sorted(path.stem for path in _PRESETS.glob("*.yaml")))
"""Names of the presets: YAML files of settings that the package ships."""


def load_config(
    path: Path, overrides: list[str] | None = None, *, preset: str | None = None
) -> Config:
    """Load the YAML file at `path`, then apply a preset, then overrides like `optimizer.lr=1e-5`.

    Values of overrides are YAML: `objective.residual_clip=null`, `data.train=[a.jsonl]`. If a key
    has several overrides, the last one applies.

    Args:
        preset: one of PRESETS.
    Raises:
        ConfigError: no such file, broken YAML, a key given twice, an unknown key (with the nearest
            known name), a removed setting (with what to use now), a missing key, a value out of
            range, or an unknown preset; the message names the key and the value.
    """
    tree = _read(path)
    if preset is not None:
        for key, value in _preset_settings(preset).items():
            _set(tree, key, value, f"preset {preset}")
    for override in overrides or []:
        where = f"override {_shown(override)}"
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{where}: expected section.key=value")
        _set(tree, key, parse_yaml(value, where), where)
    drop_removed(tree, str(path))
    return validated(Config, tree, str(path))


def preset_changes(path: Path, preset: str, config: Config) -> list[str]:
    """Describe the settings that a preset changes in a run, one line per setting.

    Args:
        path: the run's YAML file.
        config: the result of `load_config` for this file, the preset and the overrides.
    Returns:
        Lines `key: value before -> value of the preset`, where the value before is the file's or
        the default. Settings that the preset leaves equal are omitted. If an override replaces the
        preset's value, the line ends with the override's value.
    """
    tree, resolved = _read(path), config.model_dump(mode="json")
    lines = []
    for dotted, value in _preset_settings(preset).items():
        section, key = dotted.split(".")
        before = (tree.get(section) or {}).get(key, _default(section, key))
        if before == value:
            continue
        line = f"{dotted}: {json.dumps(before)} -> {json.dumps(value)}"
        if (final := resolved[section][key]) != value:
            line += f", replaced by an override: {json.dumps(final)}"
        lines.append(line)
    return lines


def _preset_settings(preset: str) -> Mapping[str, Any]:
    """Read a preset as {dotted key: value}."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {_shown(preset)}: expected one of {', '.join(PRESETS)}")
    tree = _read(_PRESETS / f"{preset}.yaml")
    return {f"{section}.{key}": v for section, keys in tree.items() for key, v in keys.items()}


def _default(section: str, key: str) -> Any:
    model: Any = Config.model_fields[section].annotation
    return model.model_fields[key].default


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    if tree is None:
        raise ConfigError(f"{path}: the file has no settings; expected a mapping at the top level")
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise ConfigError(f"{path}: found {kind} at the top level, expected a mapping")
    return tree


def validated(section: type[T], values: dict, where: str) -> T:
    """Build a section from `values`. The message of a ConfigError starts with `where`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from error


def with_template_arguments(views: ViewsConfig, arguments: Mapping[str, Any]) -> ViewsConfig:
    """Return `views` with further chat_template_kwargs, which replace those of the same name.

    Raises:
        ConfigError: the value of an argument is neither a string, a number nor a boolean.
    """
    values = views.model_dump()
    values["chat_template_kwargs"] |= arguments
    return validated(ViewsConfig, values, "--chat-template-kwargs")


def _set(tree: dict, dotted: str, value: Any, where: str) -> None:
    """Set the value of a dotted key. The message of a ConfigError starts with `where`."""
    *sections, key = dotted.split(".")
    for depth, section in enumerate(sections):
        if tree.get(section) is None:  # absent, or an empty section
            tree[section] = {}
        node = tree[section]
        if not isinstance(node, dict):
            name = _printable(".".join(sections[: depth + 1]))
            raise ConfigError(f"{where}: {name} is a value, not a section")
        tree = node
    tree[key] = value


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
            lines.append(f"{key}: missing; this key is required")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            is_complete = problem["type"] == "value_error"
            found = "" if is_complete else f", found {_shown(problem['input'])}"
            lines.append(f"{key}: {message}{found}")
    return f"{path}: " + "\n  ".join(lines)


def _printable(text: str) -> str:
    """Escape a text that a terminal would not show in one line."""
    return _shortened(text if text.isprintable() else ascii(text))


def _shown(value: Any) -> str:
    try:
        return _shortened(repr(value))
    except ValueError:  # Python refuses to print an integer of more than 4300 digits
        return f"{type(value).__name__} of thousands of digits"


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _known_keys(sections: tuple) -> list[str]:
    model: Any = Config
    for name in sections:
        # Other parts are numbers of a list's entries, and names of a mapping's.
        if name in model.model_fields:
            model = _section_in(model.model_fields[name].annotation)
    return list(model.model_fields)


def _section_in(annotation: Any) -> Any:
    """Return the Section in an annotation such as list[Path | Section], or None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def dump_config(config: Config) -> str:
    """Write the resolved configuration as YAML. Loading this YAML gives an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))
