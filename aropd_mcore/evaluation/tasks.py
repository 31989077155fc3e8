"""Reading of published benchmarks from local files. A problem is a question and its reference.

format    keys of a record
gsm8k     question, answer (its last line is `#### 18`)
math      problem or question, and answer or a solution with \\boxed{}: MATH-500, AMC, AIME,
          Minerva, and training rows
choices   question, choices or options (a list, or letters with texts), and answer, answer_idx or
          answer_index (a letter, or an index from 0): MMLU, MMLU-Pro, MedQA
medmcqa   question, opa to opd, cop (index from 0)
gpqa      Question, Correct Answer, Incorrect Answer 1 to 3
humaneval prompt, entry_point, test: HumanEval, HumanEval+
mbpp      text or prompt, code, test_list, and optionally test: MBPP, MBPP+
"""

import ast
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aropd_mcore.config import source_name, split_task
from aropd_mcore.data.answer_marks import Unusable, answer_text, split_boxed, split_hashes
from aropd_mcore.data.multiple_choice import LETTERS, choice_question, medmcqa_choices
from aropd_mcore.data.records import DataError, is_absent, read_records

Record = dict[str, Any]
_ID_KEYS = ("task_id", "unique_id", "id", "idx", "question_id", "Record ID")


@dataclass(frozen=True)
class MathAnswer:
    """Reference of a mathematical problem: a number, an expression or words, in LaTeX or plain."""

    text: str


@dataclass(frozen=True)
class Choices:
    """Reference of a multiple-choice problem."""

    texts: tuple[str, ...]
    """Texts of the choices A, B, ..."""
    letter: str
    """Letter of the right choice."""


@dataclass(frozen=True)
class CodeTests:
    """Reference of a code problem: tests that the response's code must pass."""

    names: tuple[str, ...]
    """Functions and classes that the tests use. The first one is the requested one."""
    tests: str
    """Statements that raise an exception if the code is wrong."""
    setup: str = ""
    """Code that runs before the tests, in their process."""
    header: str = ""
    """Imports and helpers that the question shows. They are placed before the response's code."""
    prompt: str = ""
    """Header, signature and docstring, placed before a response that continues them."""


Gold = MathAnswer | Choices | CodeTests


@dataclass(frozen=True)
class Problem:
    """A problem of a task."""

    task: str
    """Name of the task."""
    id: str
    question: str
    """Text of the user turn, before views.student_template is applied."""
    gold: Gold


class Task(NamedTuple):
    """Value of `--task name:format=FILE`."""

    name: str
    path: Path
    format: str | None = None
    """Format of the records. None: detected from the keys of the first record."""


def parse_task(text: str) -> Task:
    """Parse `name=FILE` or `name:format=FILE`.

    Raises:
        ValueError: the text has another form, or the format is unknown.
    """
    name, format, path = split_task(text)
    if not (name and path):
        raise ValueError(f"task {text!r}: expected name=FILE or name:format=FILE")
    if format is not None and format not in _FORMATS:
        expected = ", ".join(_FORMATS)
        raise ValueError(f"task {text!r}: unknown format {format!r}, expected {expected}")
    return Task(name, Path(path), format)


def read_task(task: Task, *, code_asserts: int | None = None) -> list[Problem]:
    """Read a task's problems, in the order of its file.

    Args:
        code_asserts: maximum number of asserts to show in a code problem's question. None: the
            benchmark's own prompt, which shows all of test_list for mbpp and none for humaneval.
    Raises:
        DataError: the file cannot be read or has no problems, or a record is invalid or has an
            unknown format. The message names the file, the line, the record's keys and the known
            formats.
    """
    problems, format = [], task.format
    for number, (origin, record) in enumerate(read_records(task.path), start=1):
        if isinstance(record, DataError):
            raise record
        record = {key: value for key, value in record.items() if not is_absent(value)}
        format = format or _detect_format(record, origin)
        try:
            shown = {"num_asserts": code_asserts} if _FORMATS[format].is_code else {}
            question, gold = _FORMATS[format].convert(record, **shown)
        except Unusable as error:
            problem = f"not a problem of format {format}: {error}"
            raise DataError(origin, problem, _list_keys(record)) from error
        id = next((str(record[key]) for key in _ID_KEYS if key in record), str(number))
        problems.append(Problem(task.name, id, question, gold))
    if not problems:
        raise DataError(source_name(task.path), "expected at least one problem", "none")
    return problems


def _detect_format(record: Record, origin: str) -> str:
    for name, format in _FORMATS.items():
        if format.fits(record):
            return name
    problem = f"unknown format, expected {', '.join(_FORMATS)} (`--task name:format=FILE`)"
    raise DataError(origin, problem, _list_keys(record))


def _list_keys(record: Record) -> str:
    return "keys " + (", ".join(map(str, record)) or "none")


def _text(record: Record, *keys: str) -> str:
    """Return the text under the first of `keys` that the record has."""
    for key in keys:
        if key in record:
            if not isinstance(record[key], str):
                raise Unusable(f"{key!r} is not a string")
            return record[key]
    raise Unusable(f"{' and '.join(map(repr, keys))} missing")


# Mathematics


def _from_gsm8k(record: Record) -> tuple[str, Gold]:
    solution = split_hashes(_text(record, "answer"))
    if solution is None:
        raise Unusable("no line '#### answer' at the end of 'answer'")
    return _text(record, "question").strip(), MathAnswer(solution[1])


def _from_math(record: Record) -> tuple[str, Gold]:
    question = _text(record, "problem", "question").strip()
    if answer := answer_text(record.get("answer", "")):
        return question, MathAnswer(answer)
    solution = split_boxed(_text(record, "solution"))
    if solution is None:
        raise Unusable("no 'answer', and no \\boxed{} in 'solution'")
    return question, MathAnswer(solution[1])


# Multiple choice


def _choices_problem(question: str, choices: Sequence[str], right: int) -> tuple[str, Gold]:
    return choice_question(question, choices), Choices(tuple(choices), LETTERS[right])


def _from_choices(record: Record) -> tuple[str, Gold]:
    choices: Any = record.get("choices", record.get("options"))
    if isinstance(choices, dict):  # MedQA: {"A": ..., "B": ...}, with nulls in Parquet
        choices = [choices[letter] for letter in sorted(choices) if choices[letter] is not None]
    is_list = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not is_list or not 2 <= len(choices) <= len(LETTERS):
        raise Unusable("'choices' or 'options': expected from 2 to 26 texts")
    right = next((record[k] for k in ("answer_idx", "answer_index", "answer") if k in record), None)
    if isinstance(right, str) and len(right.strip()) == 1:
        right = LETTERS.find(right.strip().upper())
    if type(right) is not int or not 0 <= right < len(choices):
        raise Unusable(
            f"the answer is neither a letter from A to {LETTERS[len(choices) - 1]} nor an index "
            f"from 0 to {len(choices) - 1}"
        )
    return _choices_problem(_text(record, "question"), choices, right)


def _from_medmcqa(record: Record) -> tuple[str, Gold]:
    return _choices_problem(_text(record, "question"), *medmcqa_choices(record))


def _from_gpqa(record: Record) -> tuple[str, Gold]:
    question, right = _text(record, "Question"), _text(record, "Correct Answer").strip()
    wrong = [_text(record, f"Incorrect Answer {number}").strip() for number in (1, 2, 3)]

    # The right answer comes first in the file: shuffle by a hash.
    def sort_key(choice: str) -> bytes:
        return hashlib.sha256(f"{question}\n{choice}".encode()).digest()

    choices = sorted([right, *wrong], key=sort_key)
    return _choices_problem(question, choices, choices.index(right))


# Code


def _from_humaneval(record: Record, num_asserts: int | None) -> tuple[str, Gold]:
    prompt, name = _text(record, "prompt"), _text(record, "entry_point")
    start = prompt.rfind(f"def {name}(")
    if start < 0:
        raise Unusable("'prompt' does not define 'entry_point'")
    tests = _text(record, "test")
    lines = ["Complete this Python function, and give all of it.", "", *_fenced(prompt.strip())]
    # Parse the tests only if asserts are shown: HumanEval+ has megabytes of them.
    if num_asserts and (shown := _candidate_asserts(tests, name)[:num_asserts]):
        lines += ["", "These are some of the tests that it must pass:", "", *_fenced(*shown)]
    return "\n".join(lines), CodeTests(
        names=(name,),
        tests=f"{tests}\n\ncheck({name})\n",
        setup=prompt[:start],
        header=prompt[:start],
        prompt=prompt,
    )


def _candidate_asserts(tests: str, name: str) -> list[str]:
    """Extract the asserts in `check(candidate)` that call the candidate, and rename it to `name`.

    HumanEval's tests are such asserts. HumanEval+ loops over lists of inputs and results instead,
    so the result is empty.
    """
    try:
        functions = [s for s in ast.parse(tests).body if isinstance(s, ast.FunctionDef)]
    except SyntaxError as error:
        raise Unusable(f"'test' is not Python: {error.msg}") from error
    body = next((function.body for function in functions if function.name == "check"), [])
    asserts = []
    for statement in body:
        if not isinstance(statement, ast.Assert):
            continue
        names = [n for n in ast.walk(statement.test) if isinstance(n, ast.Name)]
        candidates = [node for node in names if node.id == "candidate"]
        for node in candidates:
            node.id = name
        if candidates:
            asserts.append(f"assert {ast.unparse(statement.test)}")
    return asserts


def _fenced(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]


def _from_mbpp(record: Record, num_asserts: int | None) -> tuple[str, Gold]:
    asserts = record.get("test_list")
    if not isinstance(asserts, list) or not all(isinstance(test, str) for test in asserts):
        raise Unusable("'test_list' is not a list of strings")
    imports = "\n".join(record.get("test_imports", []))
    body = _text(record, "test") if "test" in record else "\n".join(asserts)
    tests = "\n".join([imports, record.get("test_setup_code", ""), body]).strip()
    names, setup = _tested_names(_text(record, "code"), tests)
    lines = [_text(record, "text", "prompt").strip(), "Write it in Python. It must pass:", ""]
    question = "\n".join([*lines, *_fenced(*asserts[:num_asserts])])
    return question, CodeTests(names, tests, setup=setup)


def _tested_names(code: str, tests: str) -> tuple[tuple[str, ...], str]:
    """Return the names that the solution defines and the tests use, and the solution's imports."""
    try:
        statements = ast.parse(code.replace("\r\n", "\n")).body
        used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    except SyntaxError as error:
        raise Unusable(f"'code' or its tests are not Python: {error.msg}") from error
    imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    defined = [s.name for s in statements if isinstance(s, ast.FunctionDef | ast.ClassDef)]
    # The last name that is used is the requested one. The names before it are helpers.
    names = tuple(dict.fromkeys(name for name in reversed(defined) if name in used))
    if not names:
        raise Unusable("the tests use no name that 'code' defines")
    return names, "\n".join(map(ast.unparse, imports))


class _Format(NamedTuple):
    convert: Callable[..., tuple[str, Gold]]
    """Converts a record to a question and a gold. Also takes num_asserts if is_code."""
    fits: Callable[[Record], bool]
    is_code: bool = False


def _has(*keys: str, one_of: Sequence[str] = ()) -> Callable[[Record], bool]:
    def fits(record: Record) -> bool:
        return set(keys) <= set(record) and (not one_of or not set(one_of).isdisjoint(record))

    return fits


def _is_gsm8k(record: Record) -> bool:
    return "question" in record and "####" in str(record.get("answer"))


def _is_math(record: Record) -> bool:
    answers = {"answer", "solution"} if "problem" in record else {"answer"}
    return not {"problem", "question"}.isdisjoint(record) and not answers.isdisjoint(record)


_FORMATS = {
    "gsm8k": _Format(_from_gsm8k, _is_gsm8k),
    "medmcqa": _Format(_from_medmcqa, _has("question", "opa", "opb", "opc", "opd")),
    "gpqa": _Format(_from_gpqa, _has("Question", "Correct Answer")),
    "choices": _Format(_from_choices, _has("question", one_of=("choices", "options"))),
    "humaneval": _Format(_from_humaneval, _has("prompt", "entry_point", "test"), True),
    "mbpp": _Format(_from_mbpp, _has("code", "test_list", one_of=("text", "prompt")), True),
    "math": _Format(_from_math, _is_math),
}
"""Formats in the order of detection. The last ones have keys that other formats have, too."""
