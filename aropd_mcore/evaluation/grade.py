"""Grading of responses: mathematics by math-verify, choices by letter, code by its tests."""

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
"""Time limit per answer. The slowest answers of GSM8K and MATH take half a second."""
_START_SECONDS = 120.0
_CHUNK_SIZE = 256
"""Number of responses that are submitted to the threads together."""

_ELLIPSIS = re.compile(r"\\(?:[lc]?dots|dotsc|dotsb)(?![A-Za-z])|\.{3,}")
_HALF_OF_DAY = re.compile(r"\d\s*(?:\\text\s*\{)?\s*([ap])\.?\s*m(?![A-Za-z])", re.IGNORECASE)
_BASE = re.compile(r"(?<=[\dA-F}])_\s*\{?\s*(?:\\text\{)?(\d+)\s*\}*$")
"""Base of a number such as `1010_2`. math-verify does not compare bases."""
_VERDICTS = ("yes", "no", "true", "false")

Verdict = Literal["right", "wrong", "no answer", "time"]


@dataclass(frozen=True)
class Grade:
    """Grade of one response."""

    extracted: str | None
    """Answer extracted from the response. None if there is none."""
    rule: str
    """Rule that extracted the answer (evaluation/extract.py), or `none`."""
    verdict: Verdict
    """`time` means that grading exceeded a time limit. It counts as wrong."""
    failure: str | None = None
    """Reason why code failed its tests (sandbox.Outcome)."""


class _MathChild:
    """A process that runs math_child.py. It is restarted after it was killed."""

    _process: "subprocess.Popen[bytes] | None" = None

    def same(self, gold: str, answer: str, seconds: float) -> bool | None:
        """Return whether the answers are the same. None: the time limit was exceeded."""
        process = self._process or self._start()
        assert process.stdin
        try:
            process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            process.stdin.flush()
            line = self._read_line(process, seconds)
        except BrokenPipeError:
            line = b""
        if not line:
            self.close()  # the process is still computing, or the answer has crashed it
            return None if line is None else False
        return json.loads(line)

    def close(self) -> None:
        if self._process:
            self._process.kill()
            with suppress(BrokenPipeError):  # the process has not read all of its input
                self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[bytes]":
        self._process = lifetime.start(  # it may compute forever and must not outlive the grader
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy orders terms by sets
            bufsize=0,
            start_new_session=True,  # Ctrl-C goes to the parent, which ends this process
        )
        if not self._read_line(self._process, _START_SECONDS):
            self.close()
            raise RuntimeError("the math-verify process did not start: see its error above")
        return self._process

    @staticmethod
    def _read_line(process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
        """Read a line of output. b"": the process has ended. None: the time limit was exceeded."""
        assert process.stdout
        end, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            wait = max(0.0, end - time.monotonic())
            if not select.select([process.stdout], [], [], wait)[0]:
                return None
            part = os.read(process.stdout.fileno(), 64)
            if not part:
                return b""
            line += part
        return line


def _wants_words(gold: str) -> bool:
    """Return whether a reference consists of words or is the letter of a choice."""
    return is_words(gold) or bool(re.fullmatch(r"\(?[A-Z]\)?", gold))


def _reduce_to_values(gold: str, answer: str) -> tuple[str, str]:
    """Remove units. If the reference is a value and the answer is words, extract its only value."""
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
    """Context manager that grades responses in parallel. It ends the processes that it started.

    Args:
        num_at_a_time: number of grading processes. None: one per core that this process may use.
        math_seconds: time limit for comparing two answers.
        limits: limits of the sandbox that runs code. None: the defaults.
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
        self._threads = ThreadPoolExecutor(count)  # each thread waits for a process
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
        self.close()

    def close(self) -> None:
        """End the processes that were started."""
        self._threads.shutdown(cancel_futures=True)
        while not self._children.empty():
            self._children.get().close()

    def grade_all(self, responses: Iterable[tuple[str, Gold]]) -> Iterator[Grade]:
        """Grade responses (text and gold), and yield the grades in the same order."""
        rest = iter(responses)
        while chunk := list(islice(rest, _CHUNK_SIZE)):
            yield from self._threads.map(lambda response: self.grade(*response), chunk)

    def grade(self, text: str, gold: Gold) -> Grade:
        """Grade one response. Thread-safe."""
        match gold:
            case MathAnswer():
                extracted = math_answer(text, words=_wants_words(normal_answer(gold.text)))
                return (
                    self._compare(extracted, gold) if extracted.text else _grade(extracted, False)
                )
            case Choices():
                extracted = choice_letter(text, gold)
                return _grade(extracted, extracted.text == gold.letter)
            case CodeTests():
                extracted = python_code(text, gold)
                return self._test(extracted, gold) if extracted.text else _grade(extracted, False)

    def _compare(self, extracted: Extracted, gold: MathAnswer) -> Grade:
        same = self._same(gold.text, extracted.text or "")
        return _grade(extracted, bool(same), out_of_time=same is None)

    def _same(self, gold: str, answer: str) -> bool | None:
        """Return whether two answers are the same. None: the time limit was exceeded.

        Words are compared as words, and lists with an ellipsis term by term. math-verify compares
        everything else.
        """
        gold, answer = normal_answer(gold), normal_answer(answer)
        if len(answer) > LONGEST_ANSWER:
            return gold == answer
        halves = [_HALF_OF_DAY.search(text) for text in (gold, answer)]
        if halves[0] and halves[1] and halves[0][1].lower() != halves[1][1].lower():
            return False
        gold, answer = _reduce_to_values(gold, answer)
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
        """Compare lists with an ellipsis by their written terms."""
        pairs = [re.split(r",|;", _ELLIPSIS.sub(",", text)) for text in (gold, answer)]
        num_ellipses = [len(_ELLIPSIS.findall(text)) for text in (gold, answer)]
        terms, others = ([part.strip("{}()[]\\ ") for part in parts] for parts in pairs)
        terms, others = list(filter(None, terms)), list(filter(None, others))
        if num_ellipses[0] != num_ellipses[1] or len(terms) != len(others):
            return False
        verdicts = [self._same(*pair) for pair in zip(terms, others, strict=True)]
        return None if None in verdicts else all(verdicts)

    def _test(self, extracted: Extracted, gold: CodeTests) -> Grade:
        program = Program(extracted.text or "", gold.names, gold.tests, gold.setup)
        failure = run_tests(program, self._limits).failure
        return _grade(
            extracted, not failure, out_of_time=failure == "time", failure=failure or None
        )


def _grade(
    extracted: Extracted, is_right: bool, *, out_of_time: bool = False, failure: str | None = None
) -> Grade:
    verdict: Verdict = "right" if is_right else "time" if out_of_time else "wrong"
    return Grade(*extracted, verdict if extracted.text else "no answer", failure)


def row_gold(answer: str) -> MathAnswer | None:
    """Return the reference of a row's answer. None: no answer, or a program, which can only be run.

    Rows have programs as Markdown blocks of code.
    """
    answer = answer.strip()
    return MathAnswer(answer) if answer and not answer.startswith("```") else None


def check_graders(golds: Iterable[Gold]) -> str:
    """Check that this machine can grade problems with these references.

    Returns:
        The reason why the sandbox has no namespaces. Empty if it has, or if no problem needs it.
    Raises:
        ValueError: math-verify is not installed, or the sandbox cannot run code.
    """
    kinds = {type(gold) for gold in golds}
    if MathAnswer in kinds and not importlib.util.find_spec("math_verify"):
        raise ValueError("grading needs math-verify: pip install 'aropd-mcore[eval]'")
    if CodeTests not in kinds:
        return ""
    # Import modules that an interpreter does not load at its start: the sandbox must be able to
    # read the standard library.
    code = "import decimal, typing, statistics, socket\ndef double(x): return 2 * x"
    outcome = run_tests(Program(code, ["double"], "assert double((1,)) == (1, 1)"))
    if outcome.failure:
        where = f"; not isolated: {outcome.not_isolated}" if outcome.not_isolated else ""
        raise ValueError(
            f"the sandbox for code does not work on this machine: a correct program failed with "
            f"{outcome.failure}{where}. Without isolation, root runs code as the user `nobody`: "
            f"give that user read access to {sys.base_prefix}"
        )
    return outcome.not_isolated
