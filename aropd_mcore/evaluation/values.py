"""Extraction of values (numbers, expressions and formulas) from prose.

A value is a whole expression: the numbers within `$\\frac{1}{2}$`, `25π` or `x^2 + 1` are not
separate values. All functions expect text in plain form (normalize.plain_text). Every pattern takes
linear time, because its quantifiers are possessive or bounded.
"""

import re
from collections import deque
from typing import NamedTuple

from aropd_mcore.evaluation.normalize import normal_answer

_WHOLE = r"(?:\d{1,3}(?:(?:,|\{,\}|\\,|[ ])\d{3})++(?!\d)|\d++)"
_AFTER = r"(?:\s?\\?%|[ ]?[aApP]\.?[mM]\b)"  # %, a.m. or p.m.
_NUMBER = rf"(?:\d++[ ]\d++/\d++|{_WHOLE}(?:\.\d++)?+(?:[eE][-+]?\d++(?!\w))?+|\.\d++){_AFTER}?+"
_BRACED = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*+\})*+\})*+\}"
_NO_VALUE = (
    "times|cdot|div|pm|text\\w*|math\\w*|mbox|begin|end|item|left|right|q?quad|approx|l?eq?|g?eq?|n?eq?"
    "|in|to|l?dots|cdots|boxed|fbox|therefore|because|implies|[Rr]ightarrow"
)
_COMMAND = rf"\\(?!(?:{_NO_VALUE})(?![A-Za-z]))[A-Za-z]++(?:\s?{_BRACED})*+"
_LETTER = r"(?<![A-Za-z\\])[A-Za-zα-ω](?![A-Za-z'])"
_GROUP = rf"\((?:[\d\s.,+\-*/^={{}}_√×·]|\\[A-Za-z]++|{_LETTER}){{1,80}}+\)"
_FUNCTION = r"(?<![A-Za-z\\])(?:log|ln|sin|cos|tan)[ ]?(?=[\d(\\])"
_SET = r"\\?\{[\d\s.,+\-/]{1,80}+\\?\}"
_RAISED = rf"(?:[\^_](?:{_BRACED}|-?\d++|[A-Za-z](?![A-Za-z])|\\[A-Za-z]++))*+"
_ATOM = rf"(?:{_FUNCTION}|{_NUMBER}|{_COMMAND}|{_GROUP}|{_SET}|√|∞|∅|{_LETTER})"
_TERM = rf"(?:{_ATOM}{_RAISED}(?:[ ](?=\\[a-z]))?+)++"
_OPERATOR = r"(?:[ ]?(?:[-+*/^×÷·]|\\(?:times|cdot|div|pm)(?![a-z]))[ ]?|(?<=\d):(?=\d))"
_SIGN = r"(?:[-+±][ ]?)?+(?:\\?[$€£¥][ ]?)?+-?+"
_WORD_CHARACTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # Chinese has no spaces: 是12
_EXPRESSION = re.compile(
    rf"(?<!{_WORD_CHARACTER})(?<![.\\^}}]){_SIGN}{_TERM}(?:{_OPERATOR}{_SIGN}{_TERM})*+",
    re.IGNORECASE,
)
_CURRENCY = re.compile(r"\\?[$€£¥][ ]?")
_SQUARED_UNIT = re.compile(
    r"(?<=[\dπ})])(?:[ ]?(?:[cdkm]m|in|ft|yds?|mi|inches|feet|units?)|[ ]m)"
    r"[ ]?\^\{?[23]\}?(?!\w)"
)
_COUNTS = re.compile(r"\d|\\(?:pi|infty|emptyset|varnothing|sqrt|frac)(?![A-Za-z])|[π∞∅√]")

_MATH_MARK = re.compile(r"\\.|\$\$?", re.DOTALL)
_CLOSES = {"\\[": "\\]", "\\(": "\\)", "$": "$", "$$": "$$"}
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}[ ]+[A-Za-z]{2,}")
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")
_LIST_MARK = re.compile(r"^[ \t]*(?:\d+[.)](?=[ \t]+\S)|[-*+](?=[ \t]))", re.MULTILINE)

_BETWEEN = re.compile(
    r"[\s*$]*(?:(,|;)?[\s*$]*(and|or)?|\\q?quad)[\s*$]*(?:(?<![A-Za-z])[A-Za-z]\s*=\s*)?"
)
_STATED = re.compile(r"(?:\b(?:is|are|be|either|values?|solutions?|roots?)|[=:])[\s*$]*$")

_VERB = r"\b(?:is|are|was|equals|(?:will|would|should|must) be)\b[ ]?:?"
_PHRASE = re.compile(
    rf"\banswers?(?![a-z])(?:\s+(?:to|for|of)\s[^.:\n]{{1,80}}?[ ](?={_VERB}))?"
    rf"[*_\"' ]*(?:{_VERB}|:|=|(?=\n))(?!\s*not\b)",
    re.IGNORECASE,
)
_HEADING = re.compile(r"[#*_\s]*(?:the\s+|final\s+|correct\s+)*", re.IGNORECASE)
_FILLER = re.compile(
    r"(?:[\s*_:=≈`\"]|\\approx(?![a-z])|(?:therefore|thus|simply|just|equal to|approximately|about"
    r"|exactly|given by|now|either|both)\b|(?:[A-Za-z](?:_\w+|\([A-Za-z]\))?\s*=))*",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.!?](?=\s|$|\*)|\n")
_VERDICT = re.compile(r"\s*(?:yes|no|true|false)\s*[,.;:]", re.IGNORECASE)
_BOLD = re.compile(r"\*\*([^*\n]{1,60})\*\*")
_MAX_SENTENCE = 600
"""Number of characters after a phrase that are searched for its value."""
_MAX_PHRASES = 32


class Value(NamedTuple):
    """An expression in a text, with the positions of its delimiters."""

    start: int
    end: int
    text: str
    is_formula: bool


def values_in(text: str) -> list[Value]:
    """Find all values of a text, in order. `$...$`, `\\(...\\)` and `\\[...\\]` are formulas."""
    formulas = _formulas(text)
    parts, position = [], 0
    for formula in formulas:
        parts += [text[position : formula.start], "\0" * (formula.end - formula.start)]
        position = formula.end
    rest = "".join([*parts, text[position:]])
    rest = _LIST_MARK.sub(lambda match: "\0" * len(match[0]), rest)
    rest = _SQUARED_UNIT.sub(lambda match: "\0" * len(match[0]), rest)
    plain = [
        Value(*match.span(), _CURRENCY.sub("", match[0]).strip(), False)
        for match in _EXPRESSION.finditer(rest)
        if _COUNTS.search(match[0])
    ]
    return sorted([*formulas, *plain])


def _formulas(text: str) -> list[Value]:
    formulas: list[Value] = []
    opened: re.Match[str] | None = None
    for mark in _MATH_MARK.finditer(text):
        if opened and mark[0] == _CLOSES[opened[0]]:
            content = text[opened.end() : mark.start()]
            if opened[0] != "$" or _is_formula(content):
                formulas.append(Value(opened.start(), mark.end(), content.strip(), True))
                opened = None
                continue
        if (mark[0] in _CLOSES and not (opened and opened[0] != "$")) or mark[0] in ("\\[", "\\("):
            opened = mark
    return formulas


def _is_formula(content: str) -> bool:
    """Return whether text between two `$` is a formula. In "$5 and $6" they are currency signs."""
    if not content.strip() or _PROSE.search(content):
        return False
    is_padded = (content[0].isspace(), content[-1].isspace())
    if not any(is_padded):
        return True
    return not _WORD.search(content) and (all(is_padded) or "\\" in content)


def last_value(text: str) -> str | None:
    """Find the last value or list of values, such as `3, 5` in "The roots are 3 and 5"."""
    values = values_in(text)
    counting = [value for value in values if _COUNTS.search(value.text)] or values
    return _join_list(text, counting) if counting else None


def _join_list(text: str, values: list[Value]) -> str:
    """Join the last value and the values before it that only commas, `and` or `or` separate."""
    group = [values[-1]]  # in reverse order
    for value in reversed(values[:-1]):
        gap = _BETWEEN.fullmatch(text, value.end, group[-1].start)
        if not gap or not (gap[1] or gap[2] or (value.is_formula and "\n" not in gap[0])):
            break
        group.append(value)
    group.reverse()
    # "After step 3, 18 remain" is not a list: take its last value only.
    if not all(value.is_formula for value in group) and not _STATED.search(
        text, max(0, group[0].start - 40), group[0].start
    ):
        group = group[-1:]
    return ", ".join(value.text for value in group)


def stated_value(text: str, *, wants_words: bool) -> str | None:
    """Find the value in the last "the answer is ...". With wants_words: the words instead."""
    for phrase in reversed(deque(_PHRASE.finditer(text), maxlen=_MAX_PHRASES)):
        if phrase.end() < len(text) and text[phrase.end()] == "\n" and phrase[0][-1] not in ":=":
            line = text[text.rfind("\n", 0, phrase.start()) + 1 : phrase.start()]
            if not _HEADING.fullmatch(line):
                continue
        start = _FILLER.match(text, phrase.end()).end()  # type: ignore[union-attr]
        answer = _find_in_sentence(text[start : start + _MAX_SENTENCE], wants_words)
        if answer:
            return answer
    return None


def _find_in_sentence(rest: str, wants_words: bool) -> str | None:
    values = values_in(rest)
    first = values[0] if values and values[0].start == 0 else None
    if first is None or not first.is_formula:
        end = _SENTENCE.search(rest)
        rest = rest[: end.start() if end else len(rest)]
        values = [value for value in values if value.end <= len(rest)]
    if wants_words:
        if rest.count("**") == 1:  # the end of bold words
            rest = rest.partition("**")[0]
        return rest.strip(" \t*_`") or None
    if not values:
        return None
    if first is None:
        return last_value(rest)
    group = [first]
    for value in values[1:]:
        gap = rest[group[-1].end : value.start]
        if re.fullmatch(r"\s*(?:=|≈|\\approx)\s*", gap):
            group = [value]
        elif _BETWEEN.fullmatch(gap) and (gap.strip(" *$") or value.is_formula):
            group.append(value)
        else:
            break
    return ", ".join(value.text for value in group)


def words_at_the_end(text: str) -> str | None:
    """Find the last bold words, or else the last line if it is short or begins with `Yes,`."""
    lines = [line for line in text.splitlines() if line.strip()]
    bold = _BOLD.findall(text)
    if bold:
        return bold[-1]
    is_short = bool(lines) and (len(lines[-1].split()) <= 4 or bool(_VERDICT.match(lines[-1])))
    return lines[-1].strip() if is_short else None


def only_value(text: str) -> str | None:
    """Find the only value in an answer in words: `18` in "18 dollars" and "9 * 2 = 18 ducks".

    Returns:
        None if there are no values or several different ones.
    """
    values = values_in(text)
    for i in range(len(values) - 1, 0, -1):
        if re.fullmatch(r"\s*(?:=|≈)\s*", text[values[i - 1].end : values[i].start]):
            values = values[i:]
            break
    texts = {normal_answer(value.text) for value in values}
    return texts.pop() if len(texts) == 1 else None
