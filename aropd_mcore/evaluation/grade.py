"""Responses -> verdicts: mathematics by math-verify, choices by letter, code by its tests."""

import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Literal

from aropd_mcore import lifetime
from aropd_mcore.evaluation.extract import Extracted, choice_letter, math_answer, python_code
from aropd_mcore.evaluation.normalize import (
    LONGEST_ANSWER,
    is_words,
    normal_answer,
    without_unit,
    words_of,
)
from aropd_mcore.evaluation.sandbox import Limits, Program, run_tests
from aropd_mcore.evaluation.tasks import Choices, CodeTests, Gold, MathAnswer
from aropd_mcore.evaluation.values import only_value

_CHILD = Path(__file__).with_name("math_child.py")
_MATH_SECONDS = 20.0
"""For one answer; the slowest of GSM8K's and MATH's take half of one."""
_START_SECONDS = 120.0
_AT_ONCE = 256
"""Responses, between one that is handed on and the last one that is begun."""

_ELLIPSIS = re.compile(r"\\(?:[lc]?dots|dotsc|dotsb)(?![A-Za-z])|\.{3,}")
_HALF_OF_DAY = re.compile(r"\d\s*(?:\\text\s*\{)?\s*([ap])\.?\s*m(?![A-Za-z])", re.IGNORECASE)
_BASE = re.compile(r"(?<=[\dA-F}])_\s*\{?\s*(?:\\text\{)?(\d+)\s*\}*$")
"""The base of a number such as `1010_2`; math-verify does not compare it."""
_VERDICTS = ("yes", "no", "true", "false")

Verdict = Literal["right", "wrong", "no answer", "time"]


@dataclass(frozen=True)
class Grade:
    extracted: str | None
    """The answer within the response."""
    rule: str
    """Which found it (evaluation/extract.py); `none`."""
    verdict: Verdict
    """`time`: grading it went over a time limit; it counts as wrong."""
    failure: str | None = None
    """Of code that is wrong: what stopped its tests (sandbox.Outcome)."""


class _MathChild:
    """math_child.py, started again after it was killed."""

    _process: "subprocess.Popen[bytes] | None" = None

    def same(self, gold: str, answer: str, seconds: float) -> bool | None:
        """Whether the answers are the same; None where that takes too long."""
        process = self._process or self._start()
        assert process.stdin
        try:
            process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            process.stdin.flush()
            said = self._line(process, seconds)
        except BrokenPipeError:
            said = b""
        if not said:
            self.close()  # it computes on, or died of the answer
            return None if said is None else False
        return json.loads(said)

    def close(self) -> None:
        if self._process:
            self._process.kill()
            with suppress(BrokenPipeError):  # of what it has not read
                self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[bytes]":
        self._process = lifetime.start(  # it may compute for ever, and must not outlive the grader
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy's order of terms follows sets
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )
        if not self._line(self._process, _START_SECONDS):
            self.close()
            raise RuntimeError("the process with math-verify does not start; its error is above")
        return self._process

    @staticmethod
    def _line(process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
        """What it says next, b"" if it is gone, None if it says nothing for so long."""
        assert process.stdout
        end, said = time.monotonic() + seconds, b""
        while not said.endswith(b"\n"):
            wait = max(0.0, end - time.monotonic())
            if not select.select([process.stdout], [], [], wait)[0]:
                return None
            part = os.read(process.stdout.fileno(), 64)
            if not part:
                return b""
            said += part
        return said


def _wants_words(gold: str) -> bool:
    """Whether a reference is words, or the letter of a choice."""
    return is_words(gold) or bool(re.fullmatch(r"\(?[A-Z]\)?", gold))


def _in_one_form(gold: str, answer: str) -> tuple[str, str]:
    """Without units; of an answer in words to a question for a value, the one value in it."""
    if is_words(without_unit(gold)):
        if gold.casefold() in _VERDICTS and (match := re.match(r"([A-Za-z]+)\s*[,.;:]", answer)):
            answer = match[1]  # Yes, because
        return gold, answer
    gold = without_unit(gold)
    if not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", gold)):
        answer = without_unit(answer)
    if is_words(answer):
        answer = only_value(answer) or answer
    return gold, answer


class Graders:
    """Grades many responses at a time; a context manager, which ends the processes it started.

    Args:
        num_at_a_time: processes that grade; None: one a core that this process may use.
        math_seconds: time limit for comparing two answers.
        limits: of the sandbox that runs code.
    """

    def __init__(
        self,
        num_at_a_time: int | None = None,
        *,
        math_seconds: float = _MATH_SECONDS,
        limits: Limits | None = None,
    ) -> None:
        count = num_at_a_time or len(os.sched_getaffinity(0))
        self._math_seconds, self._limits = math_seconds, limits
        self._threads = ThreadPoolExecutor(count)  # each waits for a process
        self._children: SimpleQueue[_MathChild] = SimpleQueue()
        for _ in range(count):
            self._children.put(_MathChild())

    def __enter__(self) -> "Graders":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._children.empty():
            self._children.get().close()

    def grade_all(self, responses: Iterable[tuple[str, Gold]]) -> Iterator[Grade]:
        """A grade each, in their order."""
        rest = iter(responses)
        while some := list(islice(rest, _AT_ONCE)):
            yield from self._threads.map(lambda response: self.grade(*response), some)

    def grade(self, text: str, gold: Gold) -> Grade:
        """One response's grade; several threads may call."""
        match gold:
            case MathAnswer():
                found = math_answer(text, words=_wants_words(normal_answer(gold.text)))
                return self._compared(found, gold) if found.text else _graded(found, False)
            case Choices():
                found = choice_letter(text, gold)
                return _graded(found, found.text == gold.letter)
            case CodeTests():
                found = python_code(text, gold)
                return self._tested(found, gold) if found.text else _graded(found, False)

    def _compared(self, found: Extracted, gold: MathAnswer) -> Grade:
        same = self._same(gold.text, found.text or "")
        return _graded(found, bool(same), out_of_time=same is None)

    def _same(self, gold: str, answer: str) -> bool | None:
        """Whether two answers are the same; None where that takes too long.

        Words are compared as words, terms of an elided list one by one, all else by math-verify.
        """
        gold, answer = normal_answer(gold), normal_answer(answer)
        if len(answer) > LONGEST_ANSWER:
            return gold == answer
        halves = [_HALF_OF_DAY.search(text) for text in (gold, answer)]
        if halves[0] and halves[1] and halves[0][1].lower() != halves[1][1].lower():
            return False
        gold, answer = _in_one_form(gold, answer)
        if gold == answer:
            return True
        if is_words(gold) or is_words(answer):
            return is_words(gold) and is_words(answer) and words_of(gold) == words_of(answer)
        bases = [_BASE.search(text) for text in (gold, answer)]
        if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
            return False
        if _ELLIPSIS.search(gold + answer):
            return self._same_terms(gold, answer)
        child = self._children.get()
        try:
            return child.same(gold, answer, self._math_seconds)
        finally:
            self._children.put(child)

    def _same_terms(self, gold: str, answer: str) -> bool | None:
        """Compare lists with an ellipsis; what it stands for is not computed."""
        pairs = [re.split(r",|;", _ELLIPSIS.sub(",", text)) for text in (gold, answer)]
        has_one = [len(_ELLIPSIS.findall(text)) for text in (gold, answer)]
        terms, others = ([part.strip("{}()[]\\ ") for part in parts] for parts in pairs)
        terms, others = list(filter(None, terms)), list(filter(None, others))
        if has_one[0] != has_one[1] or len(terms) != len(others):
            return False
        found = [self._same(*pair) for pair in zip(terms, others, strict=True)]
        return None if None in found else all(found)

    def _tested(self, found: Extracted, gold: CodeTests) -> Grade:
        program = Program(found.text or "", gold.names, gold.tests, gold.setup)
        failure = run_tests(program, self._limits).failure
        return _graded(found, not failure, out_of_time=failure == "time", failure=failure or None)


def _graded(
    found: Extracted, is_right: bool, *, out_of_time: bool = False, failure: str | None = None
) -> Grade:
    verdict: Verdict = "right" if is_right else "time" if out_of_time else "wrong"
    return Grade(*found, verdict if found.text else "no answer", failure)


def check_graders(golds: Iterable[Gold]) -> str:
    """Try what the problems need, so that a machine without it does not grade everything as wrong.

    Returns:
        Nothing, or why the sandbox isolates less than it could.
    Raises:
        ValueError: math-verify is absent, or no code can be run.
    """
    kinds = {type(gold) for gold in golds}
    if MathAnswer in kinds and not importlib.util.find_spec("math_verify"):
        raise ValueError("grading needs math-verify: pip install 'aropd-mcore[eval]'")
    if CodeTests not in kinds:
        return ""
    # Modules that no interpreter has loaded by itself: it must be able to read its own library.
    code = "import decimal, typing, statistics, socket\ndef double(x): return 2 * x"
    outcome = run_tests(Program(code, ["double"], "assert double((1,)) == (1, 1)"))
    if outcome.failure:
        where = f"; not isolated: {outcome.not_isolated}" if outcome.not_isolated else ""
        raise ValueError(
            f"the sandbox for code does not work here: a program that is right fails by "
            f"{outcome.failure}{where}. Without isolation root runs code as nobody, who has to be "
            f"able to read {sys.base_prefix}"
        )
    return outcome.not_isolated
