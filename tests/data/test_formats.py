"""Records of published data sets: complete exchanges, their rows, and reasons to drop a record."""

import json

import pytest

from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.prepare import prepare

NAN = float("nan")
Q, BOX = "What is 3 + 4?", "Count on from 3: \\boxed{7}."
NO_BOX = "no 'answer', and no \\boxed{} in 'solution'"
PROOF = "the answer is 'proof': there is no final answer"
NO_NUMBER = "'answer' is neither a string nor a finite number"
THOUGHT = "Is it \\boxed{8}? No."
UNFINISHED = "the thought (<think>) has no end, so there is no answer"
BEHIND_USER = "'messages' has more than one turn after the last user turn"


def numina(**changed):
    return {"problem": Q, "solution": BOX, "answer": "7"} | changed


def row(**changed):
    return {"question": Q, "reasoning": BOX, "answer": "7"} | changed


def response(text):
    return {"prompt": Q, "response": text}


def turn(role, content, **extra):
    return {"role": role, "content": content, **extra}


USER, ASSISTANT = turn("user", Q), turn("assistant", BOX)


def chat(*turns, **extra):
    return {"messages": list(turns), **extra}


def part(text):
    return [{"type": "text", "text": text}]


KEPT = {
    "valid": (
        numina(problem_is_valid="Yes", solution_is_valid="Yes", question_type="MCQ"),
        (BOX, "7"),
    ),
    "empty answer": (numina(answer=" "), (BOX, "7")),
    "NaN answer": (numina(answer=NAN), (BOX, "7")),
    "nan answer": (numina(answer="nan"), (BOX, "7")),
    "NaN answer of a row": (row(answer=NAN), (BOX, "7")),
    "NaN solution": (numina(solution=NAN), ("", "7")),
    "NaN elsewhere": (row(system=NAN, id=NAN, messages=NAN, problem=NAN), (BOX, "7")),
    "NaN question": (numina(question=NAN), (BOX, "7")),
    "integer": (row(answer=7, reasoning="Count on from 3."), ("Count on from 3.", "7")),
    "integer only": ({"question": Q, "answer": 7}, ("", "7")),
    "question, solution, answer": ({"question": Q, "solution": BOX, "answer": "7"}, (BOX, "7")),
    "question, solution": ({"question": Q, "solution": BOX}, (BOX, "7")),
    "problem, reasoning, answer": ({"problem": Q, "reasoning": BOX, "answer": "7"}, (BOX, "7")),
    "answer in a box": (numina(answer="$\\boxed{7}$"), (BOX, "7")),
    "alpaca": ({"instruction": "What is", "input": "3 + 4?", "output": BOX}, (BOX, "7")),
    "alpaca without input": ({"instruction": Q, "input": "", "output": BOX}, (BOX, "7")),
    "tool_calls of NaN": (chat(USER | {"tool_calls": NAN}, ASSISTANT), (BOX, "7")),
    "blank before the brace": (
        numina(solution="\\boxed {\\frac{3}{4}}", answer=None),
        ("\\boxed {\\frac{3}{4}}", "\\frac{3}{4}"),
    ),
    "fbox": (numina(solution="It is \\fbox{12}.", answer=None), ("It is \\fbox{12}.", "12")),
    "no braces": (numina(solution="$\\boxed 9$.", answer=None), ("$\\boxed 9$.", "9")),
    "open box": (numina(solution=BOX + " Or \\boxed{", answer=""), (BOX + " Or \\boxed{", "7")),
    "thought, then a box": (
        response(f"<think>{THOUGHT}</think>{BOX}"),
        (f"{THOUGHT}\n\n{BOX}", "7"),
    ),
    "thought, then tags": (
        response(f"<think>{THOUGHT}</think><answer>7</answer>"),
        (THOUGHT, "7"),
    ),
    "thought opened by the prompt": (
        response(f"{THOUGHT}</think>\n{BOX}"),
        (f"{THOUGHT}\n\n{BOX}", "7"),
    ),
    "thought and solution of OpenThoughts": (
        response(
            f"<|begin_of_thought|>{THOUGHT}<|end_of_thought|>\n\n"
            f"<|begin_of_solution|>{BOX}<|end_of_solution|>"
        ),
        (f"{THOUGHT}\n\n{BOX}", "7"),
    ),
    "thought of a solution": (
        numina(solution=f"<think>{THOUGHT}</think>\n{BOX}", answer=None),
        (f"{THOUGHT}\n\n{BOX}", "7"),
    ),
    "chat with an answer": (chat(USER, turn("assistant", "Count."), answer=7), ("Count.", "7")),
    "chat with reasoning_content": (
        chat(USER, turn("assistant", BOX, reasoning_content=THOUGHT)),
        (f"{THOUGHT}\n\n{BOX}", "7"),
    ),
    "chat with reasoning": (
        chat(USER, turn("assistant", BOX, reasoning=THOUGHT)),
        (f"{THOUGHT}\n\n{BOX}", "7"),
    ),
    "reasoning beside a response": (
        response(BOX) | {"reasoning": THOUGHT},
        (f"{THOUGHT}\n\n{BOX}", "7"),
    ),
    "reasoning that the response has": (
        response(f"<think>{THOUGHT}</think>{BOX}") | {"reasoning": THOUGHT},
        (f"{THOUGHT}\n\n{BOX}", "7"),
    ),
    "empty history": ({"instruction": Q, "output": BOX, "history": []}, (BOX, "7")),
    "chat in parts": (chat(turn("user", part(Q)), turn("assistant", part(BOX))), (BOX, "7")),
    "chat beside its problem": (numina(messages=[USER, ASSISTANT]), (BOX, "7")),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": BOX}]},
        (BOX, "7"),
    ),
}

DROPPED = {
    "proof": (numina(solution="6 = 2 * 3.", answer="proof"), PROOF),
    "proof in other letters": (numina(answer=" Proof. "), PROOF),
    "proof in a box": (numina(solution="So \\boxed{\\text{proof}}.", answer=None), PROOF),
    "proof of a row": (row(answer="proof"), PROOF),
    "proof of a chat": (chat(USER, turn("assistant", "<answer>proof</answer>")), PROOF),
    "proof by its type": (
        numina(question_type="proof"),
        "'question_type' is 'proof': there is no final answer",
    ),
    "not found": (
        numina(answer="Not found"),
        "the answer is 'notfound': there is no final answer",
    ),
    "QED": (numina(answer="\\text{Q.E.D.}"), "the answer is 'qed': there is no final answer"),
    "example of the format": (
        response("<answer>your answer here</answer>"),
        "the answer is 'youranswerhere': there is no final answer",
    ),
    "history": (
        {"instruction": Q, "output": BOX, "history": [["Hi", "Hello"]]},
        "'history' has turns before the question: write all turns as 'messages'",
    ),
    "invalid problem": (numina(problem_is_valid="Incomplete"), "'problem_is_valid' is not 'Yes'"),
    "no solution": (
        numina(solution_is_valid="Problem not solved"),
        "'solution_is_valid' is not 'Yes'",
    ),
    "empty answer, no box": (numina(solution="Count.", answer=""), NO_BOX),
    "NaN answer, no box": (numina(solution="Count.", answer=NAN), NO_BOX),
    "NaN answer and solution": (numina(solution=NAN, answer=NAN), NO_BOX),
    "infinite answer": (numina(answer=float("inf")), NO_NUMBER),
    "true": (row(answer=True), NO_NUMBER),
    "two questions": (
        numina(question="And 4 + 5?"),
        "'problem' and 'question' differ: remove one of them",
    ),
    "empty question": (numina(problem=" "), "key 'question': expected a question"),
    "box within the thought only": (
        response(f"<think>{THOUGHT}</think>So it is."),
        "no <answer>...</answer> in 'response'",
    ),
    "unfinished thought": (response("<think>It is \\boxed{7}"), UNFINISHED),
    "unfinished thinking": (response("<thinking>It is \\boxed{7}"), UNFINISHED),
    "unfinished reasoning": (response("<reasoning>It is \\boxed{7}"), UNFINISHED),
    "box within the reasoning only": (
        response("<reasoning>It is \\boxed{7}</reasoning><answer>"),
        "no <answer>...</answer> in 'response'",
    ),
    "unfinished thought of a row": (row(reasoning="<think>It is \\boxed{7}"), UNFINISHED),
    "unfinished thought of a chat": (
        chat(USER, turn("assistant", "<think>\\boxed{7}")),
        UNFINISHED,
    ),
    "image": (
        chat(turn("user", [{"type": "image_url", "image_url": "x"}]), ASSISTANT),
        "a part of 'content' is not text",
    ),
    "two assistant turns": (chat(USER, turn("assistant", "\\boxed{8}"), ASSISTANT), BEHIND_USER),
    "system turn behind": (chat(USER, turn("system", "s"), ASSISTANT), BEHIND_USER),
    "tool call": (
        chat(USER, turn("assistant", "", tool_calls=[{"name": "f"}]), ASSISTANT),
        "a turn calls a tool",
    ),
    "tool": (
        chat(USER, turn("tool", "7"), ASSISTANT),
        "the role of a turn is not one of system, user, assistant",
    ),
    "no text": (chat(USER, turn("assistant", None)), "'content' is missing"),
    "two user turns": (
        chat(USER, USER, ASSISTANT),
        "the turns do not alternate between user and assistant, from a user turn on",
    ),
    "empty user turn": (
        chat(turn("user", " "), ASSISTANT),
        "the text of a turn is empty (role 'user')",
    ),
    "two system prompts": (
        chat(turn("system", "s"), USER, ASSISTANT, system="t"),
        "key 'system' and the system turn of 'messages' differ: remove one of them",
    ),
    "earlier turns beside a problem": (
        numina(messages=[USER, turn("assistant", "8"), USER, ASSISTANT]),
        "'messages' has several user turns: use --format messages",
    ),
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", KEPT)
def test_a_complete_exchange_is_kept(tmp_path, name):
    record, oracle = KEPT[name]
    report = prepare([write(tmp_path / "in.jsonl", record)], tmp_path / "out.jsonl")
    (kept,) = RowDataset.load([report.output])
    assert (kept.question.replace("\n\n", " "), kept.reasoning, kept.answer) == (Q, *oracle)
    assert (kept.system, kept.history, kept.id) == (None, (), "")


@pytest.mark.parametrize("name", DROPPED)
def test_an_incomplete_exchange_is_dropped_with_its_reason(tmp_path, name):
    record, reason = DROPPED[name]
    source = write(tmp_path / "in.jsonl", {"problem": "p", "answer": "1"}, record, record)
    report = prepare([source], tmp_path / "out.jsonl")
    assert report.dropped == {reason: 2} and len(RowDataset.load([report.output])) == 1
    assert f"2: {reason} (first at {source}:2)" in str(report)


def test_earlier_turns_become_part_of_the_prompt(tmp_path):
    earlier = [turn("user", "Keep the number 9 in mind."), turn("assistant", "Done.")]
    turns = [
        *earlier,
        turn("user", "What is it plus one?"),
        turn("assistant", "9 + 1 is \\boxed{10}"),
    ]
    sharegpt = [{"from": "system", "value": "s"}]
    sharegpt += [
        {"from": "human" if t["role"] == "user" else "gpt", "value": t["content"]} for t in turns
    ]
    source = write(tmp_path / "in.jsonl", {"messages": turns}, {"conversations": sharegpt})
    report = prepare([source], tmp_path / "out.jsonl")
    oracle = {"reasoning": "9 + 1 is \\boxed{10}", "answer": "10"}
    assert [json.loads(line) for line in report.output.open()] == [
        {"messages": turns[:3]} | oracle,
        {"messages": [turn("system", "s"), *turns[:3]]} | oracle,
    ]
    rows = RowDataset.load([report.output])
    for row in rows:
        assert row.history == tuple((t["role"], t["content"]) for t in earlier)
        assert row.question == "What is it plus one?"
    assert [row.system for row in rows] == [None, "s"]


# Pairs of a trace and an answer that agree, possibly in different notations, or that differ.
AGREE = [
    ("\\boxed{\\dfrac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\textbf{(113) }}", "113"),
    ("\\boxed{25}", "025"),
    ("\\boxed{1,025,000}", "1025000"),
    ("\\boxed{1{,}025}", "1025"),
    ("$\\boxed{ x + 1 }$", "$x+1$."),
    ("\\boxed{7}", 7.0),
    ("\\boxed{\\text{(B)}}", "B"),
    ("<answer>7</answer>", "7"),
    ("By 7.\n#### 7", "7"),
    ("\\boxed{3}, no: \\boxed{7}", "7"),
    ("<think>\\boxed{8}</think>It is \\boxed{7}", "7"),
    ("It is 8.", "7"),
]
DIFFER = [
    ("\\boxed{8}", "7"),
    ("By 8.\n#### 8", "7"),
    ("<answer>8</answer>", "7"),
    ("\\boxed{7}, no: \\boxed{8}", "7"),
    ("\\boxed{8} <answer>7</answer>", ""),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{3}"),
    ("\\boxed{1.05}", "15"),
    ("\\boxed{-7}", "7"),
]


def test_an_answer_that_the_trace_does_not_mark_is_kept_and_counted_in_doubt(tmp_path):
    records = [
        {"problem": f"{n}?", "solution": f"Count. {trace}", "answer": answer}
        for n, (trace, answer) in enumerate(AGREE + DIFFER)
    ]
    for number, record in enumerate(records):
        report = prepare([write(tmp_path / "in.jsonl", record)], tmp_path / "out.jsonl")
        assert report.num_in_doubt == (number >= len(AGREE)), record
    source = write(tmp_path / "in.jsonl", *records)
    report = prepare([source], tmp_path / "out.jsonl")
    assert report.kept.total() == len(records) and report.num_in_doubt == len(DIFFER)
    first = f"(first at {source}:{len(AGREE) + 1}): answer str '7', in the trace str '8'"
    assert f"{len(DIFFER)} of them are in doubt" in str(report) and first in str(report)
