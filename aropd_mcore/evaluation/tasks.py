"""Published benchmarks in local files -> problems: a question to ask, and what decides the answer.

format    a record has
gsm8k     question, answer (whose last line is `#### 18`)
math      problem or question, and answer, or a solution with \\boxed{}: MATH-500, AMC, AIME,
          Minerva, and rows as training reads them
choices   question, choices or options (a list, or letters with texts) and answer, answer_idx or
          answer_index (a letter, or a number from 0): MMLU, MMLU-Pro, MedQA
medmcqa   question, opa to opd, cop (from 0)
gpqa      Question, Correct Answer, Incorrect Answer 1 to 3
humaneval prompt, entry_point, test: HumanEval, HumanEval+
mbpp      text or prompt, code, test_list; test where there is one: MBPP, MBPP+
"""

import ast
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aropd_mcore.data.answer_marks import Unusable, answer_text, split_boxed, split_hashes
from aropd_mcore.data.multiple_choice import LETTERS, choice_question, medmcqa_choices
from aropd_mcore.data.records import DataError, is_absent, read_records

Record = dict[str, Any]
_ID_KEYS = ("task_id", "unique_id", "id", "idx", "question_id", "Record ID")


@dataclass(frozen=True)
class MathAnswer:
    """A number, an expression or a word, in LaTeX or plain."""

    text: str


@dataclass(frozen=True)
class Choices:
    """What the letters from A on stand for, and which one is right."""

    texts: tuple[str, ...]
    letter: str


@dataclass(frozen=True)
class CodeTests:
    """Tests that a response's code has to pass."""

    names: tuple[str, ...]
    """Functions and classes that the tests call; the first one is what was asked for."""
    tests: str
    setup: str = ""
    """Run beside the tests, before them."""
    header: str = ""
    """Goes before the response's code: imports and helpers that the question shows."""
    prompt: str = ""
    """Goes before a response that goes on with it: the header, signature and docstring."""


Gold = MathAnswer | Choices | CodeTests


@dataclass(frozen=True)
class Problem:
    task: str
    id: str
    question: str
    """The user's turn, before views.student_template."""
    gold: Gold


class Task(NamedTuple):
    """What `--task name:format=FILE` says; no format: by the keys of the first record."""

    name: str
    path: Path
    format: str | None = None


def parse_task(text: str) -> Task:
    """`name=FILE` or `name:format=FILE`.

    Raises:
        ValueError: it is neither, or there is no such format.
    """
    name, equals, path = text.partition("=")
    name, colon, format = name.partition(":")
    if not (name and equals and path):
        raise ValueError(f"task {text!r}: expected name=FILE or name:format=FILE")
    if colon and format not in _FORMATS:
        raise ValueError(f"task {text!r}: no format {format!r}; expected {', '.join(_FORMATS)}")
    return Task(name, Path(path), format or None)


def read_task(task: Task, *, code_asserts: int | None = None) -> list[Problem]:
    """Read a task's problems, in the order of its file.

    Args:
        code_asserts: show up to this many of a code problem's asserts in its question. None: the
            benchmark's own prompt, which is all of test_list for mbpp and none for humaneval.

    Raises:
        DataError: the file cannot be read or has no problems; a record is broken, or has no known
            format. The message names the file, the line, the keys found and the known formats.
    """
    problems, format = [], task.format
    for number, (origin, record) in enumerate(read_records(task.path), start=1):
        if isinstance(record, DataError):
            raise record
        record = {key: value for key, value in record.items() if not is_absent(value)}
        format = format or _detect(record, origin)
        try:
            shown = {"num_asserts": code_asserts} if _FORMATS[format].is_code else {}
            question, gold = _FORMATS[format].convert(record, **shown)
        except Unusable as error:
            found = "keys " + (", ".join(map(str, record)) or "none")
            raise DataError(origin, f"not a problem of format {format}: {error}", found) from error
        id = next((str(record[key]) for key in _ID_KEYS if key in record), str(number))
        problems.append(Problem(task.name, id, question, gold))
    if not problems:
        raise DataError(str(task.path), "expected at least one problem", "none")
    return problems


def _detect(record: Record, origin: str) -> str:
    for name, format in _FORMATS.items():
        if format.fits(record):
            return name
    problem = f"no known format; expected {', '.join(_FORMATS)} (`--task name:format=FILE`)"
    raise DataError(origin, problem, "keys " + (", ".join(map(str, record)) or "none"))


def _text(record: Record, *keys: str) -> str:
    """Under the first of the keys that there is."""
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


def _ask(question: str, choices: Sequence[str], right: int) -> tuple[str, Gold]:
    return choice_question(question, choices), Choices(tuple(choices), LETTERS[right])


def _from_choices(record: Record) -> tuple[str, Gold]:
    choices: Any = record.get("choices", record.get("options"))
    if isinstance(choices, dict):  # MedQA: {"A": ..., "B": ...}; Parquet fills up with nulls
        choices = [choices[letter] for letter in sorted(choices) if choices[letter] is not None]
    is_list = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not is_list or not 2 <= len(choices) <= len(LETTERS):
        raise Unusable("'choices' or 'options': expected from 2 to 26 texts")
    right = next((record[k] for k in ("answer_idx", "answer_index", "answer") if k in record), None)
    if isinstance(right, str) and len(right.strip()) == 1:
        right = LETTERS.find(right.strip().upper())
    if type(right) is not int or not 0 <= right < len(choices):
        raise Unusable(
            f"the answer is not a letter up to {LETTERS[len(choices) - 1]}, nor a number from 0 to "
            f"{len(choices) - 1}"
        )
    return _ask(_text(record, "question"), choices, right)


def _from_medmcqa(record: Record) -> tuple[str, Gold]:
    return _ask(_text(record, "question"), *medmcqa_choices(record))


def _from_gpqa(record: Record) -> tuple[str, Gold]:
    question, right = _text(record, "Question"), _text(record, "Correct Answer").strip()
    wrong = [_text(record, f"Incorrect Answer {number}").strip() for number in (1, 2, 3)]

    def place(choice: str) -> bytes:
        """The right one comes first in the file: an order of the question's own."""
        return hashlib.sha256(f"{question}\n{choice}".encode()).digest()

    choices = sorted([right, *wrong], key=place)
    return _ask(question, choices, choices.index(right))


# Code


def _from_humaneval(record: Record, num_asserts: int | None) -> tuple[str, Gold]:
    prompt, name = _text(record, "prompt"), _text(record, "entry_point")
    start = prompt.rfind(f"def {name}(")
    if start < 0:
        raise Unusable("'prompt' does not define 'entry_point'")
    tests = _text(record, "test")
    lines = ["Complete this Python function, and give all of it.", "", *_fenced(prompt.strip())]
    # HumanEval+ has megabytes of tests: they are parsed only if asserts are asked for.
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
    """The asserts of `check(candidate)` that call the candidate directly, under the name `name`.

    HumanEval states its tests so. HumanEval+ has lists of inputs and results instead, and a loop
    over them: it has no such assert.
    """
    try:
        functions = [s for s in ast.parse(tests).body if isinstance(s, ast.FunctionDef)]
    except SyntaxError as error:
        raise Unusable(f"'test' is not Python: {error.msg}") from error
    body = next((function.body for function in functions if function.name == "check"), [])
    found = []
    for statement in body:
        if not isinstance(statement, ast.Assert):
            continue
        names = [n for n in ast.walk(statement.test) if isinstance(n, ast.Name)]
        candidates = [node for node in names if node.id == "candidate"]
        for node in candidates:
            node.id = name
        if candidates:
            found.append(f"assert {ast.unparse(statement.test)}")
    return found


def _fenced(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]


def _from_mbpp(record: Record, num_asserts: int | None) -> tuple[str, Gold]:
    asserts = record.get("test_list")
    if not isinstance(asserts, list) or not all(isinstance(test, str) for test in asserts):
        raise Unusable("'test_list' is not a list of strings")
    imports = "\n".join(record.get("test_imports", []))
    body = _text(record, "test") if "test" in record else "\n".join(asserts)
    tests = "\n".join([imports, record.get("test_setup_code", ""), body]).strip()
    names, setup = _called(_text(record, "code"), tests)
    lines = [_text(record, "text", "prompt").strip(), "Write it in Python. It must pass:", ""]
    question = "\n".join([*lines, *_fenced(*asserts[:num_asserts])])
    return question, CodeTests(names, tests, setup=setup)


def _called(code: str, tests: str) -> tuple[tuple[str, ...], str]:
    """Names that the reference solution defines and the tests use, and its imports."""
    try:
        statements = ast.parse(code.replace("\r\n", "\n")).body
        used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    except SyntaxError as error:
        raise Unusable(f"'code' or its tests are not Python: {error.msg}") from error
    imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    defined = [s.name for s in statements if isinstance(s, ast.FunctionDef | ast.ClassDef)]
    # The last one that is used is what was asked for; those before it help.
    names = tuple(dict.fromkeys(name for name in reversed(defined) if name in used))
    if not names:
        raise Unusable("the tests use nothing that 'code' defines")
    return names, "\n".join(map(ast.unparse, imports))


class _Format(NamedTuple):
    convert: Callable[..., tuple[str, Gold]]
    """Takes the record, and num_asserts if is_code."""
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
"""In the order in which they are tried: the last ones have keys that others have too."""
