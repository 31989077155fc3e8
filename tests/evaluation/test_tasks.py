"""Tests of reading problems from files in published formats."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from aropd_mcore.data.records import DataError
from aropd_mcore.evaluation.tasks import (
    Choices,
    CodeTests,
    MathAnswer,
    Problem,
    Task,
    parse_task,
    read_task,
)

ABC = ("first", "second", "third")
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\ndef half(x):\n    return x / 2\n\ndef f(x):\n    """Doc."""\n',
    "entry_point": "f",
    "canonical_solution": "    return half(x)\n",
    "test": "def check(candidate):\n    assert candidate(2) == half(2)\n",
}
MBPP = {
    "task_id": 602,
    "text": "Find the longest chain.",
    "code": "import re\r\nclass Pair:\r\n  pass\r\ndef unused(): pass\r\ndef chain(a): pass",
    "test_list": ["assert chain([Pair()]) == 1", "assert chain([]) == 0"],
    "test_setup_code": "",
}


def read_problems(folder: Path, *records: Any, task: str = "t") -> list[Problem]:
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_task(parse_task(f"{task}={path}"))


@pytest.mark.parametrize(
    ("record", "gold"),
    [
        ({"question": "q", "answer": "2 * 9 = <<2*9=18>>18\n#### 1,080"}, MathAnswer("1,080")),
        ({"problem": "q", "answer": 27.0, "solution": "s"}, MathAnswer("27")),
        ({"problem": "q", "solution": "so \\boxed{\\frac{1}{2}}."}, MathAnswer("\\frac{1}{2}")),
        *(
            ({"problem": "q", "solution": "so \\boxed{7}.", "answer": absent}, MathAnswer("7"))
            for absent in (None, float("nan"), " ")
        ),
        ({"question": "q", "reasoning": "z", "answer": "70"}, MathAnswer("70")),
        ({"question": "q", "choices": ABC, "answer": 2}, Choices(ABC, "C")),
        ({"question": "q", "options": ABC, "answer": "B", "answer_index": 1}, Choices(ABC, "B")),
        (
            {"question": "q", "options": dict(zip("ACB", ABC, strict=True)) | {"D": None}}
            | {"answer": "third", "answer_idx": "B"},
            Choices(("first", "third", "second"), "B"),
        ),
        (
            {"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 0},
            Choices(("a", "b", "c", "d"), "A"),
        ),
    ],
)
def test_read_task_detects_the_format_by_the_keys(tmp_path, record, gold):
    [problem] = read_problems(tmp_path, {"id": 7, **record})
    assert (problem.task, problem.id, problem.gold) == ("t", "7", gold)
    assert problem.question.startswith("q")
    if isinstance(gold, Choices):
        assert f"\nB. {gold.texts[1]}\n" in problem.question


def test_gpqa_choices_are_shuffled_the_same_way_every_time(tmp_path):
    wrong = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    records = [{"Question": f"q{i}", "Correct Answer": "right\n", **wrong} for i in range(40)]
    golds = [problem.gold for problem in read_problems(tmp_path, *records)]
    assert {gold.letter for gold in golds} == set("ABCD")
    assert all(gold.texts["ABCD".index(gold.letter)] == "right" for gold in golds)
    assert golds == [problem.gold for problem in read_problems(tmp_path, *records)]


def test_read_task_of_code_has_tests_header_and_names(tmp_path):
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    [problem] = read_task(Task("t", path))
    header = HUMANEVAL["prompt"].partition("def f")[0]
    tests = HUMANEVAL["test"] + "\n\ncheck(f)\n"
    assert problem.gold == CodeTests(("f",), tests, header, header, HUMANEVAL["prompt"])
    [problem] = read_problems(tmp_path, MBPP)
    assert isinstance(problem.gold, CodeTests)
    assert problem.gold.names == ("chain", "Pair") and problem.gold.setup == "import re"
    assert problem.gold.tests == "\n".join(MBPP["test_list"])
    assert MBPP["test_list"][0] in problem.question
    plus = {**MBPP, "test_imports": ["import math"], "test": "assert chain([]) == 0"}
    [problem] = read_problems(tmp_path, plus)
    assert problem.gold.tests == "import math\n\nassert chain([]) == 0"  # type: ignore[union-attr]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"jsonl\.gz: not a readable gzip file"):
        read_task(Task("t", path))


CHECK = """
METADATA = {}

def check(candidate):
    assert candidate(2) == half(2), "a message"
    assert True, "not about the candidate"
    for x in [3]:
        assert candidate(x) == 1.5
    assert abs(candidate([4,
        'it\\'s']) - 2) < 1e-6
    assert candidate(6) == 3
"""
CHECK_PLUS = """
def assertion(out, exp, atol):
    assert out == exp

def check(candidate):
    inputs, results = [[2]], [1]
    for inp, exp in zip(inputs, results):
        assertion(candidate(*inp), exp, 0)
"""


def test_code_prompts_with_code_asserts_n_show_up_to_n_asserts(tmp_path):
    def question(record, num_asserts=None):
        path = tmp_path / "task.jsonl"
        path.write_text(json.dumps(record) + "\n")
        [problem] = read_task(Task("t", path), code_asserts=num_asserts)
        assert problem.gold == read_task(Task("t", path))[0].gold
        return problem.question

    def shown(record, num_asserts=None):
        lines = question(record, num_asserts).splitlines()
        return [line for line in lines if line.startswith("assert")]

    checked = HUMANEVAL | {"test": CHECK}
    asserts = [
        "assert f(2) == half(2)",
        'assert abs(f([4, "it\'s"]) - 2) < 1e-06',
        "assert f(6) == 3",
    ]
    assert shown(checked) == [] and shown(checked, 2) == asserts[:2]
    assert shown(checked, 5) == asserts
    plus = HUMANEVAL | {"test": CHECK_PLUS}
    assert question(plus, 5) == question(plus)
    assert shown(MBPP) == shown(MBPP, 5) == MBPP["test_list"]
    assert shown(MBPP, 1) == MBPP["test_list"][:1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"query": "q", "reply": "a"},
            "task.jsonl:2: unknown format, expected gsm8k, medmcqa, gpqa, choices, humaneval, "
            "mbpp, math (`--task name:format=FILE`); found keys query, reply",
        ),
        ({"question": "q", "answer": "18"}, "format gsm8k: no line '#### answer' at the end"),
        (
            {"question": "q", "choices": ABC, "answer": 3},
            "neither a letter from A to C nor an index",
        ),
        ({"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 4}, "0 to 3"),
        ({**HUMANEVAL, "entry_point": "g"}, "'prompt' does not define 'entry_point'"),
        ({**MBPP, "code": "def other(): pass"}, "the tests use no name that 'code' defines"),
        ({"problem": "q", "solution": "18"}, "no 'answer', and no \\boxed{} in 'solution'"),
    ],
)
def test_read_task_with_an_invalid_record_names_its_line(tmp_path, record, message):
    path = tmp_path / "task.jsonl"
    path.write_text("\n" + json.dumps(record) + "\n")
    format = "gsm8k" if "gsm8k:" in message else None
    with pytest.raises(DataError) as raised:
        read_task(Task("t", path, format))
    assert message in str(raised.value) and f"{path}:2: " in str(raised.value)


@pytest.mark.parametrize("text", ["gsm8k", "=file", "name:gsm9k=file", "name="])
def test_parse_task_with_invalid_text_names_it(text):
    with pytest.raises(ValueError, match=r"^task '.*expected"):
        parse_task(text)
