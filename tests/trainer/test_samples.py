"""Samples of a run: they change nothing, do not depend on the layout, and survive interruptions."""

import json
import math
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from aropd_mcore.config_file import load_config
from aropd_mcore.evaluation.grade import Graders
from aropd_mcore.trainer import samples
from aropd_mcore.trainer.jsonl import VALIDATIONS, JsonlFile
from aropd_mcore.trainer.samples import SAMPLES
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_rows, write_run
from tests.support.training import read_checkpoints, read_lines, repeatable, train_on_ranks

NUM_SAMPLES = 5
"""With 8 responses on two data-parallel ranks, they belong to both ranks."""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A run of four steps that validates rows under two views after every second step."""
    folder = tmp_path_factory.mktemp("samples")
    heldout = write_rows(folder / "heldout.jsonl")
    return write_run(
        folder,
        checkpoint={"save_every_steps": 2, "asynchronous": False},
        validation={
            "rows": [str(heldout)],
            "teacher_views": ["full"],
            "limit": 7,
            "every_steps": 2,
            "max_response_tokens": 12,
        },
    )


ON = [f"logging.samples={NUM_SAMPLES}"]


def read_samples(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(path) -> Path:
    """Output folder of an uninterrupted run with samples on two data-parallel ranks."""
    out = path.parent / "whole"
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}", *ON])
    return out


def test_run_with_samples_equals_the_run_without_them_bitwise(path, whole):
    out = path.parent / "plain"
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}"])
    assert not (out / SAMPLES).exists()
    assert repeatable(read_lines(whole)) == repeatable(read_lines(out))
    assert (whole / VALIDATIONS).read_text() == (out / VALIDATIONS).read_text()
    first, second = run_ranks(read_checkpoints, 1, [whole, out])[0]
    assert first.keys() == second.keys()
    assert all(_equal(value, second[name]) for name, value in first.items())


def _equal(value: Any, other: Any) -> bool:
    import torch

    return torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_samples_are_the_first_of_the_batch_and_of_each_task(path, whole):
    lines = read_samples(whole)
    validation = [("rows", NUM_SAMPLES), ("rows_full", NUM_SAMPLES)]
    blocks = [(step, *block) for step in (0, 2, 4) for block in validation]
    blocks += [(step, "train", NUM_SAMPLES) for step in range(4)]
    blocks.sort(key=lambda block: block[0])  # validation n comes before step n
    expected = [(step, task) for step, task, count in blocks for _ in range(count)]
    assert [(line["step"], line["task"]) for line in lines] == expected

    asked = [
        [line["id"] for line in lines if (line["step"], line["task"]) == (step, "rows")]
        for step in (0, 2, 4)
    ]
    assert asked == [[f"{path.parent}/heldout.jsonl:{n}" for n in range(1, 1 + NUM_SAMPLES)]] * 3
    config = load_config(path)
    for line in lines:
        assert line["verdict"] in ("right", "wrong") and line["answer"] and line["question"]
        assert line["view"] == ("full" if line["task"] == "rows_full" else "student")
        assert 1 <= line["num_tokens"] <= config.rollout.max_response_tokens
        assert line["finished"] or line["num_tokens"] in (12, 16)
        has_tokens = line["num_tokens"] > config.objective.skip_response_tokens
        is_known = line["task"] == "train" and has_tokens
        assert (line["mean_residual"] is not None) == (line["mean_loss"] is not None) == is_known


def assert_same_up_to_rounding(out: Path, expected: Path) -> None:
    for line, other in zip(read_samples(out), read_samples(expected), strict=True):
        for name in ("mean_residual", "mean_loss"):
            # pytest.approx takes no None.
            mean, known = (
                math.nan if value is None else value for value in (line.pop(name), other.pop(name))
            )
            assert mean == pytest.approx(known, rel=1e-3, abs=1e-5, nan_ok=True)
        assert line == other


@pytest.mark.rest
def test_samples_in_another_layout_are_the_same(path, whole):
    out = path.parent / "layout"
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "training.micro_batch_size=4"]
    run_ranks(train_on_ranks, 4, path, [f"output_dir={out}", *ON, *layout])
    assert_same_up_to_rounding(out, whole)


class Killed(BaseException):
    """Stands for a kill."""


def train_until_line(path: Path, overrides: list[str], step: int, task: str) -> None:
    """Train until the third sample of this step and task is to be written."""
    write = JsonlFile.write
    written: list[Any] = []

    def fail(self: JsonlFile, record: Any) -> None:
        if (record.get("step"), record.get("task")) == (step, task):
            written.append(record)
        if len(written) == 3:
            raise Killed
        write(self, record)

    with patch.object(JsonlFile, "write", fail), suppress(Killed, RuntimeError):
        train_on_ranks(path, overrides)


def test_run_killed_while_samples_are_written_resumes_without_gap_or_repeat(path, whole):
    out = path.parent / "killed"
    overrides = [f"output_dir={out}", *ON]
    run_ranks(train_until_line, 1, path, overrides, 2, "rows_full")
    assert [line["task"] for line in read_samples(out)].count("rows_full") == NUM_SAMPLES + 2
    run_ranks(train_until_line, 1, path, overrides, 3, "train")
    assert read_samples(out)[-1]["step"] == 3, "two samples of the unfinished step"
    run_ranks(train_on_ranks, 1, path, overrides)
    assert_same_up_to_rounding(out, whole)


def train_with_failing_graders(path: Path, overrides: list[str]) -> None:
    def fail(self: Graders, responses: Any) -> Any:
        raise RuntimeError("no process")

    with patch.object(Graders, "grade_all", fail):
        train_on_ranks(path, overrides)


def test_failed_grading_stops_no_step(path):
    out = path.parent / "ungraded"
    overrides = [f"output_dir={out}", "validation.rows=[]", "validation.teacher_views=[]"]
    overrides += ["logging.samples=2", "logging.samples_every_steps=3"]
    run_ranks(train_with_failing_graders, 2, path, overrides)
    lines = read_samples(out)
    assert [(line["step"], line["verdict"]) for line in lines] == [(0, None)] * 2 + [(3, None)] * 2
    assert len(read_lines(out)) == 4


def test_samples_that_cannot_be_graded_get_no_verdict():
    def line(response: str, answer: str) -> samples.Line:
        return samples.Line(0, "train", "student", "1", "?", response, answer, None, 9, True)

    lines = [
        ("", line("so 7", "7")),
        ("", line("so 8", "7")),
        ("", line("so 7", " ")),
        ("", line("```python\nprint(7)\n```", "```python\nprint(7)\n```")),
        ("<think>", line("maybe 7", "7")),
    ]
    log = SimpleNamespace(_graders=Graders(1))
    try:
        verdicts = samples.SampleLog._grade(log, lines)  # type: ignore[arg-type]
    finally:
        log._graders.close()
    assert verdicts == ["right", "wrong", None, None, "wrong"]
    log._graders = None
    assert samples.SampleLog._grade(log, lines) == [None] * 5  # type: ignore[arg-type]


def test_train_as_the_name_of_a_validation_task_is_refused(path):
    overrides = [*ON, "validation.tasks=[train=x.jsonl]"]
    with pytest.raises(ValueError, match="expected another name, since `train`"):
        load_config(path, overrides)
