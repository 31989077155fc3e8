"""Tests of graders on published answers and on responses of models."""

import gzip
import json

import pytest

from aropd_mcore.evaluation.extract import choice_letter, math_answer
from aropd_mcore.evaluation.grade import Graders
from aropd_mcore.evaluation.tasks import Choices, CodeTests, MathAnswer, Task, read_task

FOUR = Choices(("a red ball", "blue", "green", "None of these"), "C")
CODE = CodeTests(("f",), "assert f(2) == 4", header="K = 2\n", prompt="K = 2\ndef f(x):\n")


@pytest.fixture(scope="module")
def graders():
    """Graders for all tests, because their processes take a second to start."""
    with Graders() as graders:
        yield graders


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>1</answer> no, \\boxed{3} <answer> 2 </answer> \\boxed{4}", ("2", "answer")),
        ("<answer>\\boxed{\\frac{1}{2}}</answer>", ("\\frac{1}{2}", "answer")),
        ("<answer> </answer> so \\boxed{1} or \\boxed{\\{2\\}}\n#### 3", ("\\{2\\}", "boxed")),
        ("2 * 9 = 18\n#### 17\n#### 18 ducks\nDone in 5.", ("18 ducks", "hashes")),
        ("<answer>12 and $1,234.50 of them.", ("1,234.50", "number")),
        ("It is -3/4, I think", ("-3/4", "number")),
        ("I do not know", (None, "none")),
    ],
)
def test_math_answer_uses_the_first_rule_that_applies(text, expected):
    assert math_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>C</answer>", ("C", "answer")),
        ("<answer>(C) green</answer> The answer is A.", ("C", "answer")),
        ("<answer>Green.</answer>", ("C", "answer")),
        ("<answer>a red ball</answer>", ("A", "answer")),  # not the article
        ("<answer>E</answer>", (None, "none")),
        ("thus $\\boxed{\\text{C}}$", ("C", "boxed")),
        ("The answer is a mystery. Final answer: **(C)**", ("C", "phrase")),
        ("A is wrong.\n\n**C.**\n", ("C", "letter")),
        ("not (A), so (C) it is", ("C", "letter")),
        ("A ball is I", (None, "none")),
    ],
)
def test_choice_letter_uses_the_first_rule_that_applies(text, expected):
    assert choice_letter(text, FOUR) == expected


def test_rules_take_linear_time_for_repeated_marks():
    """Quadratic time would need hours and exceed the timeout of the test suite."""
    for piece in ("<answer>", "</answer>", "\\boxed{", "answer\n\n", "####", " 1,111", "```\n("):
        text = piece * 20_000
        math_answer(text), choice_letter(text, FOUR)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("18", ["18", "$18.00", "18 dollars", "**18**", "\\frac{36}{2}", "x = 18"], ["180", "-18"]),
        ("1,080", ["1080", "1{,}080", "1080.0"], ["1", "1.08"]),
        ("\\frac{1}{2}", ["0.5", "1/2", "\\dfrac12"], ["2", "1"]),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", ["(3, \\pi/2)"], ["(\\pi/2, 3)", "3"]),
        ("4.5e33", ["4.5 \\times 10^{33}", "4.5e33"], ["4.5", "4.5e32"]),
        ("\\text{Evelyn}", ["Evelyn"], ["Angela"]),
        ("2\\sqrt{3}", ["\\sqrt{12}"], ["\\sqrt{6}"]),
    ],
)
def test_grade_of_equal_answers_in_every_form_is_right(graders, gold, right, wrong):
    texts = [f"<answer>{text}</answer>" for text in (*right, *wrong)]
    grades = graders.grade_all((text, MathAnswer(gold)) for text in texts)
    assert [grade.verdict for grade in grades] == ["right"] * len(right) + ["wrong"] * len(wrong)


@pytest.mark.slow
def test_grade_of_an_answer_that_takes_forever_is_time_and_others_continue():
    gold = MathAnswer("18")
    hard = "<answer>9^{9^{9^{9}}}</answer>"
    with Graders(1, math_seconds=3.0) as graders:
        grades = graders.grade_all([(hard, gold), ("<answer>36/2</answer>", gold), ("", gold)])
        assert [grade.verdict for grade in grades] == ["time", "right", "no answer"]


@pytest.mark.slow
def test_grade_of_gsm8k_solutions_is_right_and_of_perturbed_ones_wrong(graders, shared_data):
    path = shared_data / "gsm8k" / "test.jsonl"
    problems = read_task(Task("gsm8k", path))
    assert len(problems) == 1319
    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    numbers = [int(solution.rpartition("####")[2].replace(",", "")) for solution in solutions]
    pairs = list(zip(numbers, solutions, strict=True))
    texts = {
        "hashes": solutions,
        "boxed": [f"So it is $\\boxed{{\\${number}.0}}$" for number in numbers],
        "number": [f"{s.partition('####')[0]}That is {number:,}." for number, s in pairs],
    }
    golds = [problem.gold for problem in problems]
    for rule, responses in texts.items():
        grades = graders.grade_all(zip(responses, golds, strict=True))
        assert {(grade.rule, grade.verdict) for grade in grades} == {(rule, "right")}
    for other in (lambda n: n + 1, lambda n: 10 * n + 5, lambda n: -n - 1):
        responses = [f"<answer>{other(number)}</answer>" for number in numbers]
        grades = graders.grade_all(zip(responses, golds, strict=True))
        assert {grade.verdict for grade in grades} == {"wrong"}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("<answer>\n```python\ndef f(x):\n    return x * K\n```\n</answer>", "answer"),
        ("<answer>def f(x): return x * K</answer>", "answer"),
        ("```\nf(3)\n```\n```\ndef f(x):\n    return x * K\n```\n```\nprint(f(2))\n```", "block"),
        ("Here:\n```python\ndef f(x):\n    return x * K\n", "block"),
        ("    return x * K\n", "text"),
    ],
)
def test_python_code_in_every_form_is_extracted(graders, text, rule):
    grade = graders.grade(text, CODE)
    assert (grade.verdict, grade.rule) == ("right", rule)


@pytest.mark.rest
@pytest.mark.slow
def test_grade_of_humaneval_solutions_is_right_and_of_altered_ones_wrong(graders, shared_data):
    path = shared_data / "humaneval" / "HumanEval.jsonl.gz"
    problems = read_task(Task("humaneval", path))
    assert len(problems) == 164
    records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    golds = [problem.gold for problem in problems]
    right = [record["canonical_solution"] for record in records]
    altered = [
        f"```python\n{r['prompt']}{r['canonical_solution']}\n_right = {r['entry_point']}\n"
        f"def {r['entry_point']}(*args):\n    return other(_right(*args))\n{OTHER}```"
        for r in records
    ]
    grades = graders.grade_all(zip(right, golds, strict=True))
    assert {grade.verdict for grade in grades} == {"right"}
    grades = graders.grade_all(zip(altered[::EVERY], golds[::EVERY], strict=True))
    assert {(grade.verdict, grade.failure) for grade in grades} <= {
        ("wrong", "AssertionError"),
        ("wrong", "TypeError"),
    }


def test_mbpp_tests_can_use_classes_of_the_response(graders, tmp_path):
    node = "class Node:\n  def __init__(self, data): self.left = self.right = None\n"
    height = "def height(node): return node and 1 + max(height(node.left), height(node.right)) or 0"
    record = {
        "text": "Find the height of a binary tree.",
        "code": node + height,
        "test_list": ["assert height(root) == 3"],
        "test_setup_code": "root = Node(1) \r\nroot.left = Node(2) \r\nroot.left.left = Node(4)",
    }
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(record))
    [problem] = read_task(Task("mbpp", tmp_path / "mbpp.jsonl"))
    for code, verdict in ((node + height, "right"), (node + "def height(n): return 2", "wrong")):
        text = f"The code:\n```python\n{code}\n```"
        assert graders.grade(text, problem.gold).verdict == verdict


EVERY = 4
"""Test every fourth altered solution, because a sandbox takes a tenth of a second."""
OTHER = """
def other(value):
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + type(value)('x')
"""
