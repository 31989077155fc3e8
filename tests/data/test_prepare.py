"""Conversion of published formats to rows, and reasons to drop a record."""

import json

import pytest

from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.prepare import prepare
from aropd_mcore.data.records import DataError
from aropd_mcore.data.templates import partial_trace
from aropd_mcore.evaluation.tasks import Task, read_task

TAGGED = "<reasoning>\nHalf of 48\nis 24.\n</reasoning>\n<answer>\n72\n</answer>"
HALVES = "Half of 48\nis 24."
BOXED = "So $x=\\boxed{1}$, no: $\\boxed{\\frac{1}{2}\\text{ of \\} it}}$."


def turns(*contents, roles=("system", "user", "assistant")):
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]


# name: (format by detection, record, question, reasoning, answer)
KEPT = {
    "ours": ("rows", {"question": " q ", "reasoning": "z", "answer": "a"}, " q ", "z", "a"),
    "gsm8k": (
        "gsm8k",
        {"question": "q", "answer": "Half of 48\nis <<48/2=24>>24.\n#### 72"},
        "q",
        HALVES,
        "72",
    ),
    "numina": (
        "numina",
        {"source": "cn", "problem": "q", "solution": BOXED, "messages": []},
        "q",
        BOXED,
        "\\frac{1}{2}\\text{ of \\} it}",
    ),
    "aime": ("numina", {"problem": "q", "solution": BOXED, "answer": "204"}, "q", BOXED, "204"),
    "amc": ("numina", {"problem": "q", "answer": 27.0, "question": "q"}, "q", "", "27"),
    "tags": ("tags", {"prompt": "q", "response": TAGGED}, "q", HALVES, "72"),
    "tags in answer": ("tags", {"question": "q", "answer": TAGGED}, "q", HALVES, "72"),
    "tags, no reasoning tag": (
        "tags",
        {"instruction": "q", "output": "Half.\n<answer>72</answer>"},
        "q",
        "Half.",
        "72",
    ),
    "chat with tags": ("messages", {"messages": turns("s", "q", TAGGED)}, "q", HALVES, "72"),
    "chat with hashes": (
        "messages",
        {"messages": turns("s", "q", "#### Step 1\nHalf.\n#### 72\n")},
        "q",
        "#### Step 1\nHalf.",
        "72",
    ),
    "chat with a box": (
        "messages",
        {"messages": turns("s", "q", BOXED)},
        "q",
        BOXED,
        "\\frac{1}{2}\\text{ of \\} it}",
    ),
}

MEDMCQA = {
    "id": "e9ad821a",
    "question": " Which bone is in the thigh? ",
    "opa": "Femur",
    "opb": "Tibia",
    "opc": "Ulna",
    "opd": "Radius",
    "cop": 0,
    "choice_type": "single",
    "exp": "C. difficile is no bone.\nThe femur is the bone of the thigh.",
    "subject_name": "Anatomy",
    "topic_name": None,
}
"""Record with the keys of the data set on the Hub."""
MEDMCQA_QUESTION = (
    "Which bone is in the thigh?\n\nA. Femur\nB. Tibia\nC. Ulna\nD. Radius\n\n"
    "Answer with the letter of the choice."
)
EVOL = {
    "instruction": "Add two numbers.",
    "response": "Use `+`.\n\n```python\ndef add(a, b):\n\n\n    return a + b\n```\n\nTry:\n"
    "```\nadd(1, 2)\n```\nIt is 3.",
}
"""Record with the keys of Magicoder-Evol-Instruct-110K."""

NO_MARKER = "the assistant turn has no <answer>, '####' or \\boxed{}"
DROPPED = [
    ({"text": "x", "label": None}, "no known format for the keys text"),
    ({"question": "q", "answer": "no marker"}, "no <answer>...</answer> in 'answer'"),
    ({"problem": "q", "solution": "\\boxed{1"}, "no 'answer', and no \\boxed{} in 'solution'"),
    ({"problem": "q", "answer": ["1"]}, "'answer' is neither a string nor a finite number"),
    ({"problem": 3, "answer": "1"}, "'problem' is not a string"),
    ({"messages": turns("s", "q", "It is 72.")}, NO_MARKER),
    ({"messages": turns("s", "q", "It is 73.")}, NO_MARKER),
    ({"messages": turns("s", roles=["system"])}, "'messages' has no user turn"),
    (
        {"messages": turns("a", "q", roles=["assistant", "user"])},
        "'messages' has no assistant turn after the last user turn",
    ),
    ({"messages": "hello"}, "'messages' is not a list of objects with 'role' and 'content'"),
    ({"messages": turns("s", [], TAGGED)}, "'content' is not a string"),
    (
        {"question": "q", "reasoning": 7, "answer": "7"},
        "'reasoning' is not a string",
    ),
    (
        {"question": "q", "answer": "z\n#### 7", "sample_weight": -1},
        "key 'sample_weight': expected a finite number, at least 0",
    ),
]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_records(path, *records):
    if path.suffix != ".parquet":
        return write(path, *records)
    import pyarrow as pa
    from pyarrow import parquet

    return parquet.write_table(pa.Table.from_pylist(records), path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_each_format_is_converted_to_a_row(tmp_path, name, suffix):
    format, record, question, reasoning, answer = KEPT[name]
    source = tmp_path / f"in.{suffix}"
    write_records(source, record)
    expected = {"question": question, "reasoning": reasoning, "answer": answer}
    if format == "messages":
        expected["system"] = "s"
    for choice in ("auto", format):
        report = prepare([source], tmp_path / "new" / "out.jsonl", format=choice)
        assert read(report.output) == [expected]
        assert report.kept == {format: 1} and not report.dropped
        assert report.num_without_reasoning == (reasoning == "")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_medmcqa_rows_have_the_questions_of_evaluation(tmp_path, suffix):
    def record(**changed):
        return MEDMCQA | changed

    explanations = [
        *("Ans. is 'a' i.e., Femur", "Answer- A. Femur*", "(a) Femur", "Ans: A", "a i.e. Femur"),
        *("The correct answer is A: Femur", "Option A is correct. The", "Ans is A i.e. Femur"),
    ]
    records = [record(), record(cop=3), record(cop=-1), record(exp=None)]
    source = tmp_path / f"train.{suffix}"
    write_records(source, *records, *(record(exp=text) for text in explanations))
    report = prepare([source], tmp_path / "out.jsonl")
    row = {"id": MEDMCQA["id"], "question": MEDMCQA_QUESTION, "reasoning": MEDMCQA["exp"]}
    assert read(report.output) == [row | {"answer": "A"}, row | {"answer": "D"}]
    [problem] = read_task(Task("medmcqa", write(tmp_path / "task.jsonl", MEDMCQA)))
    assert problem.question == MEDMCQA_QUESTION
    assert report.kept == {"medmcqa": 2}
    words = write(tmp_path / "words.jsonl", record(exp="Die-cast rods hold the femur."))
    assert prepare([words], tmp_path / "kept.jsonl").kept == {"medmcqa": 1}
    assert sorted(report.dropped.values()) == [1, 1, len(explanations)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_code_record_has_the_program_as_answer_and_the_prose_as_reasoning(tmp_path, suffix):
    source = tmp_path / f"in.{suffix}"
    responses = ["No program.", "An open one:\n```python\nx = 1", "```python\nx = 1\n```"]
    records = [EVOL, *({"instruction": "q", "response": text} for text in responses)]
    write_records(source, *records)
    report = prepare([source], tmp_path / "out.jsonl", format="code")
    program = "```python\ndef add(a, b):\n\n\n    return a + b\n```"
    prose = "Use `+`.\n\nTry:\nIt is 3."
    assert read(report.output) == [
        {"question": "Add two numbers.", "reasoning": prose, "answer": program},
        {"question": "q", "reasoning": "", "answer": responses[2]},
    ]
    assert report.dropped == {
        "no code block (```) in 'response'": 1,
        "a code block in 'response' has no end": 1,
    }
    assert report.num_without_reasoning == 1


def test_code_blocks_end_at_a_fence_of_the_same_length(tmp_path):
    responses = [
        "Nested:\n````md\n```python\nx = 1\n```\n````\nEnd.",
        "1. A list:\n   ```python\n   if x:\n       y = 1\n   ```\nEnd.",
        "Use ```x``` here.\n```python\nx = 1\n```",
        "Empty:\n```python\n\n```",
    ]
    records = [{"instruction": "q", "response": text} for text in responses]
    source = write(tmp_path / "in.jsonl", *records)
    report = prepare([source], tmp_path / "out.jsonl", format="code")
    assert [(row["reasoning"], row["answer"]) for row in read(report.output)] == [
        ("Nested:\nEnd.", "````md\n```python\nx = 1\n```\n````"),
        ("1. A list:\nEnd.", "```python\nif x:\n    y = 1\n```"),
        ("Use ```x``` here.", "```python\nx = 1\n```"),
    ]
    assert report.dropped == {"the first code block in 'response' is empty": 1}


def test_rows_are_drawn_by_seed_and_counted(tmp_path):
    records = [{"question": f"q{n}", "answer": f"word\n#### {n}"} for n in range(200)]
    source = write(tmp_path / "in.jsonl", *records, {"question": "q", "answer": "no marker"})

    def drawn(seed, num_rows=50):
        report = prepare([source], tmp_path / "out.jsonl", num_rows=num_rows, seed=seed)
        assert report.kept == {"gsm8k": num_rows} and report.dropped.total() == 1
        # Each trace is one word, so the report notes every written row.
        assert report.num_whole_partials == num_rows
        assert "drawn from 200 usable ones" in str(report) or num_rows == 200
        return [int(row["answer"]) for row in read(report.output)]

    first = drawn(1)
    assert first == sorted(set(first)) == drawn(1) and first != drawn(2)
    assert sum(number < 100 for number in first) in range(13, 38)  # of a fair draw, 25 ± 3.5 sigma
    assert drawn(1, 200) == list(range(200))
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(DataError, match="expected at least 201 usable rows, nothing is written"):
        prepare([source], tmp_path / "out.jsonl", num_rows=201)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_partial_trace_that_is_the_whole_trace_is_counted(tmp_path):
    traces = ["x" * 600, "One and one is two.", "", "一加一等于二，因为我们从一开始数。"]
    # A Thai trace has no spaces, so its cut decides whether it is counted.
    traces.append("สองบวกสองเท่ากับสี่เพราะว่าเรานับหนึ่งสองสามสี่")
    records = [{"question": "?", "reasoning": trace, "answer": "2"} for trace in traces]
    source = write(tmp_path / "in.jsonl", *records, records[1])
    report = prepare([source], tmp_path / "out.jsonl")
    num_whole = sum(partial_trace(trace, 0.5) == trace for trace in traces if trace)
    assert report.num_whole_partials == num_whole >= 1
    assert f"{num_whole} of them show the teacher the whole trace in both views" in str(report)
    assert (report.num_without_reasoning, report.num_repeated) == (1, 1)
    assert f"1 of them repeat the prompt and trace of an earlier row (first at {source}:6)" in str(
        report
    )


def test_an_output_with_a_suffix_of_another_format_is_refused(tmp_path):
    source = write(tmp_path / "in.jsonl", KEPT["gsm8k"][1])
    for name in ("rows.parquet", "rows.jsonl.gz"):
        with pytest.raises(ValueError, match="expected a JSONL file"):
            prepare([source], tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_report_counts_dropped_records_by_reason(tmp_path):
    source = tmp_path / "in.jsonl"
    kept = {"id": 7, "question": "q", "answer": "z\n#### 1", "sample_weight": 2, "system": "s"}
    write(source, kept, *(record for record, _ in DROPPED))
    with source.open("a") as file:
        file.write("{not JSON\n{nor this, elsewhere: 1\n")
    report = prepare([source, source], tmp_path / "out.jsonl")
    row = {
        "id": "7",
        "question": "q",
        "reasoning": "z",
        "answer": "1",
        "system": "s",
        "sample_weight": 2.0,
    }
    assert read(report.output) == [row, row]
    expected = {"the line is not JSON": 4}
    for _, reason in DROPPED:
        expected[reason] = expected.get(reason, 0) + 2
    assert report.dropped == expected
    text = str(report)
    assert "kept 2 rows (2 gsm8k)" in text and f"dropped {sum(expected.values())}" in text
    for number, (_, reason) in enumerate(DROPPED, start=2):
        if number != 8:  # The second record without a marker: the first one is the example.
            assert f"2: {reason} (first at {source}:{number})" in text or reason == NO_MARKER
    assert f"4: {NO_MARKER} (first at {source}:7)" in text


def test_the_output_is_complete_or_unchanged(tmp_path):
    good, bad = KEPT["gsm8k"][1], DROPPED[0][0]
    output = write(tmp_path / "out.jsonl", good)
    before = output.read_bytes()
    with pytest.raises(DataError, match=r"bad\.jsonl: no record is usable, nothing is written"):
        prepare([write(tmp_path / "bad.jsonl", bad)], output)
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        prepare([output, tmp_path / "absent.jsonl"], output)
    with pytest.raises(ValueError, match="format 'gsm': expected one of auto, rows, gsm8k, numin"):
        prepare([output], output, format="gsm")
    assert output.read_bytes() == before
    prepare([output], output)  # In place: the input is read completely first.
    assert read(output) == [
        dict(zip(("question", "reasoning", "answer"), KEPT["gsm8k"][2:], strict=True))
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "out.jsonl"]


def test_published_files_are_converted_completely(shared_data, tmp_path):
    output = tmp_path / "rows.jsonl"
    for name, count, num_without_reasoning in (
        ("gsm8k/train", 7473, 0),
        ("gsm8k/test", 1319, 0),
        ("amc23/test", 40, 40),
        ("aime24/test", 30, 0),
    ):
        report = prepare([shared_data / f"{name}.jsonl"], output)
        assert report.kept.total() == count and not report.dropped
        assert report.num_without_reasoning == num_without_reasoning
        assert report.num_in_doubt == report.num_repeated == 0
        rows = RowDataset.load([output])
        assert len(rows) == count
        for row in rows:
            assert "<<" not in row.reasoning and "####" not in row.reasoning
            assert row.answer and row.answer == row.answer.strip() and "\n" not in row.answer
            if not name.startswith("gsm8k"):
                int(row.answer)  # AMC's whole floats are written as integers.
