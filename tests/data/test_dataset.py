"""Rows: parsing, errors with file and line, and the order of rows in a run."""

import builtins
import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aropd_mcore.config import WeightedSource
from aropd_mcore.data.dataset import RowDataset, SourceRows, step_positions
from aropd_mcore.data.records import DataError
from aropd_mcore.types import Row

GOOD = {"question": "1+1?", "reasoning": "One and one.", "answer": "2"}


def write_lines(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_records(path, *records):
    return write_lines(path, [json.dumps(record).encode() for record in records])


def numbered(count):
    return RowDataset([Row(str(index), "z", "a") for index in range(count)])


def order(dataset, positions, seed=7, shuffle=True):
    return [int(dataset.row_at(p, seed=seed, shuffle=shuffle).question) for p in positions]


def test_jsonl_and_parquet_give_the_same_rows(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    records = [
        GOOD | {"system": "Be brief.", "sample_weight": 0.5, "id": "first", "source": "extra key"},
        GOOD | {"answer": "\\boxed{zwei} é中", "system": None, "sample_weight": None, "id": None},
        GOOD | {"reasoning": ""},
    ]
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_bytes(
        b"\xef\xbb\xbf" + b"\n\n".join(json.dumps(record).encode() for record in records)
    )
    table = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(records), table)

    dataset = RowDataset.load([jsonl, table])
    first, second, third = dataset[:3]
    assert first == Row(
        "1+1?", "One and one.", "2", "Be brief.", sample_weight=0.5, id="first", origin=f"{jsonl}:1"
    )
    assert second == Row("1+1?", "One and one.", "\\boxed{zwei} é中", origin=f"{jsonl}:3")
    assert third.reasoning == "" and third.origin == f"{jsonl}:5"  # Blank lines count as lines.
    for number, (line, row) in enumerate(zip(dataset[:3], dataset[3:], strict=True), start=1):
        assert row.origin == f"{table}:{number}"
        assert (line.question, line.reasoning, line.answer, line.system, line.sample_weight) == (
            row.question,
            row.reasoning,
            row.answer,
            row.system,
            row.sample_weight,
        )


BROKEN = {
    b'{"question": "x"': "the line is not JSON; found Expecting ',' delimiter",
    b'{"question": "\xff"}': "the line is not UTF-8; found byte 0xff",
    b"[1, 2]": "expected one JSON object per line; found list",
    b'{"question": "x", "reasoning": "z"}': "key 'answer' is missing (`aropd prepare` converts "
    "other formats); found keys question, reasoning",
    b'{"question": "x", "reasoning": "z", "answer": true}': "key 'answer': expected a string or a "
    "finite number; found bool True",
    b'{"question": "x", "reasoning": "z", "answer": Infinity}': "found float inf",
    b'{"question": "x", "reasoning": "z", "answer": NaN}': "key 'answer' is missing "
    "(`aropd prepare` converts other formats); found key 'answer' with value nan",
    b'{"question": "x", "reasoning": "z", "answer": "1", "answer": "2"}': "the line gives one key "
    "two values: remove one of them; found key str 'answer'",
    b'{"question": "x", "reasoning": "z", "answer": "1", "id": 1%s}' % (b"0" * 5000): "the line is "
    "not JSON; found Exceeds the limit (4300 digits)",
    b'{"question": " \\n", "reasoning": "z", "answer": "a"}': "key 'question': expected a question",
    b'{"question": "x", "reasoning": "", "answer": " "}': "both are empty",
    b'{"question": "x", "reasoning": "z", "answer": "\\ud800"}': "key 'answer': expected valid "
    "Unicode; found '\\ud800'",
    b'{"question": "x", "reasoning": "z", "answer": "a", "system": 3}': "key 'system': expected a "
    "string; found int 3",
    b'{"question": "x", "reasoning": "z", "answer": "a", "id": 1.5}': "key 'id': expected a string",
    b'{"question": "x", "reasoning": "z", "answer": "a", "sample_weight": NaN}': "key "
    "'sample_weight': expected a finite number, at least 0; found float nan",
    b'{"question": "x", "reasoning": "z", "answer": "a", "sample_weight": -1}': "found int -1",
    b'{"question": "x", "reasoning": "z", "answer": "a", "sample_weight": 1%s}'
    % (b"0" * 400): "found int 1000",
    b'{"question": "x", "reasoning": "z", "answer": "a", "sample_weight": true}': "found bool True",
    b'{"question": "x", "reasoning": "z", "answer": "a", "sample_weight": "1"}': "found str '1'",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_row_stops_with_file_and_line(tmp_path, line):
    path = write_lines(tmp_path / "rows.jsonl", [json.dumps(GOOD).encode(), line])
    with pytest.raises(DataError) as raised:
        RowDataset.load([path])
    assert str(raised.value).startswith(f"{path}:2: ")
    assert BROKEN[line] in str(raised.value)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "2+2?"}],
    },
]
SOLVED = {"reasoning": "Two and two.", "answer": 4}


def test_messages_rows_give_system_history_and_question(tmp_path):
    path = write_records(
        tmp_path / "rows.jsonl",
        {"messages": CHAT} | SOLVED,
        {"messages": CHAT[1:], "system": "Be brief.", "question": None} | SOLVED,
        {"messages": CHAT[3:], "answer": 4.0, "reasoning": "Two and two."},
        {"question": "And 2+2?", "system": float("nan"), "id": float("nan")} | SOLVED,
    )
    history = (("user", "1+1?"), ("assistant", "2"))
    plain = Row("And 2+2?", "Two and two.", "4")
    long = replace(plain, system="Be brief.", history=history)
    rows = [replace(row, origin="") for row in RowDataset.load([path])]
    assert rows == [long, long, plain, plain]


@pytest.mark.parametrize(
    "broken, error",
    [
        ({"messages": CHAT, "question": "2+2?"}, "keys 'question' and 'messages': expected one"),
        (
            {"messages": CHAT, "system": "Be long."},
            "key 'system' and the system turn of 'messages'",
        ),
        ({"messages": CHAT[:3]}, "the last turn is not the user's; found roles system, user, ass"),
        ({"messages": CHAT[2:]}, "the turns do not alternate between user and assistant"),
        (
            {"messages": [*CHAT[1:], CHAT[1]]},
            "the turns do not alternate between user and assistant",
        ),
        ({"messages": [*CHAT[1:3], CHAT[0], CHAT[1]]}, "a system turn is not the first turn"),
        ({"messages": CHAT[:1]}, "the last turn is not the user's; found roles system"),
        ({"messages": []}, "the last turn is not the user's"),
        ({"messages": "1+1?"}, "'messages' is not a list of objects with 'role' and 'content'"),
        (
            {"messages": [CHAT[1] | {"role": "tool"}]},
            "the role of a turn is not one of system, user",
        ),
        ({"messages": [CHAT[1] | {"content": " "}]}, "the text of a turn is empty"),
        ({"messages": [CHAT[1] | {"content": 3}]}, "'content' is not a string; found turn 1 of"),
        ({"messages": [CHAT[1] | {"content": [{"type": "image"}]}]}, "a part of 'content' is not"),
        ({"messages": [CHAT[1] | {"content": "\ud800"}]}, "key 'messages': expected valid Unicode"),
        ({"messages": [CHAT[1] | {"tool_calls": [{"name": "f"}]}]}, "a turn calls a tool"),
    ],
)
def test_messages_rows_without_a_valid_chat_are_refused(tmp_path, broken, error):
    path = write_records(tmp_path / "rows.jsonl", broken | SOLVED)
    with pytest.raises(DataError) as raised:
        RowDataset.load([path])
    assert str(raised.value).startswith(f"{path}:1: {error}")


def test_the_fingerprint_of_rows_without_history_equals_earlier_releases():
    rows = [
        Row("q", "z", "a", system="s", sample_weight=0.5, id="i", origin="o"),
        Row("q", "z", "a"),
    ]
    assert RowDataset(rows).fingerprint() == "6aa03a2d2d77432b"
    with_history = [rows[0], replace(rows[1], history=(("user", "u"), ("assistant", "a")))]
    assert RowDataset(with_history).fingerprint() != RowDataset(rows).fingerprint()


def test_broken_rows_are_skipped_and_counted(tmp_path):
    good = json.dumps(GOOD).encode()
    path = write_lines(tmp_path / "rows.jsonl", [*BROKEN, good, *BROKEN, good])
    dataset = RowDataset.load([path], on_bad_row="skip")
    assert len(dataset) == 2
    assert dataset.num_bad_rows == 2 * len(BROKEN)
    assert dataset.bad_rows[1].origin == f"{path}:2"

    only_broken = write_lines(tmp_path / "broken.jsonl", [*BROKEN])
    with pytest.raises(DataError, match=rf"found {len(BROKEN)} broken rows, first .*jsonl:1: "):
        RowDataset.load([only_broken], on_bad_row="skip")


def test_files_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        RowDataset.load([tmp_path / "absent.jsonl"], on_bad_row="skip")
    with pytest.raises(
        DataError, match=r"empty\.jsonl: expected at least one usable row; found no"
    ):
        RowDataset.load([write_lines(tmp_path / "empty.jsonl", [b"", b"  "])])
    broken = tmp_path / "broken.parquet"
    broken.write_text("not Parquet")
    with pytest.raises(DataError, match=r"broken\.parquet: not a readable Parquet file"):
        RowDataset.load([broken], on_bad_row="skip")

    real_import = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'aropd-mcore\[parquet\]'"):
        RowDataset.load([broken])


def test_every_epoch_is_a_separate_permutation():
    dataset = numbered(101)
    epochs = [order(dataset, range(101 * epoch, 101 * (epoch + 1))) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(101))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # Neither the seed's size nor its sign makes two (seed, epoch) pairs share an order.
    others = [order(dataset, range(101), seed=seed) for seed in (8, -7, 7 + 2**32)]
    assert len({tuple(other) for other in [*epochs, *others]}) == 6
    assert order(dataset, range(200, 204), shuffle=False) == [99, 100, 0, 1]


def test_the_order_is_a_pure_function_of_seed_epoch_and_position():
    straight = order(numbered(13), range(60))
    # A new dataset, read backwards and from the middle, as in a resumed run.
    resumed = numbered(13)
    assert [order(resumed, [p])[0] for p in reversed(range(60))] == straight[::-1]
    assert order(numbered(13), range(37, 60)) == straight[37:]
    # Fixed, so that an upgrade of numpy or of this code cannot reorder a resumed run.
    assert order(numbered(8), range(8), seed=1234) == [6, 1, 0, 4, 5, 7, 2, 3]


def weighted(*parts):
    """Build a data set of sources (num_rows, weight). The question is the number of the row."""
    rows = numbered(sum(num_rows for num_rows, _ in parts))
    sources = [SourceRows(f"s{i}", *part) for i, part in enumerate(parts)]
    return RowDataset(rows[:], sources=sources)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(0.2, 3)), min_size=1, max_size=4).filter(
        lambda parts: any(round(n * w) for n, w in parts)
    ),
    st.integers(0, 2**40),
    st.booleans(),
)
def test_weights_draw_each_row_of_a_source_equally_often(parts, seed, shuffle):
    dataset = weighted(*parts)
    assert dataset.epoch_length == sum(round(n * w) for n, w in parts)
    for num_epochs in (1, 2, 5):
        positions = range(num_epochs * dataset.epoch_length)
        drawn = Counter(order(dataset, positions, seed, shuffle))
        start = 0
        for num_rows, weight in parts:
            counts = [drawn[row] for row in range(start, start + num_rows)]
            start += num_rows
            assert sum(counts) == num_epochs * round(num_rows * weight)
            assert not counts or max(counts) - min(counts) <= 1


def test_weighted_order_is_a_pure_function_of_seed_epoch_and_position():
    parts = [(6, 0.5), (3, 2.5), (2, 1.0)]
    straight = order(weighted(*parts), range(60))
    resumed = weighted(*parts)
    assert [order(resumed, [p])[0] for p in reversed(range(60))] == straight[::-1]
    assert straight != order(weighted(*parts), range(60), seed=8)
    # Fixed, as the order without weights.
    assert order(weighted((4, 0.5), (2, 1.5)), range(10), seed=1234) == [
        3, 0, 4, 5, 4, 5, 5, 1, 4, 2,
    ]  # fmt: skip
    # Two sources of the same size have separate permutations.
    halves = weighted((40, 0.5), (40, 0.5))
    first = order(halves, range(40))
    assert {r for r in first if r < 40} != {r - 40 for r in first if r >= 40}
    # The second half of a pass is drawn in the next epoch.
    assert sorted(first + order(halves, range(40, 80))) == list(range(80))
    in_order = [0, 1, 2, *2 * [6, 7, 8], 6, 7, 9, 10]
    assert order(weighted(*parts), range(13), shuffle=False) == in_order


def test_weights_of_1_leave_order_and_fingerprint_unchanged():
    plain = numbered(13)
    for dataset in (weighted((6, 1.0), (7, 1.0)), weighted((13, 1.0))):
        for shuffle in (True, False):
            positions = range(40)
            assert order(dataset, positions, shuffle=shuffle) == order(
                plain, positions, shuffle=shuffle
            )
        assert dataset.fingerprint() == plain.fingerprint()
    others = {weighted(*p).fingerprint() for p in ([(6, 2.0), (7, 1.0)], [(7, 2.0), (6, 1.0)])}
    assert len(others | {plain.fingerprint()}) == 3


def test_load_keeps_sources_and_weights_and_without_counts_the_rest(tmp_path):
    first = write_records(tmp_path / "a.jsonl", *[GOOD] * 4)
    second = write_lines(tmp_path / "b.jsonl", [*BROKEN][:1] + [json.dumps(GOOD).encode()] * 2)
    dataset = RowDataset.load([first, WeightedSource(path=second, weight=1.5)], on_bad_row="skip")
    assert dataset.sources == (SourceRows(str(first), 4), SourceRows(str(second), 2, 1.5))
    assert (len(dataset), dataset.epoch_length, dataset.num_bad_rows) == (6, 7, 1)
    errors = {number: DataError(f"row {number}", "too long") for number in (5, 0, 3)}
    rest = dataset.without(errors)
    assert [source.num_rows for source in rest.sources] == [2, 1]
    assert [row.origin for row in rest] == [f"{first}:2", f"{first}:3", f"{second}:2"]
    assert [error.origin for error in rest.bad_rows] == [f"{second}:1", "row 0", "row 3", "row 5"]


def test_step_positions_of_all_ranks_and_steps_are_consecutive():
    for dp_size in (1, 2, 3, 6):
        positions = [
            position
            for step in range(4)
            for dp_rank in range(dp_size)
            for position in step_positions(step, 6, dp_rank=dp_rank, dp_size=dp_size)
        ]
        assert positions == list(range(24))
    with pytest.raises(
        ValueError, match=r"6 is not a multiple of the data-parallel size 4; .* 4 or 8"
    ):
        step_positions(0, 6, dp_rank=0, dp_size=4)


def test_teacher_and_domain_are_read_and_do_not_change_the_fingerprint_of_other_runs(tmp_path):
    row = {"question": "q", "reasoning": "r", "answer": "1"}
    keys = [{}, {"teacher": "math", "domain": "algebra"}, {"teacher": 3, "domain": ["algebra"]}]
    paths = [
        write_lines(tmp_path / f"{i}.jsonl", [json.dumps(row | k).encode()])
        for i, k in enumerate(keys)
    ]
    plain, named, other = (RowDataset.load([path]) for path in paths)
    assert [data[0].domain for data in (plain, named, other)] == ["", "algebra", ""]
    assert {data[0].teacher for data in (plain, named, other)} == {""}, "no teacher has a name"
    assert plain.fingerprint() == named.fingerprint() == other.fingerprint()
    chosen = RowDataset.load([paths[1]], teachers=["code", "math"])
    assert chosen[0].teacher == "math" and chosen.fingerprint() != plain.fingerprint()
    assert RowDataset.load([paths[0]], teachers=["code"])[0].teacher == "code"
