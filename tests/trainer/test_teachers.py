"""Several teachers: rows that choose them, bad input, checkpoints and resume.

Whole steps with several teachers are cases of test_step.py.
"""

import json
import shutil
from pathlib import Path

import pytest

from aropd_mcore.config import ConfigError
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.json_file import CheckpointError
from aropd_mcore.convert.source import open_source
from aropd_mcore.data.packing import Groups, dealt, packed
from aropd_mcore.data.records import DataError
from aropd_mcore.trainer.preflight import preflight
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_run
from tests.support.tiny_tokenizer import save_tiny_tokenizer
from tests.support.training import (
    assert_same_checkpoint,
    read_checkpoints,
    read_lines,
    repeatable,
    train_on_ranks,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A run of three steps with two teachers. One of them is the student's folder."""
    folder = tmp_path_factory.mktemp("teachers")
    write_model(folder / "llama", "llama", seed=3, **SIZES)
    teachers = {"math": {"path": str(folder / "llama")}, "code": {"path": str(folder / "model")}}
    return write_run(
        folder,
        teachers=teachers,
        training={"num_steps": 3},
        checkpoint={"save_every_steps": 1, "keep_last": 4, "asynchronous": False},
    )


@pytest.mark.rest
def test_resumed_run_is_bitwise_the_same_and_refuses_another_teacher(path):
    folder, out = path.parent, path.parent / "out"
    run_ranks(train_on_ranks, 2, path, [])
    expected = repeatable(read_lines(out))
    assert len(expected) == 3
    reported = {name for line in expected for name in line}
    assert {"loss/teacher/math", "loss/teacher/code", "loss/domain/level 0"} <= reported
    (state,) = run_ranks(read_checkpoints, 1, [out])[0]
    assert not any(name.startswith("teacher") for name in state)

    for step in (2, 3):
        shutil.rmtree(out / "checkpoints" / f"iter_{step:07d}")
    shutil.copytree(folder / "llama", folder / "moved")
    write_model(folder / "differs", "llama", seed=4, **SIZES)
    other = f"teachers.math.path={folder / 'differs'}"
    with pytest.raises(ConfigError, match=r"teachers.math.path .* \(it is another teacher\)"):
        preflight(load_config(path, [other]))
    preflight(load_config(path, [other, "checkpoint.allow_changes=[teachers.math.path]"]))
    with pytest.raises(ConfigError, match=r"teachers.new.kind null -> \"model\""):
        preflight(load_config(path, [f"teachers.new.path={folder / 'llama'}"]))

    run_ranks(train_on_ranks, 2, path, [f"teachers.math.path={folder / 'moved'}"])
    assert repeatable(read_lines(out)) == expected
    (resumed,) = run_ranks(read_checkpoints, 1, [out])[0]
    assert_same_checkpoint(resumed, state)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"teacher": "maths"}, r"rows.jsonl:3: key 'teacher': expected one of .* code, math; .*"),
        ({"teacher": None}, r"rows.jsonl:3: key 'teacher' is missing: .* code, math; found keys"),
    ],
)
def test_row_without_a_known_teacher_is_refused_or_skipped(path, tmp_path, row, message):
    rows = [json.loads(line) for line in (path.parent / "rows.jsonl").read_text().splitlines()]
    rows[2] |= row
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data.train=[{file}]", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(DataError, match=message):
        preflight(load_config(path, overrides))
    notes = preflight(load_config(path, [*overrides, "data.on_bad_row=skip"]))
    assert notes[0].startswith("23 rows (1 left out")
    assert "rows by teacher: code 8, math 15" in notes


def test_adapter_that_several_teachers_trained_is_read(path, tmp_path):
    out = tmp_path / "out"
    overrides = [f"output_dir={out}", 'adapter={"rank": 4}', "training.num_steps=1"]
    run_ranks(train_on_ranks, 1, path, overrides)
    assert open_source(out).adapter.spec.rank == 4
    with pytest.raises(CheckpointError, match="has no teacher"):
        open_source(out, role="teacher")


def test_teacher_of_another_vocabulary_is_named(path, tmp_path):
    shutil.copytree(path.parent / "llama", tmp_path / "other")
    save_tiny_tokenizer(tmp_path / "other", thinks=True)
    config = load_config(path, [f"teachers.code.path={tmp_path / 'other'}"])
    with pytest.raises(ConfigError, match=r"teachers.code.path: found another vocabulary: .*other"):
        preflight(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.kind=ema"], r"teacher and teachers \(code, math\): expected one of the two"),
        (["teachers.code.kind=ema"], "teachers.code.kind: ema: expected model for one of several"),
        (["teachers.a b.path=x"], "should match pattern"),
        (["teachers.code.pth=x"], "teachers.code.pth: unknown key; did you mean 'path'"),
        (
            ["teachers.code.views=none"],
            "code.views none and teachers.math.views privileged: expected",
        ),
        (
            ["validation.rows=[x]", "validation.teacher_views=[full]"],
            r"validation.teacher_views with teachers \(code, math\): expected no teacher_views",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


def test_every_rank_has_each_sample_of_a_teacher_once_in_equally_many_microbatches():
    lengths = [(5,), (4,), (3,), (6,), (2,)]
    for count_multiple in (1, 2):
        options = {"num_ranks": 3, "count_multiple": count_multiple}
        heavy = packed(lengths, budget=8, loads=[0, 100, 0], **options)
        assert not any(heavy[1]), "the rank with many tokens gets more"
        for ranks in (heavy, dealt(5, first_rank=2, size=1, **options)):
            check_groups(ranks, 5, count_multiple)
    # The first rank is that of the first sample, so teachers with few samples use all ranks.
    assert [len(rank[0]) for rank in dealt(1, first_rank=2, size=1, num_ranks=3)] == [0, 0, 1]


def check_groups(ranks: list[Groups], num_samples: int, count_multiple: int) -> None:
    assert sorted(i for r in ranks for group in r for i in group) == list(range(num_samples))
    (count,) = {len(groups) for groups in ranks}
    assert count % count_multiple == 0
