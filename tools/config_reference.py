"""Write docs/configuration-reference.md from the settings of aropd_mcore/config.

python tools/config_reference.py
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aropd_mcore.config import Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration-reference.md"
_HEAD = """\
# Configuration reference

<!-- Written by tools/config_reference.py from aropd_mcore/config. Do not edit. -->

Every setting of a run, by section. A setting without a default is required. Paths are relative to
the working directory. [Configuration](configuration.md) explains files, overrides and presets.
"""
_BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}
Schema = Mapping[str, Any]


def render() -> str:
    """Return the page as Markdown."""
    schema = Config.model_json_schema()
    sections, own_settings = {}, {}
    for name, setting in schema["properties"].items():
        choices = setting.get("anyOf", [setting])  # a section that may be null
        if "$ref" in choices[0]:
            sections[name] = _resolved(choices[0], schema)
        else:
            own_settings[name] = setting
    parts = [_HEAD, *_settings("", own_settings, schema)]
    for name, section in sections.items():
        parts += _section(name, section, schema)
    return "\n".join(parts)


def _section(name: str, section: Schema, schema: Schema) -> Iterator[str]:
    yield f"## {name}\n"
    if text := section.get("description"):
        yield f"{_one_line(text)}\n"
    nested = {key for key, setting in section["properties"].items() if "$ref" in setting}
    plain = {key: s for key, s in section["properties"].items() if key not in nested}
    yield from _settings(f"{name}.", plain, section)
    for key in sorted(nested):
        yield from _section(f"{name}.{key}", _resolved(section["properties"][key], schema), schema)


def _settings(prefix: str, settings: Schema, section: Schema) -> Iterator[str]:
    for name, setting in settings.items():
        yield f"### `{prefix}{name}`\n"
        if name in section.get("required", ()):
            default = "Required."
        else:
            default = f"Default: `{_yaml(setting['default'])}`."
        yield f"Type: {_type(setting)}. {default}\n"
        yield f"{_one_line(setting['description'])}\n"


def _resolved(setting: Schema, schema: Schema) -> Schema:
    return schema["$defs"][setting["$ref"].rpartition("/")[2]]


def _type(setting: Schema, plural: str = "") -> str:
    """Describe the values that a setting accepts.

    Args:
        plural: ending of the type's name.
    """
    if choices := setting.get("anyOf"):
        separator = " or " if plural else ", "
        return separator.join(_type(choice, plural) for choice in choices)
    if "$ref" in setting:
        return f"mapping{plural}"
    if "enum" in setting:
        return ", ".join(f"`{value}`" for value in setting["enum"]) + plural
    if "const" in setting:
        return f"`{setting['const']}`"
    if setting["type"] == "null":
        return "`null`"
    if setting["type"] == "array":
        return f"list of {_type(setting['items'], 's')}"
    name = "path" if setting.get("format") == "path" else setting["type"]
    bounds = [f"{word} {setting[key]:g}" for key, word in _BOUNDS.items() if key in setting]
    return f"{name}{plural} {' and '.join(bounds)}".strip()


def _yaml(value: Any) -> str:
    """Return a default value in YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
