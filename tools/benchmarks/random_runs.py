"""Runs without files, for benchmarks: a random model, with prompts and responses of full length.

This module imports only torch and the configuration. Megatron is imported on the ranks.
"""

import ctypes
import gc
import multiprocessing
import os
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from aropd_mcore.config import Config, PrecisionConfig
from aropd_mcore.types import Row, Views

DENSE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
WARM_UP = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512}
"""Settings that turn a config.json into that of a tiny model."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment in which the C library returns freed blocks to the system at once. The library reads
these variables when a process starts."""
_NUM_STEPS = 1000
"""Length of the learning-rate schedule; more than a benchmark takes."""


def on_ranks(
    function: Callable[..., None], num_ranks: int, folder: str, *args: Any, exact_memory: bool
) -> None:
    """Run `function(folder, *args)` on every rank of a new job. It writes its results to `folder`.

    Args:
        folder: an empty folder.
        exact_memory: whether to set GIVE_BACK, which makes a step slower.
    """
    added = GIVE_BACK if exact_memory else {}
    before = {name: os.environ.get(name) for name in added}
    os.environ |= added
    try:
        start_processes(
            _rank, (num_ranks, function, folder, *args), nprocs=num_ranks, start_method="spawn"
        )
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank(
    rank: int, num_ranks: int, function: Callable[..., None], folder: str, *args: Any
) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(minutes=5),
    )
    function(folder, *args)
    dist.barrier()
    for child in multiprocessing.active_children():  # Megatron's checkpointing leaves a process
        child.kill()
    os._exit(0)  # Megatron's process groups end with the process


def build_run(
    config: Config,
    runtime: Any,
    hf: Mapping[str, Any],
    prompt_tokens: Mapping[str, int] | None = None,
) -> Any:
    """Build a run as trainer.build.build_run does, but without files.

    Responses never end before their limit.

    Args:
        hf: contents of the config.json of the student, and of a teacher of kind `model`.
        prompt_tokens: prompt length by view (student, partial, full). The default is
            views.max_prompt_tokens.
    """
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.optim import Optimizer
    from aropd_mcore.mcore.student import Student
    from aropd_mcore.mcore.teacher import Teacher
    from aropd_mcore.mcore.teachers import Teachers
    from aropd_mcore.rollout.native import NativeEngine
    from aropd_mcore.rollout.sources import StepPrompts, build_source
    from aropd_mcore.trainer.build import add_teacher_layout
    from aropd_mcore.trainer.guards import Guards
    from aropd_mcore.trainer.step import Run

    def random_model(runtime: Any, precision: PrecisionConfig, **options: Any) -> Any:
        dtype = runtime.dtype(config.model.dtype)
        recompute = config.training.recompute
        model = build_model(
            hf, runtime, dtype=dtype, recompute=recompute, precision=precision, **options
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        return model

    def random_teacher() -> Teacher:
        settings, precision = config.teacher, config.precision.for_teacher
        if settings.parallel is None:
            own = None if settings.kind == "live" else random_model(runtime, precision)
            return Teacher(settings, runtime, student=model, model=own, optimizer=optimizer)
        own_runtime = add_teacher_layout(config, settings, runtime)
        stages = config.stages_of(settings, hf["num_hidden_layers"])
        return Teacher(
            settings,
            own_runtime,
            student=model,
            model=random_model(own_runtime, precision, stages=stages, has_head=False),
            student_runtime=runtime,
            head=model.head_weight().detach().clone() if runtime.is_last_stage else None,
        )

    model = random_model(runtime, config.precision)
    overlap = config.parallel.overlap_grad_reduce
    optimizer = Optimizer(
        model, config.optimizer, num_steps=_NUM_STEPS, overlap_grad_reduce=overlap
    )
    teachers = engine = None
    if config.objective.name == "aropd":
        teachers = Teachers({"": random_teacher()})
        batch_size = config.rollout.batch_size
        engine = NativeEngine(model, runtime, eos_token_ids=(), batch_size=batch_size)
    dataset: Any = SimpleNamespace(row_at=lambda *_, **__: Row("", "", ""))
    view_builder: Any = _Views(config, hf["vocab_size"], prompt_tokens or {})
    return Run(
        config=config,
        runtime=runtime,
        num_steps=_NUM_STEPS,
        dataset=dataset,
        view_builder=view_builder,
        student=Student.from_config(config, model, optimizer, teachers, runtime),
        teachers=teachers,
        source=build_source(
            config,
            runtime,
            StepPrompts(config, runtime, dataset, view_builder),
            engine,
            num_steps=_NUM_STEPS,
            check_stop=lambda: None,
        ),
        engine=engine,
        pad_token_id=0,
        guards=Guards(config.guards, max_skipped_steps=config.training.max_skipped_steps),
    )


class _NoText:
    """Tokenizer of random ids, which have no text."""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class _Views:
    """Random prompts, and a random response for `sft`."""

    def __init__(self, config: Config, vocab_size: int, prompt_tokens: Mapping[str, int]):
        self._tokens, self._vocab_size = random.Random(0), vocab_size
        limit = config.views.max_prompt_tokens
        self._lengths = [prompt_tokens.get(view, limit) for view in ("student", "partial", "full")]
        self._response_tokens = config.rollout.max_response_tokens
        self.tokenizer = _NoText()

    def build_each(self, row: Row) -> list[Views]:
        student, partial, full = map(self._random, self._lengths)
        return [Views(row, student, partial, full)]

    def oracle_response_ids(self, _row: Row) -> tuple[int, ...]:
        return self._random(self._response_tokens)

    def _random(self, length: int) -> tuple[int, ...]:
        return tuple(self._tokens.randrange(self._vocab_size) for _ in range(length))


class Phases:
    """Peak memory of each phase of a step. Calls of the run mark where a phase begins.

    On a GPU it is torch's allocated memory, on a CPU the resident memory by the kernel's VmHWM.
    """

    def __init__(self, run: Any):
        self.peaks: dict[str, int] = {}
        self._phase = ""
        student, optimizer = run.student, run.student.optimizer
        optimizer.grad_norm = self._begins("optimizer", optimizer.grad_norm)
        student.forward_backward = self._begins("student", student.forward_backward)
        if run.teacher:
            run.teacher.score = self._begins("teacher", run.teacher.score)
            run.source.take = self._begins("rollout", run.source.take)

    def _begins(self, phase: str, call: Any) -> Any:
        def measured(*args: Any, **kwargs: Any) -> Any:
            self.finish()
            self._phase = phase
            _reset_peak()
            return call(*args, **kwargs)

        return measured

    def finish(self) -> dict[str, int]:
        if self._phase:
            self.peaks[self._phase] = read_peak()
        return self.peaks


def measure_step_peaks(config: Config, runtime: Any, hf: Mapping[str, Any]) -> dict[str, int]:
    """Measure a run's bytes on this rank: `state`, each phase including the state, and `peak`."""
    from aropd_mcore.trainer.step import train_step

    baseline = settle()
    run = build_run(config, runtime, hf)
    train_step(run, 0)  # allocates the permanent buffers
    sizes = {"state": settle() - baseline}
    phases = Phases(run)
    train_step(run, 1)
    sizes |= {name: peak - baseline for name, peak in phases.finish().items()}
    return sizes | {"peak": max(sizes.values())}


def settle() -> int:
    """Return all freed memory to the system, reset the peak, and return the bytes still held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)
    _reset_peak()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def read_peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status[name].split()[0]) * 1024
