"""Checkpoints, bf16 with its fp32 masters, and what is refused.

That a run goes on bitwise in fp32 is tested on real processes in tests/trainer/test_resume.py.
"""

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from transformers import AutoModelForCausalLM

from aropd_mcore import cli
from aropd_mcore.config import SamplingConfig
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.import_export import keep_companions
from aropd_mcore.convert.inspect import inspect
from aropd_mcore.convert.manifest import newest, parse_step, read_manifest
from aropd_mcore.convert.source import HF_FOLDER, HFSource, open_source
from aropd_mcore.convert.verify import verify
from aropd_mcore.mcore import runtime
from aropd_mcore.mcore.checkpoint import directory, state, writer
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.mcore.weights import export_model
from aropd_mcore.rollout.native import NativeEngine
from aropd_mcore.trainer.build import build_run, start_runtime
from aropd_mcore.trainer.step import Run, StepResult, train_step
from aropd_mcore.types import Rollout
from tests.support.ranks import run_ranks
from tests.support.rollouts import ReplaySource, sample
from tests.support.tiny_runs import write_model, write_run

PROMPT = list(range(40, 60))
EMA_RATE = 1e-3
LR = 1e-3


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Learning rate and EMA rate so low that a step of the average vanishes in bf16."""
    path = write_run(
        tmp_path_factory.mktemp("checkpoints"),
        teacher={"ema_rate": EMA_RATE},
        optimizer={"lr": LR, "warmup_ratio": 0.0},
    )
    write_model(path.parent / "model", initializer_range=0.1)
    return path


def build(path: Path, *overrides: str) -> Run:
    config = load_config(path, list(overrides))
    return build_run(config, start_runtime(config))


def step(run: Run, number: int) -> tuple[StepResult, float]:
    """Take a step; its result and its loss."""
    result = train_step(run, number)
    assert result.update.applied
    return result, float(result.sums["loss"].sum())


def replay(run: Run, rollouts: Sequence[Rollout]) -> Run:
    """The run, with the same responses for every step."""
    return replace(run, source=ReplaySource(run.source, itertools.repeat(rollouts)))


def teacher_of(run: Run) -> Teacher:
    assert run.teacher is not None
    return run.teacher


def masters(run: Run) -> dict[str, torch.Tensor]:
    """The fp32 values behind a bf16 run, on this rank: optimizer, its state, and the average."""
    tensors = {f"ema.{name}": average for name, average in teacher_of(run)._master.items()}
    for part in run.student.optimizer.inner.chained_optimizers:
        for g, group in enumerate(part.optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                tensors[f"main.{g}.{i}"] = p
                tensors |= {f"{k}.{g}.{i}": v for k, v in part.optimizer.state[p].items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_bf16_keeps_fp32_masters_that_move_and_are_saved(path, tmp_path):
    run_ranks(check_bf16, 2, path, tmp_path)


def check_bf16(path: Path, folder: Path) -> None:
    run = build(path, "model.dtype=fp32")
    exact, exact_loss = step(run, 0)
    runtime.stop()

    run = replay(build(path, "model.dtype=bf16"), exact.rollouts)
    for model in (run.student.model, teacher_of(run).model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    start = {name: p.detach().clone() for name, p in teacher_of(run).model.named_parameters()}
    before = masters(run)
    assert len(before) > 4 and {tensor.dtype for tensor in before.values()} == {torch.float32}
    rounded, loss = step(run, 0)
    # bf16 has 8 bits, 0.4 % an operation, through a few dozen operations.
    assert loss == pytest.approx(exact_loss, rel=0.03)
    assert rounded.update.grad_norm == pytest.approx(exact.update.grad_norm, rel=0.05)

    students = dict(run.student.model.named_parameters())
    average = teacher_of(run)._master
    assert average.keys() == start.keys()
    for name, was in start.items():
        moved = average[name] - was.float()
        expected = EMA_RATE * (students[name].detach().float() - was.float())
        # What lerp rounds is of the size of the weight, not of the step.
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=2e-7, msg=name)
    first = "0.decoder.layers.0.mlp.linear_fc1.weight"
    assert (average[first] != start[first].float()).float().mean() > 0.5, "the average stood still"
    still = (teacher_of(run).model.get_parameter(first) == start[first]).float().mean()
    assert still > 0.9, "in bf16 alone this step should have vanished"

    state.save(folder, 1, run.student, run.teacher, {"step": 1}, run.runtime)
    saved, drawn = masters(run), draw()
    _, following = step(run, 1)
    reached = masters(run)
    runtime.stop()

    run = build(path, "model.dtype=bf16")
    path_of_save = newest(folder)
    assert path_of_save is not None
    assert state.load(path_of_save, run.student, run.teacher, run.runtime) == {"step": 1}
    assert_equal(masters(run), saved)
    assert draw() == drawn, "every generator goes on from where it was"
    assert step(replay(run, exact.rollouts), 1)[1] == following
    assert_equal(masters(run), reached)


def draw() -> tuple[float, ...]:
    """A number of each generator that a process has."""
    with get_cuda_rng_tracker().fork():
        of_tracker = float(torch.rand(()))
    return random.random(), float(np.random.random()), float(torch.rand(())), of_tracker


def test_a_save_in_the_background_holds_the_values_at_its_start(path, tmp_path):
    run_ranks(check_background, 2, path, tmp_path)


def check_background(path: Path, folder: Path) -> None:
    run = build(path)
    step(run, 0)
    parts = run.student, run.teacher, {"step": 1}, run.runtime
    at_once = state.save(folder / "at-once", 1, *parts)
    directory.prepare(folder / "later")
    with patch.object(writer.os, "nice", lambda _: time.sleep(2.0)):  # in the writing process
        saving = state.Saving(folder / "later", 1, *parts)
    before = masters(run)
    step(run, 1)
    assert not saving.is_written(), "the step was to come before the writing"
    assert newest(folder / "later") is None
    assert saving.commit() >= 2.0
    later = newest(folder / "later")
    assert later is not None
    assert any(not torch.equal(value, before[name]) for name, value in masters(run).items())
    sums, expected = (read_manifest(p)["files"] for p in (later, at_once))
    tensors = [name for name in expected if name.endswith(".distcp")]
    assert tensors and {name: sums[name] for name in tensors} == {
        name: expected[name] for name in tensors
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_exports_give_transformers_the_trained_models(path, tmp_path):
    """Student and teacher of a run on TP 2 x PP 2: the live weights, and the same log-probs."""
    rollouts = run_ranks(train_and_save, 4, path, tmp_path)[0]
    found = {}
    for who, (rollout,) in rollouts.items():
        arguments = ["convert", "export", str(tmp_path), str(tmp_path / who), "--weights", who]
        assert cli.main(arguments) == 0
        live = verify(open_source(tmp_path / f"live-{who}"), open_source(tmp_path / who))
        assert live.same and len(live.tensors) > 40
        model = AutoModelForCausalLM.from_pretrained(tmp_path / who)
        assert model.dtype == torch.float32
        tokens = torch.tensor([[*PROMPT, *rollout.response_ids]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        found[who] = logprobs.gather(-1, tokens[0, len(PROMPT) :, None]).squeeze(-1).tolist()
        assert found[who] == pytest.approx(rollout.logprobs, abs=1e-4)
    assert found["student"] != pytest.approx(found["teacher"], abs=1e-3), "the same model twice"
    summary = inspect(tmp_path)
    assert (summary.step, summary.has_teacher, summary.has_optimizer) == (3, True, True)
    sizes = {name: size for name, size in summary.layout.items() if size > 1}
    assert sizes == {"tensor": 2, "pipeline": 2}
    assert not verify(open_source(tmp_path), open_source(tmp_path, who="teacher")).same


def train_and_save(path: Path, folder: Path) -> dict[str, list[Rollout]]:
    run = build(path, "parallel.tensor=2", "parallel.pipeline=2", "teacher.ema_rate=0.1")
    for number in range(3):
        step(run, number)
    progress = {"step": 3}
    state.save(folder / "checkpoints", 3, run.student, run.teacher, progress, run.runtime)
    model = path.parent / "model"
    if run.runtime.rank == 0:
        keep_companions(HFSource(model), folder / HF_FOLDER, torch.float32)
        # As transformers 4 writes it, and every published Qwen2.5 has it.
        config = folder / HF_FOLDER / "config.json"
        config.write_text(config.read_text().replace('"dtype"', '"torch_dtype"'))
    sampling = SamplingConfig(max_response_tokens=12)
    rollouts = {}
    for who, live in (("student", run.student.model), ("teacher", teacher_of(run).model)):
        engine = NativeEngine(live, run.runtime, eos_token_ids=[], batch_size=1)
        rollouts[who] = sample(engine, [PROMPT], [5], sampling)
        export_model(live, model, folder / f"live-{who}", run.runtime)
    return rollouts


def test_what_cannot_be_loaded_is_refused(path, tmp_path):
    run_ranks(check_refusals, 1, path, tmp_path)


def check_refusals(path: Path, folder: Path) -> None:
    assert newest(folder / "nothing") is None
    with pytest.raises(CheckpointError, match="expected a folder named iter_NNNNNNN"):
        parse_step(folder / "iter_12")

    run = build(path, "objective.name=sft")
    empty = folder / "iter_0000001"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="iter_0000001: not a checkpoint"):
        state.load(empty, run.student, run.teacher, run.runtime)
    empty.rmdir()

    of_sft = state.save(folder, 1, run.student, None, {}, run.runtime)

    runtime.stop()
    distilling = build(path)
    with pytest.raises(CheckpointError, match="cannot be loaded into this run: teacher") as e:
        state.load(of_sft, distilling.student, distilling.teacher, distilling.runtime)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400

    runtime.stop()
    model = write_model(folder / "wider", intermediate_size=128)
    wider = build(path, "objective.name=sft", f"model.path={model}")
    with pytest.raises(CheckpointError, match=r"shape mismatch .*linear_fc[12]"):
        state.load(of_sft, wider.student, None, wider.runtime)
