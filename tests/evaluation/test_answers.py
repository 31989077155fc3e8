"""Tests of verdicts on answers in the forms that models write."""

import json

import pytest

from aropd_mcore.evaluation.extract import math_answer
from aropd_mcore.evaluation.grade import Graders
from aropd_mcore.evaluation.tasks import Choices, CodeTests, MathAnswer, Task, read_task
from tests.evaluation.answer_cases import CHOICES, HUMANEVAL, MATHEMATICS, OTHER_CHOICES


@pytest.fixture(scope="module")
def graders():
    """Graders for all tests, because their processes take a second to start."""
    with Graders() as graders:
        yield graders


def find_wrong_verdicts(graders, cases):
    """Return the cases whose verdict differs from the expected one."""
    grades = graders.grade_all((response, gold) for gold, response, _ in cases)
    return [
        (*case, grade)
        for case, grade in zip(cases, grades, strict=True)
        if (grade.verdict == "right") != case[2]
    ]


@pytest.mark.slow
def test_grade_of_mathematical_answers_in_every_form_is_expected(graders):
    cases = [(MathAnswer(gold), response, right) for gold, response, right in MATHEMATICS]
    assert not find_wrong_verdicts(graders, cases)


def test_grade_of_choices_in_every_form_is_expected(graders):
    texts = ("12", "15", "18 cm", "none of these")
    cases = [(Choices(texts, gold), response, right) for gold, response, right in CHOICES]
    cases += [
        (Choices(texts, gold), response, right) for texts, gold, response, right in OTHER_CHOICES
    ]
    assert not find_wrong_verdicts(graders, cases)


def test_grade_of_code_that_passes_the_published_harness_is_right(graders, shared_data):
    path = shared_data / "humaneval" / "HumanEval.jsonl.gz"
    golds = {problem.id: problem.gold for problem in read_task(Task("humaneval", path))}
    cases = [(golds[id], f"```python{code}```", True) for id, code in HUMANEVAL.items()]
    assert not find_wrong_verdicts(graders, cases)


def test_grade_of_an_unfinished_thought_is_no_answer(graders):
    golds = [
        MathAnswer("3"),
        Choices(("3", "4"), "A"),
        CodeTests(("f",), "assert f(2) == 4", prompt="def f(x):\n"),
    ]
    text = "<think><answer>3</answer> The answer is A. \\boxed{3}\n```\ndef f(x): return 4\n```"
    assert {grade.verdict for grade in graders.grade_all((text, gold) for gold in golds)} == {
        "no answer"
    }
    code = f"{text}</think>\n```\ndef f(x): return x * x\n```"
    assert graders.grade(code, golds[2]).verdict == "right"


FORMS = {
    "headings": ("#### Step 1\n{z}\n#### Result\nThe answer is {a}.", True),
    "numbered steps": ("1. {z}\n2. That is all.\n\nThe answer is {a}.", True),
    "box in a thought": ("<think>{z} \\boxed{{{b}}}</think>\n\nIt is **{a}**.", True),
    "thought of the prompt": ("{z} \\boxed{{{b}}}</think>\n\n\\boxed {{{a}}}", True),
    "fbox": ("{z} $\\fbox{{{a}}}$ in 3 steps.", True),
    "dollars": ("{z} The answer is ${a}.00.", True),
    "formula": ("{z} The answer is ${a}$.", True),
    "bold": ("{z} The answer is **{a}**, after 2 steps.", True),
    "unit": ("{z}\n\n**Answer:** {a} dollars per day", True),
    "heading": ("{z}\n\n## Final Answer\n\n{a}", True),
    "tags": (
        "<reasoning>{z}</reasoning><answer>\u20ac{a}</answer> in <answer> and </answer>.",
        True,
    ),
    "negative": ("{z} The answer is \u2212{a}.", False),
    "cut off": ("<think>{z} \\boxed{{{a}}} Let me", False),
    "denominator": ("{z} So it is $\\frac{{7}}{{{a}}}$.", False),
}


@pytest.mark.parametrize("form", FORMS)
def test_grade_of_gsm8k_solutions_in_every_form_is_expected(graders, shared_data, form):
    template, right = FORMS[form]
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:25]
    cases = []
    for line in lines:
        reasoning, _, answer = json.loads(line)["answer"].partition("\n#### ")
        text = template.format(z=reasoning, a=answer.replace(",", ""), b=f"{answer}1")
        cases.append((MathAnswer(answer), text, right))
    assert not find_wrong_verdicts(graders, cases)


def test_grade_of_aime_solutions_is_right(graders, shared_data):
    path = shared_data / "aime24" / "test.jsonl"
    problems = read_task(Task("aime24", path))
    solutions = [json.loads(line)["solution"] for line in path.read_text().splitlines()]
    pairs = zip(problems, solutions, strict=True)
    assert not find_wrong_verdicts(graders, [(p.gold, solution, True) for p, solution in pairs])


@pytest.mark.parametrize("piece", ["$", "{", "**", "\\!", "~", "\n", "answer: 1 "])
def test_stated_choice_and_same_answer_of_100_000_repeated_marks_finish(graders, piece):
    text = piece * (100_000 // len(piece))
    choices = Choices(("1", "2"), "A")
    for response in (text, f"<answer>1{text}!</answer>"):
        graders.grade(response, choices)
        graders.grade(response, MathAnswer("1"))


@pytest.mark.parametrize(
    "piece", ["$", "\\(", "\\frac{", "1, ", "(1", "x^", "answer: 1 ", "<think>", "**"]
)
def test_math_answer_of_100_000_repeated_marks_finishes(piece):
    """A rule that takes quadratic time would need hours."""
    math_answer(piece * 100_000)
    math_answer(piece * 100_000, words=True)
