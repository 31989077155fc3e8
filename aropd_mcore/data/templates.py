"""Text functions: filling of templates, and cutting and writing of traces.

A template's fields have the form `{name}`. Every other brace is text, so `\\boxed{}` needs no
escape.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from math import ceil

from aropd_mcore.config import ConfigError

_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")


def check_fields(setting: str, template: str, fields: Sequence[str]) -> None:
    """Check that a template has each of `fields` exactly once, and no other field.

    Raises:
        ConfigError: a field is unknown, missing or repeated. The message names the setting, the
            field and the known fields.
    """
    names = _FIELD.findall(template)
    known = ", ".join(f"{{{name}}}" for name in fields)
    for name in names:
        if name not in fields:
            raise ConfigError(f"{setting}: unknown field {{{name}}}; its fields are {known}")
    for name in fields:
        if names.count(name) != 1:
            raise ConfigError(
                f"{setting}: found {{{name}}} {names.count(name)} times in {template!r}, "
                "expected it once"
            )


def fill(template: str, **values: str) -> str:
    """Replace a template's fields in one pass. Braces in the values stay unchanged."""
    return _FIELD.sub(lambda match: values[match[1]], template)


def partial_trace(reasoning: str, ratio: float) -> str:
    """Return the first `ratio` of the characters, with the cut moved forward to the end of a word.

    A word is a run without white space. Text in Chinese, Japanese, Korean and the scripts of
    _UNSPACED has no spaces at which a cut could stop. In such text each wide character, or each
    character with its combining marks, is a word. White space at the end is removed. Ratio 0 gives
    the empty trace, ratio 1 the whole trace.
    """
    cut = int(ratio * len(reasoning))
    while 0 < cut < len(reasoning) and _in_word(reasoning[cut - 1], reasoning[cut]):
        cut += 1
    return reasoning[:cut].rstrip()


def reference_partial_trace(reasoning: str, ratio: float) -> str:
    """Return the first `ratio` of the characters, cut as in the authors' release.

    The number of characters is rounded up. A cut within a run of letters, digits, underscores and
    backslashes moves forward to the end of the run, also in scripts without spaces. A reasoning of
    one or two runs without white space stays whole. Ratio 0, which the release refuses, gives the
    empty trace.
    """
    cut = ceil(ratio * len(reasoning))
    if cut == 0 or len(reasoning.split()) <= 2:
        return reasoning if ratio > 0 else ""
    if _REFERENCE_WORD.match(reasoning, cut - 1):
        while _REFERENCE_WORD.match(reasoning, cut):
            cut += 1
    return reasoning[:cut].rstrip()


def sentence_partial_trace(reasoning: str, ratio: float) -> str:
    """Return the first `ratio` of the characters, with the cut moved forward to the end of a
    sentence.

    A sentence ends with `.`, `!`, `?` or `…`, closing quotes or brackets included, before white
    space. With `。`, `！` or `？` it ends before any character. It also ends at a blank line. The
    dots of common abbreviations and of numbers that open a line, as in a list, end none. Ratio 0
    gives the empty trace, ratio 1 the whole trace.
    """
    return _forward(reasoning, ratio, _sentence_ends(reasoning))


def line_partial_trace(reasoning: str, ratio: float) -> str:
    """Return the first `ratio` of the characters, with the cut moved forward to the end of a line.

    Ratio 0 gives the empty trace, ratio 1 the whole trace.
    """
    return _forward(reasoning, ratio, (end.start() for end in _LINE_END.finditer(reasoning)))


def token_partial_trace(reasoning: str, ratio: float, token_ends: Sequence[int]) -> str:
    """Return the first `ratio` of the tokens. No character is cut.

    Ratio 0 gives the empty trace, ratio 1 the whole trace.

    Args:
        token_ends: place in the reasoning at which each token ends (SpecialTokens.token_ends).
    """
    if ratio == 1:
        return reasoning
    num_tokens = int(ratio * len(token_ends))
    return reasoning[: token_ends[num_tokens - 1]].rstrip() if num_tokens else ""


def _forward(reasoning: str, ratio: float, ends: Iterable[int]) -> str:
    """Return the first `ratio` of the characters, with the cut moved forward to the next end.

    Args:
        ends: ascending places at which the text may end, without white space before them.
    """
    shown = len(reasoning[: int(ratio * len(reasoning))].rstrip())
    if not shown:
        return ""
    return reasoning[: next((end for end in ends if end >= shown), None)].rstrip()


_LINE_END = re.compile(r"(?<!\s)\s*(?:\n|\Z)")
_SENTENCE_END = re.compile(
    r"(?P<mark>(?<![.!?…])[.!?…]+)[\"'”’»)\]}*$\\]*(?!\S)|[。！？]+[」』”’）]*|(?<!\s)(?P<blank>\s*\n\s*\n)"
)
_NO_END = re.compile(
    r"(?:\b(?:e\.g|i\.e|cf|vs|resp|approx|eqs?|figs?|dr|mrs?|prof)|^\s*\d+)\Z", re.I | re.M
)
"""Text before a dot that ends no sentence: an abbreviation, or the number of a list's entry."""
_NO_END_LENGTH = 12
"""Number of characters before a dot in which _NO_END is looked for."""


def _sentence_ends(text: str) -> Iterator[int]:
    for end in _SENTENCE_END.finditer(text):
        start = end.start()
        if end["mark"] == "." and _NO_END.search(text, max(0, start - _NO_END_LENGTH), start):
            continue
        yield start if end["blank"] else end.end()


_REFERENCE_WORD = re.compile(r"[\w\\]")

_UNSPACED = (
    range(0x0E00, 0x1000),  # Thai, Lao, Tibetan
    range(0x1000, 0x10A0),  # Myanmar
    range(0x1780, 0x1800),  # Khmer
    range(0x1950, 0x19E0),  # Tai Le, New Tai Lue
    range(0x1A20, 0x1AB0),  # Tai Tham
    range(0xA9E0, 0xAA00),  # Myanmar Extended-B
    range(0xAA60, 0xAAE0),  # Myanmar Extended-A, Tai Viet
)
"""Code points of scripts that have no spaces between words."""
_JOINS_NEXT = frozenset("เแโใไເແໂໃໄ\u1039\u17d2\u1a60ꪵꪶꪹꪻꪼ\u200c\u200d")
"""Vowels before their consonant, signs that stack the next consonant, and joiners."""
_JOINS_PREVIOUS = frozenset("ะาำຳະາ\u200c\u200d")
"""Letters that belong to the previous consonant, in addition to combining marks."""


def _in_word(before: str, after: str) -> bool:
    """Return whether a cut between two neighbouring characters is within a word."""
    if before.isspace() or after.isspace():
        return False
    if not (_is_unspaced(before) or _is_unspaced(after)):
        return not (_is_wide(before) or _is_wide(after))
    is_mark = unicodedata.category(after).startswith("M") or after in _JOINS_PREVIOUS
    return is_mark or before in _JOINS_NEXT or (before.isdecimal() and after.isdecimal())


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _is_unspaced(character: str) -> bool:
    return any(ord(character) in block for block in _UNSPACED)


def write_trace(template: str, reasoning: str, answer: str) -> str:
    """Fill the trace template, without the surroundings of an empty part.

    If a part is empty, its field is removed together with the pair of tags directly around it. If
    there are no tags, the text of the field's line up to a neighbouring field is removed. If both
    parts are empty, the result is the empty string.
    """
    parts = {"reasoning": reasoning.strip(), "answer": answer.strip()}
    if not any(parts.values()):
        return ""
    for name, text in parts.items():
        if not text:
            template = _without_field(template, name)
    return fill(template, **parts)


def _without_field(template: str, name: str) -> str:
    field = rf"\s*\{{{name}\}}\s*"
    in_tags = rf"(?:<([\w:]+)>{field}</\1>|\[(\w+)\]{field}\[/\2\])\s*"
    on_its_line = rf"[^\n}}]*\{{{name}\}}[^\n{{]*\s*"
    rest, num_found = re.subn(in_tags, "", template)
    return (rest if num_found else re.sub(on_its_line, "", template)).strip()
