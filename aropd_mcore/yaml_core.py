"""YAML as configurations use it: the core schema of YAML 1.2, with unique keys.

    true, false              booleans; `on`, `off`, `yes` and `no` are strings
    32, 032, 0o40, 0x20      integers; all four are 32
    1e-5, .5, 1., .inf       floats
    null, ~, nothing         null
    2026-11-28, 1:30, 1_000  strings

PyYAML reads YAML 1.1: it takes `off` for false, 032 for 26 and 1:30 for 90, and of a key that is
given twice it drops the first value. Here PyYAML parses the text only. Values are made from its
nodes by the table below.
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
"""Aliases of aliases can make a small text very large."""


def _integer(text: str) -> int:
    bases = {"0o": 8, "0x": 16}
    return int(text, bases.get(text[:2], 10))


def _float(text: str) -> float:
    special = text.lower().lstrip("+-")
    return float(text.replace(".", "", 1)) if special in (".inf", ".nan") else float(text)


_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    # tag: what a plain scalar of it looks like, the characters it starts with, and its value
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
    """Quotes every string that YAML 1.1 or this module would read as something else."""


for _name, (_pattern, _first, _) in _SCALARS.items():
    if _first:
        _resolver = re.compile(rf"^(?:{_pattern})\Z")
        _firsts = ["" if character == "\0" else character for character in _first]
        _Loader.add_implicit_resolver(_TAG + _name, _resolver, _firsts)
        _Dumper.add_implicit_resolver(_TAG + _name, _resolver, _firsts)
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<\Z"), ["<"])


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document into dicts with string keys, lists and scalars.

    A value that several aliases name becomes a copy for each of them. Merge keys (`<<`) are
    applied: the keys of the mapping itself win.

    Args:
        where: opens the message of an error, such as the file's name.
    Raises:
        ConfigError: the text is not YAML, gives a key twice in a mapping, has a key that is not a
            string, a tag outside the core schema, more than one document, or an alias within its
            own anchor. The message names the line.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Values(where).of(node)
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        if isinstance(error, ComposerError) and error.context and error.problem:
            problem = f"{error.context}, {error.problem}"  # one sentence, in two halves
        raise _not_yaml(where, mark.line if mark else 0, str(problem)) from error
    except yaml.reader.ReaderError as error:
        character = f"character {chr(error.character)!a}: {error.reason}"
        raise _not_yaml(where, text.count("\n", 0, error.position), character) from error
    except RecursionError as error:
        raise ConfigError(
            f"{where}: values are nested too deeply; expected a few levels"
        ) from error
    except (ValueError, OverflowError) as error:  # PyYAML's own, such as of "\UFFFFFFFF"
        raise ConfigError(f"{where}: not YAML: {error}") from error


def dump_yaml(tree: Any) -> str:
    """Write a tree as YAML that `parse_yaml` reads as an equal tree, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _not_yaml(where: str, line: int, problem: str) -> ConfigError:
    return ConfigError(f"{where}: not YAML: line {line + 1}: {problem}")


class _Values:
    """Makes the values of one document's nodes."""

    def __init__(self, where: str):
        self._where = where
        self._num_made = 0
        self._open = set[int]()
        """Identities of the nodes that the current one is inside of."""

    def of(self, node: Node) -> Any:
        self._num_made += 1
        if self._num_made > _MAX_VALUES:
            raise self._error(node, f"more than {_MAX_VALUES} values, aliases included")
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        kind = "map" if isinstance(node, MappingNode) else "seq"
        if node.tag != _TAG + kind:
            raise self._error(node, f"unknown tag {_shown(node.tag)}; remove it")
        if id(node) in self._open:
            raise self._error(node, "an alias is within the value that its anchor names")
        self._open.add(id(node))
        if isinstance(node, MappingNode):
            value = self._mapping(node)
        else:
            assert isinstance(node, SequenceNode)
            value = [self.of(item) for item in node.value]
        self._open.remove(id(node))
        return value

    def _scalar(self, node: ScalarNode) -> Any:
        text: str = node.value
        # A plain << that is no key is the text.
        name = "str" if node.tag == _MERGE else node.tag.removeprefix(_TAG)
        if name not in _SCALARS:
            raise self._error(node, f"unknown tag {_shown(node.tag)}; remove it")
        pattern, _, convert = _SCALARS[name]
        if not re.fullmatch(pattern, text):
            raise self._error(node, f"expected a value of tag {name}, found {_shown(text)}")
        if not _is_text(text):
            raise self._error(
                node, f"expected Unicode text without NUL characters, found {_shown(text)}"
            )
        try:
            return convert(text)
        except ValueError as error:  # thousands of digits
            raise self._error(node, f"the number {_shown(text)} is too long") from error

    def _mapping(self, node: MappingNode) -> dict[str, Any]:
        lines, values, merged = dict[str, int](), dict[str, Any](), dict[str, Any]()
        for key_node, value_node in node.value:
            is_merge = key_node.tag == _MERGE
            key = "<<" if is_merge else self.of(key_node)
            if not isinstance(key, str):
                raise self._error(key_node, f"expected a name as key, found {_shown(key)}")
            if key in lines:
                raise self._error(
                    key_node,
                    f"key {_shown(key)} is given a second time, first in line {lines[key]}; "
                    "join the two or remove one",
                )
            lines[key] = key_node.start_mark.line + 1
            if is_merge:
                for mapping in self._merged(value_node):
                    merged = mapping | merged  # of several, the first wins
            else:
                values[key] = self.of(value_node)
        return merged | values

    def _merged(self, node: Node) -> Iterator[dict[str, Any]]:
        sources = node.value if isinstance(node, SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, MappingNode):
                raise self._error(source, "expected a mapping, or a list of them, behind <<")
            yield self.of(source)

    def _error(self, node: Node, problem: str) -> ConfigError:
        return ConfigError(f"{self._where}: line {node.start_mark.line + 1}: {problem}")


def _is_text(text: str) -> bool:
    """Whether files and tokenizers can take it: JSON-like escapes also spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
