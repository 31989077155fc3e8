"""The answer within a response, and the rule that found it.

Thoughts are cut off before any rule. Every rule is linear in the response's length: a model that
repeats itself writes tags by the thousand.
"""

import re
from typing import NamedTuple

from aropd_mcore.data.answer_marks import boxed_answer, hashes_answer, tagged_answer
from aropd_mcore.data.thoughts import split_thoughts
from aropd_mcore.evaluation.choices import stated_choice
from aropd_mcore.evaluation.normalize import plain_text
from aropd_mcore.evaluation.tasks import Choices, CodeTests
from aropd_mcore.evaluation.values import last_value, stated_value, words_at_the_end

_FENCE = re.compile(r"^[ \t]*```")


class Extracted(NamedTuple):
    text: str | None
    """None: no rule found any."""
    rule: str


_NOTHING = Extracted(None, "none")


def math_answer(response: str, *, words: bool = False) -> Extracted:
    """Find the answer to a mathematical problem.

    The rules, in their order: `answer` (the last <answer>...</answer>), `boxed` (the last box, or
    several that make one answer), `hashes` (what follows the last #### before a number), `phrase`
    (the last "the answer is ...") and `number` (the last number, expression or formula).

    Args:
        words: whether the reference is words. `phrase` then takes words, and `words` (the last bold
            text, or a short last line) takes the place of `number`.
    """
    text = plain_text(split_thoughts(response).visible)
    tagged = tagged_answer(text)
    if tagged and tagged[1].strip():
        # Models put one form into the other.
        return Extracted((boxed_answer(tagged[1]) or tagged[1]).strip(), "answer")
    for rule, find in (("boxed", boxed_answer), ("hashes", hashes_answer)):
        if found := find(text):
            return Extracted(found, rule)
    if found := stated_value(text, wants_words=words):
        return Extracted(found, "phrase")
    if words and (found := words_at_the_end(text)):
        return Extracted(found, "words")
    found = last_value(text)
    return Extracted(found, "number") if found else _NOTHING


def choice_letter(response: str, choices: Choices) -> Extracted:
    """Find the letter of the choice that a response states; see choices.stated_choice."""
    return Extracted(*stated_choice(plain_text(split_thoughts(response).visible), choices))


def python_code(response: str, tests: CodeTests) -> Extracted:
    """By `answer`, `block` (the last ``` block that defines what was asked for, or the last block)
    or `text` (all of it, which may go on with the prompt): the code, with the task's header or
    prompt before it."""
    text = split_thoughts(response).visible
    tagged = tagged_answer(text)
    if tagged and tagged[1].strip():
        blocks = _blocks(tagged[1])
        return _program(blocks[-1] if blocks else tagged[1], "answer", tests)
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
