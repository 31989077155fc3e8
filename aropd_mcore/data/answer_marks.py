"""Marks by which data sets and models state a final answer: answer tags, boxes, `####`."""

import math
import re
from typing import Any

Solution = tuple[str, str]
"""Reasoning and answer."""


class Unusable(Exception):
    """A record that a converter cannot use; the message is the reason, free of its values."""


def answer_text(value: Any) -> str:
    """An `answer` as text: a string, or a finite number without the `.0` of whole ones.

    Raises:
        Unusable: the value is neither.
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # AMC 2023 writes 27.0 for 27.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise Unusable("'answer' is neither a string nor a finite number")
    return str(value)


def split_tags(text: str) -> Solution | None:
    """`<reasoning>z</reasoning> <answer>a</answer>`; what precedes the answer, without tags."""
    answers = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if not answers:
        return None
    reasoning = re.search(r"<reasoning>(.*?)</reasoning>", text, flags=re.DOTALL)
    before = reasoning[1] if reasoning else text[: text.rindex("<answer>")]
    return before.strip(), answers[-1].strip()


def split_hashes(text: str) -> Solution | None:
    """`z` and `a` of `z\\n#### a`, without calculator annotations such as `<<48/2=24>>`."""
    match = re.search(r"^####[ \t]*(\S[^\n]*)\s*\Z", text, flags=re.MULTILINE)
    if not match:
        return None
    return re.sub(r"<<[^<>\n]*>>", "", text[: match.start()]).strip(), match[1].strip()


def split_boxed(text: str) -> Solution | None:
    """The whole text, and what stands in its last `\\boxed{...}`, braces nested."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    # Escaped braces, \{ and \}, are part of the text and close nothing.
    for brace in re.finditer(r"\\.|[{}]", text[start:], flags=re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            answer = text[start : start + brace.start()].strip()
            return (text.strip(), answer) if answer else None
    return None
