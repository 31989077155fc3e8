"""Validation while a run trains: it changes nothing, survives interruptions, and keeps the best."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from aropd_mcore import cli
from aropd_mcore.config import ConfigError
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.source import best_checkpoint
from aropd_mcore.data.records import DataError
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.evaluation.validation_set import read_validation_set
from aropd_mcore.trainer.held_out import REPORTED
from aropd_mcore.trainer.jsonl import VALIDATIONS, JsonlFile, read_until
from aropd_mcore.trainer.validation import Validator
from tests.support.fake_vllm import FakeVllm
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_rows, write_run
from tests.support.training import (
    read_checkpoints,
    read_lines,
    repeatable,
    saved_steps,
    train_on_ranks,
)

KEY = "a key"
LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2"]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A run of four steps without validation, with a checkpoint after each step."""
    return write_run(
        tmp_path_factory.mktemp("validation"),
        checkpoint={"save_every_steps": 1, "keep_last": 1, "asynchronous": False},
    )


@pytest.fixture(scope="module")
def validated(path) -> list[str]:
    """Overrides that validate after every second step: a task, and rows under all three views."""
    folder = path.parent
    (folder / "sums.jsonl").write_text(
        "".join(
            json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(5)
        )
    )
    write_rows(folder / "heldout.jsonl")
    return [
        f"validation.tasks=[sums:math={folder / 'sums.jsonl'}]",
        f"validation.rows=[{folder / 'heldout.jsonl'}]",
        "validation.teacher_views=[student,partial,full]",
        "validation.limit=3",
        "validation.every_steps=2",
        "validation.max_response_tokens=12",
    ]


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / VALIDATIONS).read_text().splitlines()]


def without_validation(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("validation/")} for line in lines]


def test_run_with_validation_equals_the_run_without_it_bitwise(path, validated):
    plain, out = path.parent / "plain", path.parent / "validated"
    run_ranks(train_on_ranks, 4, path, [f"output_dir={plain}", *LAYOUT])
    run_ranks(train_on_ranks, 4, path, [f"output_dir={out}", *LAYOUT, *validated])
    assert without_validation(repeatable(read_lines(out))) == repeatable(read_lines(plain))
    first, second = run_ranks(read_checkpoints, 1, [plain, out])[0]
    assert first.keys() == second.keys()
    assert all(_equal(value, second[name]) for name, value in first.items())

    lines, validations = read_lines(out), results(out)
    assert [line["num_updates"] for line in validations] == [0, 2, 4]
    by_teacher = ["sums_teacher", "rows_teacher", "rows_partial", "rows_full"]
    assert list(validations[0]["tasks"]) == ["sums", "rows", *by_teacher]
    for line, validation in zip(lines[::2], validations, strict=False):
        for task, values in validation["tasks"].items():
            assert values["num_problems"] == 3 and 0 < values["length_mean"] <= 12
            assert line[f"validation/{task}/accuracy"] == values["accuracy"]
    assert not any(key.startswith("validation/") for key in lines[1])
    assert lines[0]["seconds/validation"] > lines[1]["seconds/validation"] == 0


HELD_OUT = {
    "tp2-pp2": (LAYOUT, 4),
    "packed": (["training.packing=true", "training.max_tokens_per_microbatch=288"], 2),
    "interleaved": (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 2),
    "sft": (["objective.name=sft", "validation.teacher_views=[]"], 2),
}


@pytest.mark.parametrize(
    "case", ["tp2-pp2", *(pytest.param(c, marks=pytest.mark.rest) for c in [*HELD_OUT][1:])]
)
def test_losses_of_held_out_rows_equal_those_of_steps_on_these_rows(path, case):
    """The 20 held-out rows are those of 5 steps of 4, and sampling has the same seeds.

    A learning rate near 0 keeps the weights. In a run with steps of 8, the last microbatches of the
    validation are not full.
    """
    overrides, world_size = HELD_OUT[case]
    rows = path.parent / "twenty.jsonl"
    lines = write_rows(path.parent / "all.jsonl").read_text().splitlines()[:20]
    records = [
        json.loads(line) | {"sample_weight": 1.0, "domain": f"level {i % 3}"}
        for i, line in enumerate(lines)
    ]
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = [
        f"data.train=[{rows}]",
        "data.shuffle=false",
        f"validation.rows=[{rows}]",
        "validation.temperature=1",
        "objective.reduction=token_mean",
        "optimizer.lr=1e-30",
        *overrides,
    ]
    validations = []
    for batch_size, num_steps in ((4, 5), (8, 1)):
        out = path.parent / f"held-out-{case}-{batch_size}"
        sizes = [f"training.global_batch_size={batch_size}", f"training.num_steps={num_steps}"]
        run_ranks(train_on_ranks, world_size, path, [f"output_dir={out}", *settings, *sizes])
        validations.append(results(out)[0]["tasks"]["rows"])
    steps = read_lines(path.parent / f"held-out-{case}-4")
    for group in ("", *(f"/domain/level {i}" for i in range(3))):
        num_tokens = [step[f"num_loss_tokens{group}"] for step in steps]
        for metric in ["loss"] if case == "sft" else REPORTED:
            name = metric + group
            totals = [step.get(name, 0) * num for step, num in zip(steps, num_tokens, strict=True)]
            for values in validations:
                expected = sum(totals) / sum(num_tokens)
                assert values[name] == pytest.approx(expected, rel=1e-5), name
    assert validations[0]["accuracy"] == validations[1]["accuracy"]


@pytest.mark.rest
@pytest.mark.parametrize(
    ("names", "objective"),
    [
        (REPORTED, ["objective.reduction=sequence_mean_all"]),
        (["loss"], ["objective.name=sft", "objective.sft_prompt_loss=true"]),
    ],
)
def test_losses_of_held_out_rows_depend_on_neither_batch_size_nor_response_limit(
    path, names, objective
):
    """A step of 16 has more responses than there are rows. Validation samples longer responses than
    steps, which fit into no microbatch."""
    rows = path.parent / "ten.jsonl"
    lines = write_rows(path.parent / "all.jsonl").read_text().splitlines()
    rows.write_text("\n".join(lines[14:]))
    settings = [f"validation.rows=[{rows}]", *objective, "training.num_steps=1"]
    settings += ["views.max_prompt_tokens=88", "training.packing=true"]
    settings += ["training.max_tokens_per_microbatch=108"]
    found = []
    for size, limit in ((5, "null"), (16, "60")):
        out = path.parent / f"held-out-{len(names)}-{size}"
        overrides = [f"output_dir={out}", f"training.global_batch_size={size}", *settings]
        overrides += [f"validation.max_response_tokens={limit}", "training.micro_batch_size=1"]
        run_ranks(train_on_ranks, 1, path, overrides)
        found.append(results(out)[0]["tasks"]["rows"])
    assert found[1]["length_mean"] > found[0]["length_mean"], "no response was cut"
    for name in names:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


@pytest.mark.rest
def test_held_out_rows_without_loss_tokens_have_no_loss(path, validated):
    out = path.parent / "no-loss"
    overrides = [f"output_dir={out}", *validated, "training.num_steps=1"]
    # No response of the random model has a thought.
    run_ranks(train_on_ranks, 1, path, [*overrides, "objective.loss_span=thinking"])
    assert not {*REPORTED} & results(out)[0]["tasks"]["rows"].keys()


def _equal(value: Any, other: Any) -> bool:
    import torch

    return torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def train_with_vllm(path: Path, overrides: list[str]) -> None:
    os.environ["VLLM_API_KEY"] = KEY
    train_on_ranks(path, overrides)
    os.environ.pop("VLLM_API_KEY")


@pytest.mark.rest
def test_validation_on_vllm_servers_changes_no_step(tmp_path, validated):
    """Fake servers, while the responses of the next step are sampled (async_steps)."""
    fake = FakeVllm(key=KEY)
    rollout = {"engine": "vllm", "vllm": {"urls": [fake.url]}, "async_steps": 1}
    path = write_run(tmp_path, rollout=rollout | {"max_response_tokens": 10})
    try:
        run_ranks(train_with_vllm, 2, path, [f"output_dir={tmp_path / 'plain'}"])
        overrides = [f"output_dir={tmp_path / 'validated'}", *validated]
        run_ranks(train_with_vllm, 2, path, overrides)
    finally:
        fake.die()
    lines = without_validation(repeatable(read_lines(tmp_path / "validated")))
    assert lines == repeatable(read_lines(tmp_path / "plain"))
    assert [line["num_updates"] for line in results(tmp_path / "validated")] == [0, 2, 4]


class Killed(BaseException):
    """Stands for a kill."""


def train_until_grading(path: Path, overrides: list[str], num_updates: int) -> None:
    """Train until the responses of a validation are to be graded."""
    grade = Validator._grade

    def fail(self: Validator, number: int, *results: Any) -> Any:
        if number == num_updates:
            raise Killed
        return grade(self, number, *results)

    with patch.object(Validator, "_grade", fail), suppress(Killed, RuntimeError):
        train_on_ranks(path, overrides)


@pytest.mark.rest
def test_run_killed_in_a_validation_resumes_with_it(path, validated):
    whole, out = path.parent / "whole", path.parent / "killed"
    run_ranks(train_on_ranks, 2, path, [f"output_dir={whole}", *validated])
    run_ranks(train_until_grading, 2, path, [f"output_dir={out}", *validated], 2)
    assert saved_steps(out) == [2] and [r["num_updates"] for r in results(out)] == [0]
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}", *validated])
    assert results(out) == results(whole)
    assert repeatable(read_lines(out)) == repeatable(read_lines(whole))


def train_with_accuracies(path: Path, overrides: list[str], accuracies: Sequence[float]) -> None:
    """Train with given accuracies of the task `sums` after 0, 1, 2, ... updates."""
    grade = Validator._grade

    def scripted(self: Validator, number: int, *results: Any) -> Any:
        write = self._file.write if self._file else None
        assert self._file is not None and write is not None
        with patch.object(self._file, "write"):
            tasks = grade(self, number, *results)
        tasks["sums"] = {**tasks["sums"], "accuracy": accuracies[number]}
        write({"num_updates": number, "tasks": tasks})
        return tasks

    with patch.object(Validator, "_grade", scripted):
        train_on_ranks(path, overrides)


def test_best_checkpoint_is_kept_after_worse_ones_and_exported(path, validated, capsys):
    out = path.parent / "best"
    every = [f"output_dir={out}", *validated, "validation.every_steps=1"]
    every += ["checkpoint.keep_best=sums", "checkpoint.save_every_steps=3"]
    run_ranks(train_with_accuracies, 2, path, every, [0.2, 0.4, 0.3, 0.4, 0.1])
    assert saved_steps(out) == [1, 4], "the first of the best ones, and the newest"
    assert best_checkpoint(out).resolve().name == "iter_0000001"
    for which, step in (("best", 1), ("newest", 4)):
        words = ["convert", "export", str(out), str(out / which), "--which", which]
        assert cli.main(words) == 0
        assert f"iter_000000{step} " in capsys.readouterr().out
    assert cli.main(["convert", "inspect", str(out / "checkpoints" / "best")]) == 0
    assert "iter_0000001" in capsys.readouterr().out


def test_export_of_the_best_checkpoint_without_one_is_refused(path, capsys):
    words = ["convert", "export", str(path.parent), str(path.parent / "hf"), "--which", "best"]
    assert cli.main(words) == 2
    assert "checkpoints/best: no such folder" in capsys.readouterr().err


def test_stop_after_ends_the_run_for_good(path, validated):
    out = path.parent / "patience"
    overrides = [f"output_dir={out}", *validated, "validation.every_steps=1"]
    overrides += ["validation.rows=[]", "validation.teacher_views=[]", "validation.stop_after=2"]
    accuracies = [0.1, 0.3, 0.3, 0.2]
    for _ in range(2):  # the second call finds the run complete
        run_ranks(train_with_accuracies, 2, path, overrides, accuracies)
        assert len(read_lines(out)) == 3 and saved_steps(out) == [3]


def test_jsonl_file_on_a_full_disk_keeps_its_lines(tmp_path):
    full = JsonlFile(Path("/dev/full"))
    full.write({"num_updates": 0})
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        full.sync()
    file = JsonlFile(tmp_path / "lines.jsonl")
    file._unwritten = full._unwritten
    file.write({"num_updates": 2, "value": float("nan")})
    file.sync()
    assert read_until(tmp_path / "lines.jsonl", "num_updates", 2) == [{"num_updates": 0}]
    assert (tmp_path / "lines.jsonl").read_text() == '{"num_updates": 0}\n'


def test_lines_on_a_full_disk_stay_when_a_run_resumes(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    (tmp_path / "lines.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        read_until(path, "step", 1)
    assert [*tmp_path.iterdir()] == [path] and len(path.read_text().splitlines()) == 2


def test_held_out_rows_with_long_prompts_are_dropped_from_all_views(path, validated, tmp_path):
    long = {"question": "1 + 1?", "reasoning": "add 1 to 1. " * 10, "answer": "2"}
    rows = [long, long | {"reasoning": "add"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [*validated, f"validation.rows=[{tmp_path / 'rows.jsonl'}]"]
    config = load_config(path, [*settings, "views.on_long_prompt=drop"])
    builder = ViewBuilder(load_tokenizer(config.model.path), config.views)
    problems, [note] = read_validation_set(config, builder, max_positions=512)
    of_rows = [problem for problem in problems if problem.row.answer]
    assert [p.task for p in of_rows] == ["rows", "rows_teacher", "rows_partial", "rows_full"]
    assert note.startswith("1 held-out rows are left out") and note.endswith("rows.jsonl:1")
    (tmp_path / "rows.jsonl").write_text(json.dumps(long))
    with pytest.raises(DataError, match=r"rows\.jsonl: no held-out row's prompts fit"):
        read_validation_set(config, builder, max_positions=512)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["validation.tasks=[sums]"], "task 'sums': expected name=FILE"),
        (["validation.tasks=[a:humaneval={folder}/code.jsonl]"], "expected a task without code"),
        (["validation.tasks=[a=/nowhere.jsonl]"], "/nowhere.jsonl"),
        (["checkpoint.keep_best=gsm8k"], "keep_best gsm8k: expected a task of validation, found s"),
        (["validation.samples=2"], "greedy samples are all the same"),
        (["validation.max_response_tokens=500"], "exceed the model's 512 positions"),
        # The student view fits, and the full view does not.
        (
            ["validation.rows=[{folder}/long.jsonl]", "validation.teacher_views=[]"],
            "long.jsonl:1: the full view's prompt is over",
        ),
        (["validation.rows=[]"], "teacher_views partial, full without rows"),
        (["objective.name=sft"], "sft has no teacher"),
    ],
)
def test_invalid_validation_is_refused_by_the_dry_run(
    path, validated, tmp_path, capsys, overrides, message
):
    code = {"task_id": "0", "prompt": "def f():\n", "entry_point": "f", "test": "check = print"}
    (tmp_path / "code.jsonl").write_text(json.dumps(code) + "\n")
    long = {"question": "1 + 1?", "reasoning": "add 1 to 1. " * 10, "answer": "2"}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    words = [text.format(folder=tmp_path) for text in overrides]
    words = ["train", str(path), f"output_dir={tmp_path / 'out'}", *validated, *words, "--dry-run"]
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_validation_set_has_the_prompts_of_each_view(path, validated):
    config = load_config(path, validated)
    builder = ViewBuilder(load_tokenizer(config.model.path), config.views)
    problems, notes = read_validation_set(config, builder, max_positions=512)
    assert notes == []
    by_task = {p.task: p for p in problems}
    assert len(problems) == 6 * 3
    assert [p.task for p in by_task.values() if p.by_teacher] == [*by_task][2:]
    assert by_task["sums_teacher"].prompt_ids == by_task["sums"].prompt_ids
    lengths = [len(by_task[task].prompt_ids) for task in ("rows", "rows_partial", "rows_full")]
    assert lengths == sorted(lengths) and lengths[0] < lengths[2]
    with pytest.raises(ConfigError, match="exceed the model's 40 positions"):
        read_validation_set(config, builder, max_positions=40)
