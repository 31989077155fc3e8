"""Inputs of a run: checks that ranks share out, weights of sources, and ratios of partial views."""

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aropd_mcore import cli
from aropd_mcore.config_file import load_config
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.ranks import load_in_turn
from aropd_mcore.data.records import DataError
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.rollout.engine import rollout_seed
from aropd_mcore.rollout.sources import StepPrompts
from aropd_mcore.trainer.preflight import open_inputs
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import NUM_ROWS, write_run
from tests.support.training import read_lines, repeatable, train_on_ranks


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    validation = {
        "rows": [str(folder / "rows.jsonl")],
        "teacher_views": ["partial", "full"],
        "limit": 7,
    }
    return write_run(
        folder,
        validation=validation,
        training={"num_steps": None, "num_epochs": 1},
        optimizer={"schedule": "constant"},
        checkpoint={"save_every_steps": 2, "asynchronous": False},
    )


def with_long_traces(path: Path, out: Path, *numbers: int) -> str:
    """Write the rows with traces that fit into no prompt. Returns an override."""
    rows = [json.loads(line) for line in (path.parent / "rows.jsonl").read_text().splitlines()]
    for number in numbers:
        rows[number]["reasoning"] = "long " * 100
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train=[{out}]"


def open_counted(path: Path, overrides: list[str]) -> tuple[dict[str, Any], int, int]:
    """Open the inputs on this rank of a run_ranks world.

    Returns:
        The inputs in comparable form or the error, and the numbers of rows and of held-out rows
        whose prompts this rank has built.
    """
    from unittest.mock import patch

    from aropd_mcore.trainer.build import start_runtime

    config = load_config(path, overrides)
    runtime, built = start_runtime(config), Counter()
    build_each, prompt = ViewBuilder.build_each, ViewBuilder.prompt

    def counted_build(self, row):
        built["rows"] += 1
        before = built["prompts"]
        try:
            return build_each(self, row)
        finally:
            built["prompts"] = before  # of validation only

    def counted_prompt(self, row, view, ratio=None):
        built["prompts"] += 1
        return prompt(self, row, view, ratio)

    with (
        patch.object(ViewBuilder, "build_each", counted_build),
        patch.object(ViewBuilder, "prompt", counted_prompt),
    ):
        try:
            inputs = open_inputs(config, runtime)
        except DataError as error:
            return {"error": f"{type(error).__name__}: {error}"}, built["rows"], 0
    opened = {
        "rows": inputs.dataset[:],
        "bad_rows": [str(error) for error in inputs.dataset.bad_rows],
        "notes": inputs.notes,
        "problems": inputs.problems,
        "num_steps": inputs.num_steps,
        "about": inputs.about,
    }
    return opened, built["rows"], built["prompts"] // 3  # three views of a held-out row


def test_two_ranks_build_the_prompts_of_half_of_the_rows_each(path, tmp_path):
    dropped = [with_long_traces(path, tmp_path / "rows.jsonl", 9, 4, 5), "data.on_bad_row=skip"]
    cases: list[tuple[list[str], int]] = [([], 0), (dropped, 3), (["objective.name=sft"], 0)]
    for overrides, num_dropped in cases:
        if "objective.name=sft" in overrides:
            overrides = [*overrides, "validation.teacher_views=[]"]
        (alone, num_rows, num_heldout), *_ = run_ranks(open_counted, 1, path, overrides)
        # The teacher's problems have the prompts that were built for the student's.
        heldout = {problem.row.origin for problem in alone["problems"]}
        assert (num_rows, num_heldout) == (NUM_ROWS, len(heldout)) == (NUM_ROWS, 7)
        assert (
            len(alone["rows"])
            == NUM_ROWS - num_dropped
            == alone["num_steps"] * 8 + -num_dropped % 8
        )
        parts = run_ranks(open_counted, 2, path, overrides)
        assert [part[1] for part in parts] == [NUM_ROWS // 2] * 2
        assert sum(part[2] for part in parts) == num_heldout
        assert abs(parts[0][2] - parts[1][2]) <= 1
        assert parts[0][0] == parts[1][0] == alone
        if num_dropped:
            origins = [text.partition(": ")[0] for text in alone["bad_rows"]]
            assert origins == [f"{tmp_path}/rows.jsonl:{line}" for line in (5, 6, 10)]


def test_two_ranks_raise_the_error_of_the_first_bad_row(path, tmp_path):
    """Rank 1 finds row 6, and rank 0 finds row 9."""
    overrides = [with_long_traces(path, tmp_path / "rows.jsonl", 8, 5)]
    results = run_ranks(open_counted, 2, path, overrides)
    for result, _, _ in results:
        assert result["error"].startswith(f"PromptTooLong: {tmp_path}/rows.jsonl:6: the partial")
    heldout = [
        f"validation.rows=[{tmp_path / 'rows.jsonl'}]",
        "validation.limit=null",
        "validation.teacher_views=[full]",
    ]
    for result, _, _ in run_ranks(open_counted, 2, path, heldout):
        assert result["error"].startswith(f"PromptTooLong: {tmp_path}/rows.jsonl:6: the partial")


def load_as_local_rank(log: Path, fails: bool) -> str:
    """Call load_in_turn as one of the processes of one machine. Returns the error's text."""
    import torch.distributed as dist

    def load() -> int:
        with log.open("a") as file:
            file.write(f"{dist.get_rank()}\n")
        if fails:
            raise DataError("hf://a/b/train", "the hub cannot be reached")
        return dist.get_rank()

    class Here:
        rank = local_rank = dist.get_rank()
        world_size = dist.get_world_size()

        def gather(self, part: Any) -> list[Any]:
            parts: list[Any] = [None] * self.world_size
            dist.all_gather_object(parts, part)
            return parts

    try:
        assert load_in_turn(Here(), load, [Path("a.jsonl"), Path("hf://a/b")]) == dist.get_rank()
    except DataError as error:
        return str(error)
    return ""


def test_load_in_turn_downloads_on_the_first_rank_of_a_machine_first(tmp_path):
    log = tmp_path / "log"
    assert run_ranks(load_as_local_rank, 2, log, False) == ["", ""]
    assert log.read_text() == "0\n1\n"
    log.unlink()
    message = "hf://a/b/train: the hub cannot be reached"
    assert run_ranks(load_as_local_rank, 2, log, True) == [message, message]
    assert log.read_text() == "0\n", "a second rank must not repeat the failed download"


def test_dry_run_reports_the_rows_of_each_source_and_the_steps_of_weighted_epochs(
    path, tmp_path, capsys
):
    rows = path.parent / "rows.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
    sources = f"data.train=[{{path: {rows}, weight: 0.5}}, {few}, {{path: {few}, weight: 3}}]"
    command = ["train", str(path), f"output_dir={tmp_path / 'out'}", "--dry-run"]
    assert cli.main([*command, sources, "training.num_epochs=3"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "# 30 rows (24 per epoch), 9 steps of 8 responses",
        f"# {rows}: 24 rows, 12 per epoch (weight 0.5)",
        f"# {few}: 3 rows\n",
        f"# {few}: 3 rows, 9 per epoch (weight 3)",
    ):
        assert line in printed, line
    assert cli.main([*command, f"data.train=[{rows}, {{path: {few}, weight: 0.1}}]"]) == 2
    assert "at least one row per epoch; found weight 0.1 of 3 rows" in capsys.readouterr().err


RATIOS = [0.25, 0.5, 0.75]


def test_step_prompts_draw_a_ratio_per_sample_alike_in_every_layout(path):
    overrides = [f"views.partial_ratio={RATIOS}", "rollout.rollouts_per_prompt=4"]
    config = load_config(path, overrides)
    builder = ViewBuilder(load_tokenizer(config.model.path), config.views)
    dataset = RowDataset.load(config.data.train)

    def prompts(dp_rank: int, dp_size: int) -> StepPrompts:
        runtime = cast(Any, SimpleNamespace(dp_rank=dp_rank, dp_size=dp_size))
        return StepPrompts(config, runtime, dataset, builder)

    steps = [prompts(0, 1)(step) for step in range(12)]
    drawn: Counter[int] = Counter()
    for step, (views, seeds) in enumerate(steps):
        halves = [prompts(dp_rank, 2)(step) for dp_rank in range(2)]
        assert views == halves[0][0] + halves[1][0] and seeds == halves[0][1] + halves[1][1]
        for index, (view, seed) in enumerate(zip(views, seeds, strict=True)):
            position, sample = 2 * step + index // 4, index % 4
            assert seed == rollout_seed(config.training.seed, position, sample)
            partials = [each.partial_ids for each in builder.build_each(view.row)]
            drawn[partials.index(view.partial_ids)] += 1
    # 96 draws: each ratio 32 times on average, with standard deviation 4.6.
    assert len(drawn) == 3 and min(drawn.values()) > 15
    single = load_config(path, ["views.partial_ratio=0.5", "rollout.rollouts_per_prompt=4"])
    same = StepPrompts(
        single,
        cast(Any, SimpleNamespace(dp_rank=0, dp_size=1)),
        dataset,
        ViewBuilder(builder.tokenizer, single.views),
    )(0)
    assert same[1] == steps[0][1], "the ratios must not change the seeds of the rollouts"


def test_interrupted_run_with_ratios_and_weights_resumes_identically(path, tmp_path):
    rows = path.parent / "rows.jsonl"
    settings = [f"data.train=[{{path: {rows}, weight: 0.7}}]", f"views.partial_ratio={RATIOS}"]
    settings += ["training.num_epochs=null", "validation.rows=[]", "validation.teacher_views=[]"]
    for name, lengths in (("whole", [4]), ("interrupted", [2, 4])):
        for num_steps in lengths:
            out = [f"output_dir={tmp_path / name}", f"training.num_steps={num_steps}"]
            run_ranks(train_on_ranks, 1, path, [*settings, *out])
    lines = [repeatable(read_lines(tmp_path / name)) for name in ("whole", "interrupted")]
    assert len(lines[0]) == 4 and lines[0] == lines[1]
    assert os.path.isdir(tmp_path / "interrupted" / "checkpoints" / "iter_0000002")
