"""Tests of checkpoints: fp32 values behind bf16 weights, background saves, exports and errors.

tests/trainer/test_resume.py tests on real processes that an fp32 run resumes bitwise.
"""

import itertools
import random
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
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
from aropd_mcore.rollout.native import NativeEngine
from aropd_mcore.trainer.build import build_run, start_runtime
from aropd_mcore.trainer.step import Run, StepResult, train_step
from aropd_mcore.types import Rollout
from tests.support.gathered import export_model
from tests.support.ranks import run_ranks
from tests.support.rollouts import ReplaySource, sample
from tests.support.tiny_runs import write_model, write_run

PROMPT = list(range(40, 60))
EMA_RATE = 1e-3
LR = 1e-3


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Run whose learning rate and EMA rate are so low that bf16 would round the average's step to
    zero."""
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
    """Take a step. Return its result and its loss."""
    result = train_step(run, number)
    assert result.update.applied
    return result, float(result.sums["loss"].sum())


def replay(run: Run, rollouts: Sequence[Rollout]) -> Run:
    """Return the run with the same responses in every step."""
    return replace(run, source=ReplaySource(run.source, itertools.repeat(rollouts)))


def get_teacher(run: Run) -> Teacher:
    assert run.teacher is not None
    return run.teacher


def shards(run: Run) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    average = get_teacher(run).average
    return [*average.shards()] if average is not None else []


def copy_fp32_state(run: Run) -> dict[str, torch.Tensor]:
    """Copy this rank's fp32 values of a bf16 run: main weights, moments, and the EMA."""
    tensors = {f"ema.{i}": average for i, (_, _, average) in enumerate(shards(run))}
    for part in run.student.optimizer.inner.chained_optimizers:
        for g, group in enumerate(part.optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                tensors[f"main.{g}.{i}"] = p
                tensors |= {f"{k}.{g}.{i}": v for k, v in part.optimizer.state[p].items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_bf16_run_updates_saves_and_restores_its_fp32_state(path, tmp_path):
    run_ranks(check_bf16, 2, path, tmp_path)


def check_bf16(path: Path, folder: Path) -> None:
    run = build(path, "model.dtype=fp32")
    exact, exact_loss = step(run, 0)
    runtime.stop()

    run = replay(build(path, "model.dtype=bf16"), exact.rollouts)
    for model in (run.student.model, get_teacher(run).model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    start = {name: p.detach().clone() for name, p in get_teacher(run).model.named_parameters()}
    before = copy_fp32_state(run)
    assert len(before) > 4 and {tensor.dtype for tensor in before.values()} == {torch.float32}
    rounded, loss = step(run, 0)
    # bf16 has 8 bits: 0.4 % per operation, over a few dozen operations.
    assert loss == pytest.approx(exact_loss, rel=0.03)
    assert rounded.update.grad_norm == pytest.approx(exact.update.grad_norm, rel=0.05)

    after = copy_fp32_state(run)
    moved = [after[name] != value for name, value in before.items() if name.startswith("ema.")]
    assert torch.cat(moved).float().mean() > 0.5, "the EMA did not change"
    weights = dict(get_teacher(run).model.named_parameters())
    unchanged = torch.cat([(weights[name] == p).flatten() for name, p in start.items()])
    assert unchanged.float().mean() > 0.9, "expected bf16 to round this step to zero"

    state.save(folder, 1, run.student, run.teacher, {"step": 1}, run.runtime)
    saved, random_numbers = copy_fp32_state(run), draw()
    _, next_loss = step(run, 1)
    final = copy_fp32_state(run)
    runtime.stop()

    run = build(path, "model.dtype=bf16")
    checkpoint = newest(folder)
    assert checkpoint is not None
    assert state.load(checkpoint, run.student, run.teacher, run.runtime) == {"step": 1}
    assert_equal(copy_fp32_state(run), saved)
    assert draw() == random_numbers, "a generator's state was not restored"
    assert step(replay(run, exact.rollouts), 1)[1] == next_loss
    assert_equal(copy_fp32_state(run), final)


def draw() -> tuple[float, ...]:
    """Draw a number from each of the process's random generators."""
    with get_cuda_rng_tracker().fork():
        tracker_number = float(torch.rand(()))
    return random.random(), float(np.random.random()), float(torch.rand(())), tracker_number


def test_background_save_holds_the_values_at_its_start(path, tmp_path):
    run_ranks(check_background, 2, path, tmp_path)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def check_background(path: Path, folder: Path) -> None:
    run = build(path)
    step(run, 0)
    parts = run.student, run.teacher, {"step": 1}, run.runtime
    at_once = state.save(folder / "at-once", 1, *parts)
    directory.prepare(folder / "later")
    has_stepped = folder / f"has-stepped-{run.runtime.rank}"
    with (
        patch.object(writer.os, "nice", lambda _: wait_for(has_stepped)),  # in the writing process
        host_copies() as copies,
    ):
        saving = state.Saving(folder / "later", 1, *parts)
    before = copy_fp32_state(run)
    step(run, 1)
    assert not saving.is_written(), "expected the step to end before the write"
    assert newest(folder / "later") is None
    assert copies or run.runtime.rank, "expected rank 0 to write tensors"
    assert all(copy() is not None for copy in copies), "freed before they are written"
    has_stepped.touch()
    saving.commit()
    assert all(copy() is None for copy in copies), "kept after they were written"
    later = newest(folder / "later")
    assert later is not None
    after = copy_fp32_state(run)
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    sums, expected = (read_manifest(p)["files"] for p in (later, at_once))
    tensors = [name for name in expected if name.endswith(".distcp")]
    assert tensors and {name: sums[name] for name in tensors} == {
        name: expected[name] for name in tensors
    }


@contextmanager
def host_copies() -> Iterator[list[weakref.ref[torch.Tensor]]]:
    """Context in which Megatron's writer copies CPU tensors to the host, as it does GPU tensors.

    Yields references to the copies.
    """
    usual, copies = FileSystemWriterAsync.preload_tensors, []

    def preload(*args: Any, **kwargs: Any) -> Any:
        buckets = []
        for path, name, (data, tensors) in usual(*args, **kwargs):
            own = [(item, tensor.clone()) for item, tensor in tensors]
            copies.extend(weakref.ref(tensor) for _, tensor in own)
            buckets.append((path, name, (data, own)))
        return buckets

    with patch.object(FileSystemWriterAsync, "preload_tensors", staticmethod(preload)):
        yield copies


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_exported_student_and_teacher_equal_the_trained_models(path, tmp_path):
    """A run on TP 2 x PP 2: same weights as the live models, same log-probs in transformers."""
    rollouts = run_ranks(train_and_save, 4, path, tmp_path)[0]
    exported_logprobs = {}
    for role, (rollout,) in rollouts.items():
        arguments = ["convert", "export", str(tmp_path), str(tmp_path / role), "--weights", role]
        assert cli.main(arguments) == 0
        live = verify(open_source(tmp_path / f"live-{role}"), open_source(tmp_path / role))
        assert live.same and len(live.tensors) > 40
        model = AutoModelForCausalLM.from_pretrained(tmp_path / role)
        assert model.dtype == torch.float32
        tokens = torch.tensor([[*PROMPT, *rollout.response_ids]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        logprobs = logprobs.gather(-1, tokens[0, len(PROMPT) :, None]).squeeze(-1).tolist()
        assert logprobs == pytest.approx(rollout.logprobs, abs=1e-4)
        exported_logprobs[role] = logprobs
    student, teacher = exported_logprobs["student"], exported_logprobs["teacher"]
    assert student != pytest.approx(teacher, abs=1e-3), "student and teacher are the same model"
    summary = inspect(tmp_path)
    assert (summary.step, summary.has_teacher, summary.has_optimizer) == (3, True, True)
    sizes = {name: size for name, size in summary.layout.items() if size > 1}
    assert sizes == {"tensor": 2, "pipeline": 2}
    assert not verify(open_source(tmp_path), open_source(tmp_path, role="teacher")).same


def train_and_save(path: Path, folder: Path) -> dict[str, list[Rollout]]:
    run = build(path, "parallel.tensor=2", "parallel.pipeline=2", "teacher.ema_rate=0.1")
    for number in range(3):
        step(run, number)
    progress = {"step": 3}
    state.save(folder / "checkpoints", 3, run.student, run.teacher, progress, run.runtime)
    model = path.parent / "model"
    if run.runtime.rank == 0:
        keep_companions(HFSource(model), folder / HF_FOLDER, torch.float32)
        # The key that transformers 4 writes, as in all published Qwen2.5 models.
        config = folder / HF_FOLDER / "config.json"
        config.write_text(config.read_text().replace('"dtype"', '"torch_dtype"'))
    sampling = SamplingConfig(max_response_tokens=12)
    rollouts = {}
    for role, live in (("student", run.student.model), ("teacher", get_teacher(run).model)):
        engine = NativeEngine(live, run.runtime, eos_token_ids=[], batch_size=1)
        rollouts[role] = sample(engine, [PROMPT], [5], sampling)
        export_model(live, model, folder / f"live-{role}", run.runtime)
    return rollouts


def test_load_of_an_unusable_checkpoint_raises(path, tmp_path):
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

    sft_checkpoint = state.save(folder, 1, run.student, None, {}, run.runtime)

    runtime.stop()
    run = build(path)
    with pytest.raises(CheckpointError, match="cannot be loaded into this run: teacher") as e:
        state.load(sft_checkpoint, run.student, run.teacher, run.runtime)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400

    runtime.stop()
    model = write_model(folder / "wider", intermediate_size=128)
    wider = build(path, "objective.name=sft", f"model.path={model}")
    with pytest.raises(CheckpointError, match=r"linear_fc[12].*shape mismatch"):
        state.load(sft_checkpoint, wider.student, None, wider.runtime)
