"""YAML for configurations: the core schema of YAML 1.2, with unique keys.

    true, false              booleans; `on`, `off`, `yes` and `no` are strings
    32, 032, 0o40, 0x20      integers; all four are 32
    1e-5, .5, 1., .inf       floats
    null, ~, (empty)         null
    2026-11-28, 1:30, 1_000  strings

PyYAML reads YAML 1.1: `off` is false, 032 is 26, 1:30 is 90, and a repeated key silently drops its
first value. This module therefore uses PyYAML's parser only, and converts the parsed nodes to
values by the table below.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from aropd_mcore.config import ConfigError

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_MAX_VALUES = 100_000
"""Limit on the values of one document: aliases of aliases can expand a small text without bound."""


def _integer(text: str) -> int:
    bases = {"0o": 8, "0x": 16}
    return int(text, bases.get(text[:2], 10))


def _float(text: str) -> float:
    special = text.lower().lstrip("+-")
    return float(text.replace(".", "", 1)) if special in (".inf", ".nan") else float(text)


_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    # tag: (pattern of its plain scalars, first characters of these, conversion to a value)
    "null": (r"~|null|Null|NULL|", "~nN\0", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _integer),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
        _float,
    ),
    "str": (r"(?s:.*)", "", str),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's loader without the plain scalars of YAML 1.1."""


_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which quotes each string that YAML 1.1 or this module would read as another
    type."""


for _name, (_pattern, _first, _) in _SCALARS.items():
    if _first:
        _resolver = re.compile(rf"^(?:{_pattern})\Z")
        _firsts = ["" if character == "\0" else character for character in _first]
        _Loader.add_implicit_resolver(_TAG + _name, _resolver, _firsts)
        _Dumper.add_implicit_resolver(_TAG + _name, _resolver, _firsts)
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<\Z"), ["<"])


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document into dicts with string keys, lists and scalars.

    Every alias of an anchor becomes a separate copy of its value. Merge keys (`<<`) are applied,
    and the mapping's own keys take precedence over merged ones.

    Args:
        where: start of error messages, such as the file's name.
    Raises:
        ConfigError: the text is not YAML, or has a repeated key in a mapping, a key that is not a
            string, a tag outside the core schema, more than one document, or an alias within its
            own anchor. The message names the line.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _NodeConverter(where).convert(node)
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        if isinstance(error, ComposerError) and error.context and error.problem:
            problem = f"{error.context}, {error.problem}"  # the two halves of one sentence
        raise _not_yaml(where, mark.line if mark else 0, str(problem)) from error
    except yaml.reader.ReaderError as error:
        character = f"character {chr(error.character)!a}: {error.reason}"
        raise _not_yaml(where, text.count("\n", 0, error.position), character) from error
    except RecursionError as error:
        raise ConfigError(f"{where}: found too many levels of nesting; expected a few") from error
    except (ValueError, OverflowError) as error:  # raised by PyYAML, for example for "\UFFFFFFFF"
        raise ConfigError(f"{where}: not YAML: {error}") from error


def dump_yaml(tree: Any) -> str:
    """Write a tree as YAML, with its keys in order. `parse_yaml` reads it as an equal tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _not_yaml(where: str, line: int, problem: str) -> ConfigError:
    return ConfigError(f"{where}: not YAML: line {line + 1}: {problem}")


class _NodeConverter:
    """Converts the nodes of one document to values."""

    def __init__(self, where: str):
        self._where = where
        self._num_values = 0
        self._open = set[int]()
        """Ids of the nodes that contain the current node."""

    def convert(self, node: Node) -> Any:
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise self._error(node, f"found more than {_MAX_VALUES} values, aliases included")
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        kind = "map" if isinstance(node, MappingNode) else "seq"
        if node.tag != _TAG + kind:
            raise self._error(node, f"unknown tag {_shown(node.tag)}; remove it")
        if id(node) in self._open:
            raise self._error(node, "found an alias inside the value of its own anchor; remove it")
        self._open.add(id(node))
        if isinstance(node, MappingNode):
            value = self._mapping(node)
        else:
            assert isinstance(node, SequenceNode)
            value = [self.convert(item) for item in node.value]
        self._open.remove(id(node))
        return value

    def _scalar(self, node: ScalarNode) -> Any:
        text: str = node.value
        # A plain << that is not a key is ordinary text.
        name = "str" if node.tag == _MERGE else node.tag.removeprefix(_TAG)
        if name not in _SCALARS:
            raise self._error(node, f"unknown tag {_shown(node.tag)}; remove it")
        pattern, _, convert = _SCALARS[name]
        if not re.fullmatch(pattern, text):
            raise self._error(node, f"found {_shown(text)}, expected a value of tag {name}")
        if not _is_text(text):
            raise self._error(
                node, f"found {_shown(text)}, expected Unicode text without NUL characters"
            )
        try:
            return convert(text)
        except ValueError as error:  # more than 4300 digits
            raise self._error(node, f"the number {_shown(text)} has too many digits") from error

    def _mapping(self, node: MappingNode) -> dict[str, Any]:
        lines, values, merged = dict[str, int](), dict[str, Any](), dict[str, Any]()
        for key_node, value_node in node.value:
            is_merge = key_node.tag == _MERGE
            key = "<<" if is_merge else self.convert(key_node)
            if not isinstance(key, str):
                raise self._error(key_node, f"found key {_shown(key)}, expected a name as key")
            if key in lines:
                raise self._error(
                    key_node,
                    f"found key {_shown(key)} a second time, first in line {lines[key]}; "
                    "join the two or remove one",
                )
            lines[key] = key_node.start_mark.line + 1
            if is_merge:
                for mapping in self._merged(value_node):
                    merged = mapping | merged  # the first of several mappings takes precedence
            else:
                values[key] = self.convert(value_node)
        return merged | values

    def _merged(self, node: Node) -> Iterator[dict[str, Any]]:
        sources = node.value if isinstance(node, SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, MappingNode):
                raise self._error(source, "expected a mapping or a list of mappings after <<")
            yield self.convert(source)

    def _error(self, node: Node, problem: str) -> ConfigError:
        return ConfigError(f"{self._where}: line {node.start_mark.line + 1}: {problem}")


def _is_text(text: str) -> bool:
    """Return whether a text can be encoded and has no NUL: an escape can spell a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
