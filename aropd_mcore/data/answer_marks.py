"""Marks of final answers in data sets and responses: answer tags, boxes, `####`.

Every reader takes time linear in the length of the text, since a model that repeats itself can
write thousands of marks.
"""

import math
import re
from typing import Any, NamedTuple

Solution = tuple[str, str]
"""Reasoning and answer."""

_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_MENTION = re.compile(r"(?:[\s`'\"*.,…]|\b(?:and|or|to|tags?)\b)*", re.IGNORECASE)
"""Text between two tags that are only mentioned, as in "I kept to <answer> and </answer>"."""

_LAST_LINE_HASHES = re.compile(r"^####[ \t]*(\S[^\n]*)\s*\Z", re.MULTILINE)
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]+)")
_NUMBER_FIRST = re.compile(r"[*_$`(\\ ]*[-+−]?[ ]*[\\$€£¥]*[ ]*(?:\d|\.\d|[dt]?frac(?![A-Za-z]))")
_NUMBERED_HEADING = re.compile(r"\d+(?:\.\d+)*[.):]?[*_]*(?:\s+[*_]*[A-Z]|[.):]+[*_]*\s+[*_]*\w)")

# `\\{1,4}` covers text that was escaped twice. Escaped braces, \{ and \}, are not counted.
_BOX = r"\\{1,4}(?:boxed|fbox)(?![A-Za-z])"
_BRACES = re.compile(rf"(?P<box>{_BOX})(?P<open>\s*\{{)?|\\.|[{{}}]", re.DOTALL)
_TO_END_OF_MATH = re.compile(r"\s*([^$\n]{1,200}?)\s*(?:\$|\\[)\]])")
_ARGUMENT = r"\s*(?:\{[^{}]{0,200}\}|\d|[A-Za-z])"
_ONE_TOKEN = re.compile(
    rf"\s*(?!{_BOX})([-+−]?(?:\\[dt]?frac{_ARGUMENT}{_ARGUMENT}"
    r"|\$?(?:\d(?:[\d,]*\d)?(?:\.\d+)?|\.\d+)(?:/\d+)?%?"
    r"|\\[A-Za-z]+(?:\{[^{}]{0,200}\})*"
    r"|[A-Za-z](?![A-Za-z]|\s+[a-z])))"
)
_WORDS = re.compile(rf"(?<![\\A-Za-z])[A-Za-z]{{2,}}|{_BOX}")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&~*]|\\[()\[\],;:! \\]|\\q?quad\b|\b(?:and|or)\b"
    r"|\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)?\s*\})*"
)
_CONNECTIVE = re.compile(r"[,;&]|\band\b|\bor\b")
_SET = re.compile(r"(?:\\left)?\\\{")
_PLACEHOLDER = re.compile(r"(?:[\s.…_?]|\\[lc]?dots|\\square)*")


class Unusable(Exception):
    """Error: a converter cannot use a record. The message is the reason, without the record's
    values."""


def answer_text(value: Any) -> str:
    """Convert an `answer` to text. A whole number such as 27.0 loses its `.0`.

    Raises:
        Unusable: the value is neither a string nor a finite number.
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # The data set AMC 2023 writes 27.0 for 27.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise Unusable("'answer' is neither a string nor a finite number")
    return str(value)


# Answer tags


def tagged_answer(text: str) -> tuple[int, str] | None:
    """Find the last `<answer>a</answer>` that states an answer.

    Returns:
        The start of the opening tag and the text between the tags. None if there is no pair of
        tags. A pair that is empty or only mentioned counts if there is no other pair.
    """
    pairs: list[tuple[int, str]] = []
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        if tag[1] and opened:
            pairs.append((opened.start(), text[opened.end() : tag.start()]))
        opened = None if tag[1] else tag
    stated = [pair for pair in pairs if not _MENTION.fullmatch(pair[1])]
    return (stated or pairs or [None])[-1]


def split_tags(text: str) -> Solution | None:
    """Return `z` and `a` of `<reasoning>z</reasoning> <answer>a</answer>`.

    Without `<reasoning>` tags, the reasoning is the text before the answer.
    """
    marked = tagged_answer(text)
    if marked is None:
        return None
    start, answer = marked
    _, opening, rest = text.partition("<reasoning>")
    reasoning, closing, _ = rest.partition("</reasoning>")
    return (reasoning if opening and closing else text[:start]).strip(), answer.strip()


# GSM8K's mark


def split_hashes(text: str) -> Solution | None:
    """Return `z` and `a` of `z\\n#### a`, without calculator annotations such as `<<48/2=24>>`.

    The mark must be on the last line, as in GSM8K's records. If words follow the mark, it counts
    only if the text has no other `####`: several such lines are Markdown headings.
    """
    match = _LAST_LINE_HASHES.search(text)
    if not match or ("####" in text[: match.start()] and not _NUMBER_FIRST.match(match[1])):
        return None
    answer = boxed_answer(match[1]) or match[1].strip()
    return _ANNOTATION.sub("", text[: match.start()]).strip(), answer


def hashes_answer(text: str) -> str | None:
    """Return the rest of the line after the last `####` that is directly before a number.

    `#### Result` and `#### 1. Step` are Markdown headings, not marks.
    """
    lines = [
        line
        for line in _HASHES.findall(text)
        if _NUMBER_FIRST.match(line) and not _NUMBERED_HEADING.match(line.lstrip("*_ "))
    ]
    return lines[-1].strip() if lines else None


# Boxes


class _Box(NamedTuple):
    """Positions of a complete box: \\boxed{ is [start, inside), the closing brace [close, end)."""

    start: int
    inside: int
    close: int
    end: int


def split_boxed(text: str) -> Solution | None:
    """Return the whole text, and the answer in its last box; see boxed_answer."""
    answer = boxed_answer(text)
    return (text.strip(), answer) if answer else None


def boxed_answer(text: str) -> str | None:
    """Return the text in the last complete `\\boxed` or `\\fbox`, with nested boxes unwrapped.

    A box may have white space before its brace, or no braces (`\\boxed 9`). Boxes that only commas,
    `and` or `or` separate state one answer: `3, 5, 7`. Boxes without content (`\\boxed{}`,
    `\\boxed{...}`) are skipped.
    """
    outermost: list[list[_Box]] = []  # each list: an outermost box and the boxes within it
    for box in sorted(_complete_boxes(text)):
        if outermost and box.start < outermost[-1][0].close:
            outermost[-1].append(box)
        else:
            outermost.append([box])
    answers: list[str] = []
    following: _Box | None = None
    for box, *nested in reversed(outermost):
        if following and not _state_one_answer(text[box.end : following.start]):
            break
        answer = _unwrapped(text, box, nested).strip()
        if _PLACEHOLDER.fullmatch(answer):
            continue
        if answers and (_SET.match(answer) or _SET.match(answers[-1])):
            break  # a set is an answer by itself
        answers.append(answer)
        following = box
    if len(set(answers)) == 1:
        return answers[0]
    return ", ".join(reversed(answers)) or None


def _complete_boxes(text: str) -> list[_Box]:
    """Return all boxes whose braces close, nested boxes included."""
    boxes: list[_Box] = []
    open_braces: list[tuple[int, int] | None] = []
    for token in _BRACES.finditer(text):
        if token["open"]:
            open_braces.append(token.span())
        elif token["box"]:
            if bare := _without_braces(text, token.end()):
                boxes.append(_Box(token.start(), bare.start(1), bare.end(1), bare.end(1)))
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened:
                boxes.append(_Box(*opened, token.start(), token.end()))
    return boxes


def _without_braces(text: str, start: int) -> re.Match[str] | None:
    """Match the content of `\\boxed 9$`: up to the end of the formula, or one token in prose."""
    formula = _TO_END_OF_MATH.match(text, start)
    if formula and not _WORDS.search(_TEXT_COMMAND.sub("", formula[1])):
        return formula
    return _ONE_TOKEN.match(text, start)


def _state_one_answer(gap: str) -> bool:
    if not _BETWEEN_BOXES.fullmatch(gap):
        return False
    return "\n" not in gap or bool(_CONNECTIVE.search(gap))


def _unwrapped(text: str, box: _Box, nested: list[_Box]) -> str:
    """Return the content of a box without the marks of the boxes within it."""
    marks = [span for b in nested for span in ((b.start, b.inside), (b.close, b.end))]
    parts, position = [], box.inside
    for start, end in sorted(marks):
        parts.append(text[position:start])
        position = end
    return "".join([*parts, text[position : box.close]])
