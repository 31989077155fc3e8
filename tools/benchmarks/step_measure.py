"""Measurements of step.py on the ranks of a job. Each rank writes a JSON file to its folder."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from random_runs import build_run, measure_step_peaks
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from aropd_mcore.config import Config

PROMPTS = {"student": 256, "partial": 384, "full": 512}
"""Number of prompt tokens by view in the count of FLOPs."""
RESPONSE = 256
"""Number of response tokens in the count of FLOPs."""


def measure_seconds(
    folder: str, methods: Mapping[str, Config], hf: Mapping[str, Any], repeats: int
) -> None:
    """Measure the median seconds of each phase.

    The methods share student, teacher and optimizer, and take turns step by step. They differ in
    objective, batch and response length.
    """
    from aropd_mcore.mcore.student import Student
    from aropd_mcore.rollout.sources import StepPrompts, build_source
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.step import train_step

    first = next(iter(methods.values()))
    runtime = start_runtime(first)
    run = build_run(first, runtime, hf)
    runs = {}
    for name, config in methods.items():
        distils = config.objective.name == "aropd"
        teacher = run.teacher if distils else None
        student = Student.from_config(
            config, run.student.model, run.student.optimizer, teacher, runtime
        )
        runs[name] = replace(
            run,
            config=config,
            student=student,
            teacher=teacher,
            source=build_source(
                config,
                runtime,
                StepPrompts(config, runtime, run.dataset, run.view_builder),
                run.engine if distils else None,
                num_steps=run.num_steps,
                check_stop=lambda: None,
            ),
            engine=run.engine if distils else None,
        )
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for step in range(1 + repeats):  # the first is a warm-up
        for name, method_run in runs.items():
            dist.barrier()
            seconds = train_step(method_run, step).seconds
            times[name].append(seconds | {"step": sum(seconds.values())})
    medians = {
        name: {phase: statistics.median(s[phase] for s in steps[1:]) for phase in steps[0]}
        for name, steps in times.items()
    }
    _write(folder, medians)


def measure_bytes(folder: str, methods: Mapping[str, Config], hf: Mapping[str, Any]) -> None:
    """Measure the state and the peak of each phase, one method after another."""
    from aropd_mcore.trainer.build import start_runtime

    first = next(iter(methods.values()))
    runtime = start_runtime(first)
    measure_step_peaks(first, runtime, hf)  # first: it loads pages of libraries
    _write(folder, {name: measure_step_peaks(c, runtime, hf) for name, c in methods.items()})


def count_flops(folder: str, config: Config, hf: Mapping[str, Any]) -> None:
    """Count the executed FLOPs of Teacher.score and of the student, for one sample."""
    from aropd_mcore.mcore.schedule import run_schedule
    from aropd_mcore.trainer.build import start_runtime

    runtime = start_runtime(config)
    run = build_run(config, runtime, hf, PROMPTS)
    taken = _random_responses(run, config)
    microbatches = _microbatches(config, runtime, taken)
    assert run.teacher is not None and len(microbatches) == 1
    with _counter() as teacher:
        outputs = run.teacher.score(microbatches)
    with _counter() as forward:
        run_schedule(
            list(run.student.model),
            microbatches,
            view_of=lambda microbatch: microbatch.student,
            on_last_stage=lambda hidden_TH, _: hidden_TH,
            forward_only=True,
        )
    with _counter() as both:
        run.student.forward_backward(microbatches, outputs)
    counts = {"teacher": teacher, "student forward": forward, "student": both}
    _write(folder, {name: _by_kind(counter) for name, counter in counts.items()})


def _microbatches(config: Config, runtime: Any, taken: Any) -> list[Any]:
    from aropd_mcore.data.spans import NO_THINKING
    from aropd_mcore.trainer.batch import form_batch

    thinking = [NO_THINKING] * len(taken.rollouts)
    return form_batch(config, runtime, taken.views, taken.rollouts, thinking, 0).microbatches


def measure_bubble(
    folder: str,
    configs: Sequence[Config],
    hf: Mapping[str, Any],
    stage_seconds: float,
    repeats: int,
) -> None:
    """Measure the share of Teacher.score in which this stage is not in its forward.

    Args:
        configs: configurations that differ in their batch.
        stage_seconds: shortest duration of a stage's forward, which sleeps for the rest.
    """
    from aropd_mcore.trainer.build import start_runtime

    runtime = start_runtime(configs[0])
    run = build_run(configs[0], runtime, hf)
    busy: list[float] = []

    def timed(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = forward(*args, **kwargs)
            torch.cuda.synchronize()  # without a GPU, mcore.patches.cpu_mode makes it do nothing
            time.sleep(max(start + stage_seconds - time.perf_counter(), 0.0))
            busy.append(time.perf_counter() - start)
            return output

        return call

    assert run.teacher is not None
    for chunk in run.teacher.model:
        chunk.forward = timed(chunk.forward)
    results = []
    for config in configs:
        taken = _random_responses(run, config)
        microbatches = _microbatches(config, runtime, taken)
        idle = []
        for _ in range(1 + repeats):
            busy.clear()
            dist.barrier()
            start = time.perf_counter()
            run.teacher.score(microbatches)
            dist.barrier()  # the end of the last stage
            idle.append(1 - sum(busy) / (time.perf_counter() - start))
        results.append({"idle": idle[1:], "views": len(busy)})
    _write(folder, results)


def _write(folder: str, result: Any) -> None:
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(result))


def _counter() -> FlopCounterMode:
    """Build a counter that includes in-place matrix products and a CPU's attention.

    Attention is counted by visible pairs, since its kernel skips pairs that a causal mask hides.
    """
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    products = {aten.addmm_: lambda _sum, left, right, **_: mm_flop(left, right)}
    return FlopCounterMode(display=False, custom_mapping=products | attention)


def _attention(query: Sequence[int], key: Sequence[int], *others: Any, **_: Any) -> int:
    """Count 2 D FLOPs for the score and 2 D for the value, per pair of positions and head."""
    _value, _dropout, is_causal = (*others, 0.0, False)[:3]
    num_sequences, heads, length, head_dim = query
    pairs = length * (length + 1) // 2 if is_causal else length * key[2]
    return 4 * num_sequences * heads * head_dim * pairs


def _attention_backward(
    _grad: Any, query: Sequence[int], key: Sequence[int], value: Any, *others: Any, **_: Any
) -> int:
    """Count the recomputed scores, and two products for each one of the forward."""
    _out, _logsumexp, dropout, is_causal = others[:4]
    return _attention(query, key, value, dropout, is_causal) * 5 // 2


def _by_kind(counter: FlopCounterMode) -> dict[str, int]:
    counts = {"products": 0, "attention": 0}
    for operation, flops in counter.get_flop_counts()["Global"].items():
        kind = "attention" if "attention" in str(operation) else "products"
        counts[kind] += flops
    return counts


def _random_responses(run: Any, config: Config) -> Any:
    """Return a step's StepRollouts with random responses."""
    from aropd_mcore.rollout.sources import OracleTraces, StepPrompts

    prompts = StepPrompts(config, run.runtime, run.dataset, run.view_builder)
    limit = config.rollout.max_response_tokens
    return OracleTraces(prompts, max_response_tokens=limit).take(0)
