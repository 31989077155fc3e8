"""The training loop: skipped updates, guards, stops, and the lines that it writes."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("loop"),
        training={"max_skipped_steps": 3, "num_steps": 6},
        checkpoint={"save_every_steps": 100},
    )


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- a non-finite step ---


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_non_finite_step_changes_no_state(path, poison):
    """The loss is NaN on both ranks. The gradient is infinite on one rank only."""
    run_ranks(check_skipped_step, 2, path, poison)


def check_skipped_step(path: Path, poison: str) -> None:
    from aropd_mcore.config_file import load_config
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import build_run
    from aropd_mcore.trainer.step import train_step

    rt = runtime.start()
    run = build_run(load_config(path), rt)
    assert train_step(run, 0).update.applied
    before = copy_state(run)
    with poisoned_teacher(run) if poison == "loss" else infinite_gradient(run):
        result = train_step(run, 1)
    assert not result.update.applied
    assert math.isfinite(float(result.sums["loss"].sum())) == (poison == "gradient")
    assert not math.isfinite(result.update.grad_norm)
    for name, value in copy_state(run).items():
        same = torch.equal(value, before[name]) if torch.is_tensor(value) else value == before[name]
        assert same, name
    assert run.source.weight_version == 1
    following = train_step(run, 2)
    assert following.update.applied
    assert following.update.lr == result.update.lr, "the schedule counts applied updates only"
    assert not all(
        torch.equal(value, before[name])
        for name, value in copy_state(run).items()
        if torch.is_tensor(value)
    )


def test_ranks_with_sums_on_both_sides_of_a_threshold_decide_alike(path):
    """Their losses differ in the last digit, as sums over different groups may."""
    first, second = run_ranks(take_borderline_step, 2, path)
    assert first == second
    applied, findings, _ = first
    assert applied and not findings, "expected rank 0's loss to decide"


def take_borderline_step(path: Path) -> tuple[bool, tuple[str, ...], dict[str, Any]]:
    from aropd_mcore.config_file import load_config
    from aropd_mcore.mcore import runtime
    from aropd_mcore.numerics.position_metrics import single_sum
    from aropd_mcore.trainer.build import build_run
    from aropd_mcore.trainer.guards import _zscore
    from aropd_mcore.trainer.step import train_step

    rt = runtime.start()
    window, loss = [0.98, 0.98], 1.0
    guards = {"window": 2, "loss_spike": "skip", "loss_spike_zscore": _zscore(loss, window)}
    run = build_run(load_config(path, [f"guards.{k}={v!r}" for k, v in guards.items()]), rt)
    calm = {"loss": window, "grad_norm": [1e9, 1e9], "length": [1.0, 1.0]}
    run.guards.load_state({**run.guards.state(), "window": calm})
    usual, own = run.student.forward_backward, loss if rt.rank == 0 else math.nextafter(loss, 2.0)

    def rounded(*args):
        sums, of_samples = usual(*args)
        return {**sums, "loss": single_sum(own, rt.device)}, of_samples

    run.student.forward_backward = rounded  # pyright: ignore[reportAttributeAccessIssue]
    result = train_step(run, 0)
    return result.update.applied, result.verdict.findings, run.guards.state()


def copy_state(run) -> dict[str, Any]:
    """Copy student, teacher and optimizer state of this rank."""
    state: dict[str, Any] = {
        f"{model_name}.{name}": p.detach().clone()
        for model_name, model in (("student", run.student.model), ("teacher", run.teacher.model))
        for name, p in model.named_parameters()
    }
    for part in run.student.optimizer.inner.chained_optimizers:
        for group_index, group in enumerate(part.optimizer.param_groups):
            state[f"step.{group_index}"] = group["step"]
            for index, p in enumerate(group["params"]):
                for name, value in part.optimizer.state[p].items():
                    state[f"{name}.{group_index}.{index}"] = value.clone()
    assert any(name.startswith("exp_avg_sq.") for name in state)
    return state


@contextmanager
def poisoned_teacher(run) -> Iterator[None]:
    """Put one NaN into the teacher's head. It reaches the target of every token."""
    row = run.teacher.head_weight[7]
    value = row[0].clone()
    row[0] = math.nan
    yield
    row[0] = value


@contextmanager
def infinite_gradient(run) -> Iterator[None]:
    """Make one gradient infinite on rank 1, as an overflow in its backward would."""
    parameter = run.student.model[-1].decoder.final_layernorm.weight
    scale = math.inf if run.runtime.rank == 1 else 1.0
    hook = parameter.register_hook(lambda grad: grad * scale)
    yield
    hook.remove()


# --- a run with such steps ---


@pytest.mark.rest
def test_run_with_skipped_steps_reports_them_and_continues(path):
    out = path.parent / "continues"
    run_ranks(train_poisoned, 2, path, out, [1, 2, 4])
    lines = read_lines(out)
    assert [line["step_skipped"] for line in lines] == [0, 1, 1, 0, 1, 0]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert lines[1]["loss"] is None and math.isfinite(lines[3]["loss"])


@pytest.mark.rest
def test_too_many_skipped_steps_in_a_row_stop_the_run(path):
    out = path.parent / "stops"
    message = run_ranks(train_poisoned, 2, path, out, [1, 2, 3])[0]
    assert message is not None
    assert message.startswith(
        "step 3: 3 updates in a row were skipped, the last because of: non-finite loss or gradient "
        "(loss nan, gradient norm"
    )
    assert "The limit is training.max_skipped_steps" in message
    assert f"The last checkpoint is {out / 'checkpoints' / 'iter_0000004'}." in message
    assert [line["step_skipped"] for line in read_lines(out)] == [0, 1, 1, 1]


@pytest.mark.rest
def test_count_of_skipped_steps_survives_a_resume(path):
    out = path.parent / "resumed"
    saves = ["checkpoint.save_every_steps=4", "checkpoint.asynchronous=false"]
    run_ranks(train_poisoned, 2, path, out, [2, 3], saves, 4)
    message = run_ranks(train_poisoned, 2, path, out, [4])[0]
    assert message is not None and message.startswith("step 4: 3 updates in a row")
    assert str(out / "checkpoints" / "iter_0000005") in message
    rates = [line["lr"] for line in read_lines(out)]
    assert rates[0] > rates[1] > rates[2] == rates[3] == rates[4], (
        "the schedule waits for an update"
    )


def test_guard_skips_the_update_or_stops_the_run(path):
    """The first step that `warn` reports is the one that `skip` skips and `stop` stops at."""
    guards = ["guards.window=2", "guards.loss_spike_zscore=1.0"]
    lines = {}
    for action in ("warn", "skip"):
        out = path.parent / action
        run_ranks(train_poisoned, 2, path, out, [], [*guards, f"guards.loss_spike={action}"])
        lines[action] = read_lines(out)
    spikes = [line["num_loss_spikes"] for line in lines["warn"]]
    first = spikes.index(1)
    assert not any(line["step_skipped"] for line in lines["warn"])
    assert [line["step_skipped"] for line in lines["skip"][: first + 1]] == [0] * first + [1]
    assert lines["skip"][first]["loss"] == lines["warn"][first]["loss"]

    out = path.parent / "guarded"
    message = run_ranks(train_poisoned, 2, path, out, [], [*guards, "guards.loss_spike=stop"])[0]
    assert message is not None and message.startswith(f"step {first}: loss spike: loss")
    assert f"The last checkpoint is {out / 'checkpoints' / f'iter_{first + 1:07d}'}." in message
    assert read_lines(out)[-1]["step_skipped"] == 1


@pytest.mark.rest
@pytest.mark.parametrize("objective", ["aropd", "sft"])
def test_run_without_loss_tokens_stops(path, objective):
    """Otherwise loss 0 in every step would look like a perfect run."""
    out = path.parent / f"no-loss-{objective}"
    settings = [f"objective.name={objective}", "objective.skip_response_tokens=16"]
    message = run_ranks(train_poisoned, 2, path, out, [], settings)[0]
    assert message is not None and message.startswith(
        "step 2: 3 updates in a row were skipped, the last because of: no loss tokens: each "
        "response ends within objective.skip_response_tokens"
    )
    lines = read_lines(out)
    assert [line["step_skipped"] for line in lines] == [1, 1, 1]
    assert [line["num_steps_without_loss_tokens"] for line in lines] == [1, 2, 3]
    assert [line["no_loss_tokens_rate"] for line in lines] == [1.0] * 3


@pytest.mark.rest
def test_step_of_rows_without_weight_is_skipped_and_short_responses_are_not(path, tmp_path):
    """The rows of the first step have weight 0. In later steps some responses are too short."""
    rows = [json.loads(line) for line in (path.parent / "rows.jsonl").read_text().splitlines()]
    for row in rows[:8]:
        row["sample_weight"] = 0.0
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.train=[{data}]", "data.shuffle=false", "training.num_steps=3"]
    settings += ["objective.skip_response_tokens=6", "rollout.max_response_tokens=12"]
    out = tmp_path / "out"
    printed = run_ranks(train_printing, 2, path, out, settings)[0]
    lines = read_lines(out)
    assert [line["step_skipped"] for line in lines] == [1, 0, 0]
    assert [line["num_steps_without_loss_tokens"] for line in lines] == [1, 1, 1]
    assert any(0 < line["no_loss_tokens_rate"] < 1 for line in lines[1:])
    assert "WARNING: step 0: no loss tokens: " in printed
    assert "its update is skipped" in printed


def train_printing(path: Path, out: Path, overrides: list[str]) -> str:
    with redirect_stdout(StringIO()) as printed:
        assert train_poisoned(path, out, [], overrides) is None
    return printed.getvalue()


def test_stop_without_a_checkpoint_states_what_to_do(path):
    assert run_ranks(messages_without_checkpoint, 1, path)[0] == [
        "the time limit leaves no room for one step and a save: raise limits.stop_before or "
        "Slurm's --time. No checkpoint has been saved.",
        "SIGTERM before step 0. No checkpoint has been saved; rerun the command to start.",
    ]


def messages_without_checkpoint(path: Path) -> list[str]:
    import signal
    from types import SimpleNamespace
    from typing import cast

    from aropd_mcore.trainer.loop import _stop_error
    from aropd_mcore.trainer.stop import _TIME, StopWanted

    saver = cast(Any, SimpleNamespace(newest=None))
    return [str(_stop_error(StopWanted(code), 0, 0, saver)) for code in (_TIME, signal.SIGTERM)]


class Interrupted(Exception):
    """Simulates a kill."""


def train_poisoned(
    path: Path,
    out: Path,
    poisoned: list[int],
    overrides: list[str] | None = None,
    interrupted_at: int | None = None,
) -> str | None:
    """Train with a poisoned teacher in the given steps. Returns the text of TrainingStopped."""
    from unittest.mock import patch

    from aropd_mcore.config_file import load_config
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer import loop

    config = load_config(path, [f"output_dir={out}", *(overrides or [])])
    train_step = loop.train_step

    def step_or_poisoned_step(run, step, **options):
        if step == interrupted_at:
            raise Interrupted
        if step not in poisoned:
            return train_step(run, step, **options)
        with poisoned_teacher(run):
            return train_step(run, step, **options)

    with patch.object(loop, "train_step", step_or_poisoned_step):
        try:
            loop.train(config, runtime.start())
        except loop.TrainingStopped as stopped:
            return str(stopped)
        except Interrupted:
            pass
    return None


def test_train_command_with_too_many_skipped_steps_exits_with_3(path, tmp_path):
    """sft with one NaN in the weights: every update is skipped."""
    model = tmp_path / "model"
    model.mkdir()
    for file in (path.parent / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    overrides = ["objective.name=sft", f"model.path={model}", f"output_dir={tmp_path / 'out'}"]
    code, printed = run_ranks(train_by_command, 1, path, overrides)[0]
    assert code == 3
    assert printed.startswith("aropd: stopped: step 2: 3 updates in a row")
    assert "Traceback" not in printed and printed.count("\n") == 1


def train_by_command(path: Path, overrides: list[str]) -> tuple[int, str]:
    from aropd_mcore.cli import main

    with redirect_stderr(StringIO()) as printed:
        code = main(["train", str(path), *overrides])
    return code, printed.getvalue()
