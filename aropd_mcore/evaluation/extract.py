"""Extraction of the answer from a response.

Thoughts are removed first. Every rule takes time linear in the response's length, because a model
that repeats itself can write thousands of tags.
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
    """An answer and the rule that found it."""

    text: str | None
    """Text of the answer. None if no rule found one."""
    rule: str
    """Name of the rule, or `none`."""


_NOTHING = Extracted(None, "none")


def math_answer(response: str, *, words: bool = False) -> Extracted:
    """Find the answer to a mathematical problem by the first rule that applies.

        answer  the last <answer>...</answer>
        boxed   the last box, or the last boxes if only commas, "and" or "or" separate them
        hashes  the text after the last #### that directly precedes a number
        phrase  the last "the answer is ..."
        words   the last bold text, or a short last line. Only if `words` is True
        number  the last number, expression or formula

    Args:
        words: whether the reference consists of words. `phrase` then accepts words, too.
    """
    text = plain_text(split_thoughts(response).visible)
    tagged = tagged_answer(text)
    if tagged and tagged[1].strip():
        # Some models write a box inside the tags.
        return Extracted((boxed_answer(tagged[1]) or tagged[1]).strip(), "answer")
    for rule, find in (("boxed", boxed_answer), ("hashes", hashes_answer)):
        if answer := find(text):
            return Extracted(answer, rule)
    if answer := stated_value(text, wants_words=words):
        return Extracted(answer, "phrase")
    if words and (answer := words_at_the_end(text)):
        return Extracted(answer, "words")
    answer = last_value(text)
    return Extracted(answer, "number") if answer else _NOTHING


def choice_letter(response: str, choices: Choices) -> Extracted:
    """Find the letter of the choice that a response states (choices.stated_choice)."""
    return Extracted(*stated_choice(plain_text(split_thoughts(response).visible), choices))


def python_code(response: str, tests: CodeTests) -> Extracted:
    """Find the code of a response by the first rule that applies.

        answer  the last block in the last <answer>...</answer>, or its text if it has no block
        block   the last ``` block that defines the requested name, or else the last block
        text    the whole response, which may continue the prompt's code

    Returns:
        The task's header and the code. If the code does not define the requested name, the task's
        prompt and the code.
    """
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
    """Return the texts between ``` lines. The last block may lack its closing line."""
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
