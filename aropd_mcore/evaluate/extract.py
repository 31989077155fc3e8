"""The answer within a response, and the rule that found it.

Every rule is linear in the response's length: a model that repeats itself writes tags by the
thousand.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from aropd_mcore.data.answer_marks import split_boxed
from aropd_mcore.evaluate.tasks import LETTERS, Choices, CodeTests

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")
_FENCE = re.compile(r"^[ \t]*```")
_PHRASE = re.compile(
    r"\b(?i:answer|choice|option)(?:\s{1,3}is)?\s{0,3}:?\s{0,3}[*$]{0,3}\(?([A-Z])\b(?!['’])"
)
_ALONE = re.compile(r"\(([A-Z])\)|^[ \t*$]*([A-Z])[.)]?[ \t*$]*$", re.MULTILINE)


class Extracted(NamedTuple):
    text: str | None
    """None: no rule found any."""
    rule: str


_NOTHING = Extracted(None, "none")


def math_answer(text: str) -> Extracted:
    """By `answer` (the last <answer>...</answer>), `boxed` (the last \\boxed{}), `hashes` (what
    follows the last ####) or `number` (the last one), whichever is there first."""
    rules: dict[str, Callable[[str], str | None]] = {
        "answer": _tagged,
        "boxed": _boxed,
        "hashes": _behind_hashes,
        "number": _last_number,
    }
    for rule, find in rules.items():
        found = find(text)
        if found and found.strip():
            # Models put one form into the other.
            inner = (_boxed(found) or found) if rule == "answer" else found
            return Extracted(inner.strip(), rule)
    return _NOTHING


def choice_letter(text: str, choices: Choices) -> Extracted:
    """By `answer` and `boxed`, as a letter or as the text of one choice; else by `phrase` (the last
    "answer is C") or `letter` (the last "(C)", or C alone on its line)."""
    letters = LETTERS[: len(choices.texts)]
    for rule, found in (("answer", _tagged(text)), ("boxed", _boxed(text))):
        letter = _letter_in(found, choices, letters) if found else None
        if letter:
            return Extracted(letter, rule)
    for rule, pattern in (("phrase", _PHRASE), ("letter", _ALONE)):
        found = [next(filter(None, match.groups())).upper() for match in pattern.finditer(text)]
        found = [letter for letter in found if letter in letters]
        if found:
            return Extracted(found[-1], rule)
    return _NOTHING


def _letter_in(found: str, choices: Choices, letters: str) -> str | None:
    found = _boxed(found) or found
    plain = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", found).strip(" \n\t$*.")
    match = re.match(rf"\(?([{letters}])(?:[).:\s]|$)", plain)
    if match:
        return match[1]
    same = [
        letter
        for letter, text in zip(letters, choices.texts, strict=True)
        if text.strip(" .").casefold() == plain.casefold()
    ]
    return same[0] if len(same) == 1 else None


def python_code(text: str, tests: CodeTests) -> Extracted:
    """By `answer`, `block` (the last ``` block that defines what was asked for, or the last block)
    or `text` (all of it, which may go on with the prompt): the code, with the task's header or
    prompt before it."""
    tagged = _tagged(text)
    if tagged and tagged.strip():
        blocks = _blocks(tagged)
        return _program(blocks[-1] if blocks else tagged, "answer", tests)
    blocks = _blocks(text)
    if blocks:
        whole = [block for block in blocks if _defines(block, tests)]
        return _program((whole or blocks)[-1], "block", tests)
    return _program(text, "text", tests) if text.strip() else _NOTHING


def _program(code: str, rule: str, tests: CodeTests) -> Extracted:
    if _defines(code, tests):
        return Extracted(f"{tests.header}\n{code.strip()}\n", rule)
    return Extracted(f"{tests.prompt}{code.rstrip()}\n", rule)


def _defines(code: str, tests: CodeTests) -> bool:
    return bool(re.search(rf"\b(?:def|class)\s+{re.escape(tests.names[0])}\b", code))


def _blocks(text: str) -> list[str]:
    """What stands between lines of ```; a last one may be open."""
    blocks: list[list[str]] = []
    is_open = False
    for line in text.splitlines():
        if _FENCE.match(line):
            is_open = not is_open
            if is_open:
                blocks.append([])
        elif is_open:
            blocks[-1].append(line)
    return ["\n".join(block) for block in blocks if block]


def _tagged(text: str) -> str | None:
    head, end, _ = text.rpartition("</answer>")
    _, start, answer = head.rpartition("<answer>")
    return answer if start and end else None


def _boxed(text: str) -> str | None:
    solution = split_boxed(text)
    return solution[1] if solution else None


def _behind_hashes(text: str) -> str | None:
    _, hashes, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0] if hashes else None


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None
