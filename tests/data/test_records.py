"""Files of records: an unreadable file, line or value gives an error of one line with its place."""

import datetime
import gzip
import json
import random
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.prepare import prepare
from aropd_mcore.data.records import DataError, read_records

GOOD = {"question": "What is 3 + 4?", "reasoning": "Count on from 3.", "answer": "7"}
LINE = json.dumps(GOOD).encode()


def write(path, data):
    path.write_bytes(data)
    return path


def table(**columns):
    return pa.table({key: [value] for key, value in GOOD.items()} | columns)


def read_errors(path, output=None):
    """Return the errors of training and of `prepare` for a file. Empty if both read the file."""
    messages = []
    try:
        RowDataset.load([path])
    except DataError as error:
        messages.append(str(error))
    try:
        report = prepare([path], output or path.parent / "out.jsonl")
        messages += [f"{path}: {reason}" for reason in report.dropped]
    except DataError as error:
        messages.append(str(error))
    return messages


UNREADABLE = {
    "array.json": (b"[\n  " + LINE + b"\n]\n", "found a JSON array"),
    "array_in_a_line.jsonl": (b"\xef\xbb\xbf [" + LINE + b"]", "found a JSON array"),
    "pretty.json": (json.dumps(GOOD, indent=2).encode(), "found a JSON object over several lines"),
    "packed.jsonl": (gzip.compress(LINE), "found gzip data; name the file *.gz"),
    "packed_twice.jsonl.gz": (gzip.compress(gzip.compress(LINE)), "found gzip data"),
    "table.jsonl": (b"PAR1 and more", "found Parquet data; name the file *.parquet"),
    "utf16.jsonl": (LINE.decode().encode("utf-16"), "found UTF-16 text"),
    "cut_off.jsonl.gz": (gzip.compress(LINE * 99)[:-9], "not a readable gzip file"),
    "damaged.jsonl.gz": (gzip.compress(LINE)[:12] + b"\xff" * 40, "not a readable gzip file"),
    "plain.jsonl.gz": (LINE, "not a readable gzip file"),
    "junk_behind.jsonl.gz": (gzip.compress(LINE + b"\n") + b"junk", "not a readable gzip file"),
    "empty.jsonl": (b"", "expected at least one usable row; found no rows"),
    "empty.parquet": (b"", "not a readable Parquet file"),
    "cut_off.parquet": (b"PAR1" + b"\x00" * 30, "not a readable Parquet file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_of_other_content_is_refused_in_one_line(tmp_path, name):
    data, expected = UNREADABLE[name]
    first, second = read_errors(write(tmp_path / name, data))
    assert first.startswith(f"{tmp_path / name}: ") and expected in first and "\n" not in first
    assert str(tmp_path / name) in second


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_a_path_that_is_not_a_regular_file_is_refused(tmp_path, name):
    folder = tmp_path / "folder" / name
    folder.mkdir(parents=True)
    absent = tmp_path / name
    below = write(tmp_path / "file", LINE) / name
    unreadable = tmp_path / "link" / name
    unreadable.parent.mkdir()
    unreadable.symlink_to("/proc/self/mem")  # This file can be opened, but not read from byte 0.
    too_long = tmp_path / ("x" * 300 + name)
    for path, expected in {
        folder: "wrote; found a directory without state.json",
        absent: "no such file",
        below: "the file cannot be read; found [Errno 20] Not a directory",
        unreadable: "",
        too_long: "File name too long",
    }.items():
        for message in read_errors(path, tmp_path / "out.jsonl"):
            assert message.startswith(f"{path}: ") and expected in message and "\n" not in message


BROKEN_LINES = {
    b"\x00\x00\x00": "the line is not JSON",
    b"\xef\xbb\xbf": "the line is not JSON",
    LINE + LINE: "the line is not JSON; found Extra data",
    b'{"question": ' + b"[" * 100_000: "the line is not JSON; found too many levels",
    b'{"question": ' + b"[" * 700 + b"]" * 700 + b"}": "key 'question': expected a string; found",
    b'{"question": "q", "reasoning": "z", "answer": 1' + b"0" * 5000 + b"}": "Exceeds the limit",
    b'{"question": "q", "reasoning": "z", "answer": 1e999}': "found float inf",
    b'{"question": "q", "reasoning": "z", "answer": -Infinity}': "found float -inf",
    b'{"a\\n\\ud800b": 1}': "found keys 'a\\n\\ud800b'",
    b'{"question": "q", "question": "p", "reasoning": "z", "answer": "1"}': "one key two values",
    b'{"question": "q", "messages": [{"role": "user", "role": "system"}]}': "one key two values",
    b'{"id": 1, "id": 1.0, "question": "q", "reasoning": "z", "answer": "1"}': "one key two values",
}


@pytest.mark.parametrize("line", BROKEN_LINES, ids=range(len(BROKEN_LINES)))
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path, line):
    path = write(tmp_path / "rows.jsonl", LINE + b"\r\n" + line + b"\r\n\r\n" + LINE)
    with pytest.raises(DataError) as raised:
        RowDataset.load([path])
    message = str(raised.value)
    assert message.startswith(f"{path}:2: ") and BROKEN_LINES[line] in message
    assert len(message) < 400 + len(str(path)) and message.isprintable()
    assert len(RowDataset.load([path], on_bad_row="skip")) == 2
    report = prepare([path], tmp_path / "out.jsonl")
    assert report.kept.total() == 2 and report.dropped.total() == 1


def test_a_key_repeated_with_the_same_value_is_read(tmp_path):
    line = b'{"answer": "7", "x": [NaN], ' + LINE[1:-1] + b', "x": [NaN]}'
    assert len(RowDataset.load([write(tmp_path / "rows.jsonl", line)])) == 1


FAR_DATE = pa.array([10**8], pa.date32())
# Without pandas, no Python object can hold the values of these columns.
BEYOND_PYTHON = {
    "date": FAR_DATE,
    "duration": pa.array([2**62], pa.duration("s")),
    "zone": pa.array([1], pa.timestamp("us", "Mars/Olympus")),
    "not UTF-8": pa.array([b"\xff"]).view(pa.string()),
    "nested": pa.StructArray.from_arrays([FAR_DATE], ["date"]),
    "list": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), FAR_DATE),
}


@pytest.mark.parametrize("name", BEYOND_PYTHON)
def test_a_parquet_value_that_python_cannot_hold_is_refused_if_used(tmp_path, name):
    path, column = tmp_path / "rows.parquet", BEYOND_PYTHON[name]
    for unused in ("seen", "answer.seen"):  # pyarrow's "answer" selects "answer.seen" too.
        parquet.write_table(table(**{unused: column}), path)
        assert RowDataset.load([path])[0].answer == "7"
        assert prepare([path], tmp_path / "out.jsonl").kept == {"rows": 1}
        ((origin, record),) = read_records(path)  # All columns, for callers that copy them.
        assert origin == f"{path}:1"
        assert str(record).startswith(f"{path}:1: column {unused!r}: expected a value that Python")
    used = (
        pa.concat_tables([table(), table(answer=column)], promote_options="permissive")
        if (pa.types.is_string(column.type))
        else table(answer=column)
    )
    parquet.write_table(used, path)
    with pytest.raises(DataError, match=r"parquet:[12]: column 'answer': expected a value that"):
        RowDataset.load([path])
    good_rows = used.num_rows - 1
    if good_rows:
        assert len(RowDataset.load([path], on_bad_row="skip")) == good_rows


def test_parquet_reads_only_the_requested_columns(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(table(other=["x"]), path)
    ((_, record),) = read_records(path, ["question", "system"])
    assert record == dict.fromkeys(GOOD) | {"question": GOOD["question"], "other": None}
    parquet.write_table(pa.table({"Question": ["q"], "Answer": ["7"]}), path)
    with pytest.raises(DataError, match=r"key 'question' is missing .*; found keys Question, Answ"):
        RowDataset.load([path])
    with pytest.raises(DataError, match=r"no known format .* \(first at .*: keys Question, Answer"):
        prepare([path], tmp_path / "out.jsonl")


def test_parquet_columns_of_one_name_are_refused_if_used(tmp_path):
    path = tmp_path / "rows.parquet"
    for name, is_refused in (("answer", True), ("other", False)):
        columns = [*table().columns, pa.array(["8"]), pa.array(["9"])]
        names = [*GOOD, name, name]
        parquet.write_table(pa.Table.from_arrays(columns, names), path)
        assert bool(read_errors(path)) == is_refused
        with pytest.raises(DataError, match=f"different names.*; found two columns str '{name}'"):
            list(read_records(path))


@pytest.mark.parametrize(
    "column, answer",
    [
        (pa.array(["7"], pa.large_string()), "7"),
        (pa.array(["7"]).dictionary_encode(), "7"),
        (pa.array([7], pa.uint8()), "7"),
        (pa.array([7.0]), "7"),
        (pa.array([0.5], pa.float32()), "0.5"),
        (pa.array([Decimal("7.5")]), None),
        (pa.array([b"7"]), None),
        (pa.array([True]), None),
        (pa.array([["7"]]), None),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), None),
        (pa.array([datetime.date(2026, 1, 1)]), None),
        (pa.array([None], pa.null()), None),
        (pa.array([float("nan")]), None),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_a_parquet_answer_of_each_type_is_read_or_refused(tmp_path, column, answer):
    path = tmp_path / "rows.parquet"
    parquet.write_table(table(answer=column), path)
    if answer is None:
        messages = read_errors(path)
        assert len(messages) == 2 and all(message.count("\n") <= 3 for message in messages)
    else:
        assert RowDataset.load([path])[0].answer == answer
        prepare([path], tmp_path / "out.jsonl")
        assert RowDataset.load([tmp_path / "out.jsonl"])[0].answer == answer


# Values of every kind, for the keys that rows and published formats use.
TEXT = st.text(max_size=20) | st.sampled_from(
    ["", " ", "proof", "nan", "\\boxed{7}", "\\boxed{", "<think>", "</think>7", "#### 7", "\ud800",
     "<answer>7</answer>", "user", "assistant", "system", "tool", "text"]
)  # fmt: skip
RAW = {b'"@digits"': b"7" * 5000, b'"@deep"': b"[" * 990 + b"]" * 990, b'"@big"': b"1e999"}
"""Placeholders for JSON texts that json.dumps does not write."""
SCALAR = (
    TEXT
    | st.sampled_from([json.loads(text) for text in RAW])
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
)
TURN = st.fixed_dictionaries(
    {
        "role": SCALAR,
        "content": SCALAR | st.lists(st.fixed_dictionaries({"type": TEXT, "text": TEXT})),
    },
    optional={"tool_calls": SCALAR, "from": SCALAR, "value": SCALAR},
)
VALUE = SCALAR | st.lists(TURN | SCALAR, max_size=4) | st.dictionaries(TEXT, SCALAR, max_size=2)
KEYS = [
    "question", "problem", "prompt", "instruction", "input", "reasoning", "solution", "response",
    "output", "answer", "messages", "conversations", "system", "sample_weight", "id",
    "question_type", "problem_is_valid",
]  # fmt: skip
ANY_RECORD = st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=6)


def chat(role_key, text_key, *roles):
    """Build a strategy for turns that alternate, after an optional system turn."""
    return st.lists(TEXT, min_size=2, max_size=7).map(
        lambda texts: [
            {role_key: roles[0] if n == 0 and len(texts) % 2 else roles[1 + (n + len(texts)) % 2]}
            | {text_key: text}
            for n, text in enumerate(texts)
        ]
    )


PARTS = [
    {"question": TEXT, "reasoning": TEXT, "answer": SCALAR},
    {"problem": TEXT, "solution": TEXT, "answer": SCALAR},
    {"question": TEXT, "answer": TEXT.map("z\n#### {}".format)},
    {"prompt": TEXT, "response": TEXT.map("z<answer>{}</answer>".format)},
    {"messages": chat("role", "content", "system", "user", "assistant")},
    {"conversations": chat("from", "value", "system", "human", "gpt")},
]
EXTRA = {"system": SCALAR, "id": SCALAR, "sample_weight": SCALAR}
RECORD = ANY_RECORD | st.one_of(*(st.fixed_dictionaries(p, optional=EXTRA) for p in PARTS))


def check_reads_or_refuses(path):
    """Check that training and `prepare` read the file or raise DataError.

    Rows that `prepare` has written must be readable.
    """
    for on_bad_row in ("error", "skip"):
        try:
            RowDataset.load([path], on_bad_row=on_bad_row)
        except DataError as error:
            str(error).encode()  # The message can be printed.
    output = path.parent / "prepared.jsonl"
    try:
        report = prepare([path], output)
    except DataError as error:
        str(error).encode()
        return
    str(report).encode()
    assert len(RowDataset.load([output])) == report.kept.total()
    again = path.parent / "again.jsonl"
    assert prepare([output], again).kept.total() == report.kept.total()
    assert again.read_bytes() == output.read_bytes()


@given(records=st.lists(RECORD, max_size=4), cut=st.integers(0, 10_000), junk=st.binary(max_size=3))
def test_any_jsonl_is_read_or_refused(tmp_path_factory, records, cut, junk):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    for placeholder, raw in RAW.items():
        data = data.replace(placeholder, raw)
    check_reads_or_refuses(write(path, data))
    cut %= len(data) + 1
    check_reads_or_refuses(write(path, data[:cut] + junk + data[cut:]))


@given(records=st.lists(RECORD, max_size=4), seed=st.integers(0, 2**32))
def test_any_parquet_is_read_or_refused(tmp_path_factory, records, seed):
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    columns = {key: [record.get(key) for record in records] for key in KEYS}
    arrays = {}
    for key, values in columns.items():
        try:
            array = pa.array(values)
            parquet.write_table(pa.table({key: array}), pa.BufferOutputStream())
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):
            continue  # Arrow or Parquet has no type for these values.
        arrays[key] = array
    parquet.write_table(pa.table(arrays), path)
    check_reads_or_refuses(path)
    data, random_bytes = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(random_bytes.randint(1, 4)):
        data[random_bytes.randrange(len(data))] = random_bytes.randrange(256)
    check_reads_or_refuses(write(path, bytes(data[: random_bytes.choice([None, -1, -9, 40])])))
