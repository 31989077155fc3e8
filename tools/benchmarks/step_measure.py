"""What step.py measures, on the ranks of a job; each leaves a JSON file in the job's folder."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from random_runs import build_run, peaks_of_a_step
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from aropd_mcore.config import Config

PROMPTS = {"student": 256, "partial": 384, "full": 512}
RESPONSE = 256
"""Lengths of which forward FLOPs are counted."""


def measure_seconds(
    folder: str, methods: Mapping[str, Config], hf: Mapping[str, Any], repeats: int
) -> None:
    """Median seconds of each phase. The methods have one student, teacher and optimizer, and take
    turns step by step; they differ in objective, batch and response length."""
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
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for step in range(1 + repeats):  # the first is a warm-up
        for name, of_method in runs.items():
            dist.barrier()
            seconds = train_step(of_method, step).seconds
            found[name].append(seconds | {"step": sum(seconds.values())})
    medians = {
        name: {phase: statistics.median(s[phase] for s in steps[1:]) for phase in steps[0]}
        for name, steps in found.items()
    }
    _leave(folder, medians)


def measure_bytes(folder: str, methods: Mapping[str, Config], hf: Mapping[str, Any]) -> None:
    """State, and peak of each phase, of one method after another."""
    from aropd_mcore.trainer.build import start_runtime

    first = next(iter(methods.values()))
    runtime = start_runtime(first)
    peaks_of_a_step(first, runtime, hf)  # leaves pages of libraries behind, which are not the run's
    _leave(folder, {name: peaks_of_a_step(c, runtime, hf) for name, c in methods.items()})


def count_flops(folder: str, config: Config, hf: Mapping[str, Any]) -> None:
    """Executed FLOPs of Teacher.score and of the student's forward, for one sample."""
    from aropd_mcore.mcore.schedule import run_schedule
    from aropd_mcore.trainer.batch import form_batch
    from aropd_mcore.trainer.build import start_runtime

    runtime = start_runtime(config)
    run = build_run(config, runtime, hf, PROMPTS)
    taken = _random_responses(run, config)
    microbatches = form_batch(config, runtime, taken.views, taken.rollouts, 0).microbatches
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
    _leave(folder, {name: _by_kind(counter) for name, counter in counts.items()})


def measure_bubble(
    folder: str,
    configs: Sequence[Config],
    hf: Mapping[str, Any],
    stage_seconds: float,
    repeats: int,
) -> None:
    """Of Teacher.score, the share of the time in which this stage is not in its forward.

    Args:
        configs: differ in their batch.
        stage_seconds: what a forward of a stage takes at least: it sleeps for the rest.
    """
    from aropd_mcore.trainer.batch import form_batch
    from aropd_mcore.trainer.build import start_runtime

    runtime = start_runtime(configs[0])
    run = build_run(configs[0], runtime, hf)
    busy: list[float] = []

    def timed(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = forward(*args, **kwargs)
            torch.cuda.synchronize()  # on a CPU, mcore.cpu_mode makes it nothing
            time.sleep(max(start + stage_seconds - time.perf_counter(), 0.0))
            busy.append(time.perf_counter() - start)
            return output

        return call

    assert run.teacher is not None
    for chunk in run.teacher.model:
        chunk.forward = timed(chunk.forward)
    found = []
    for config in configs:
        taken = _random_responses(run, config)
        microbatches = form_batch(config, runtime, taken.views, taken.rollouts, 0).microbatches
        idle = []
        for _ in range(1 + repeats):
            busy.clear()
            dist.barrier()
            start = time.perf_counter()
            run.teacher.score(microbatches)
            dist.barrier()  # a stage that is done waits for the last one
            idle.append(1 - sum(busy) / (time.perf_counter() - start))
        found.append({"idle": idle[1:], "views": len(busy)})
    _leave(folder, found)


def _leave(folder: str, found: Any) -> None:
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found))


def _counter() -> FlopCounterMode:
    """Of matrix products, in-place sums of them too; and of a CPU's attention, whose kernel skips
    what a causal mask hides, the visible pairs."""
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    products = {aten.addmm_: lambda _sum, left, right, **_: mm_flop(left, right)}
    return FlopCounterMode(display=False, custom_mapping=products | attention)


def _attention(query: Sequence[int], key: Sequence[int], *others: Any, **_: Any) -> int:
    """Scores and values: 2 D FLOPs each a pair of positions and a head."""
    _value, _dropout, is_causal = (*others, 0.0, False)[:3]
    num_sequences, heads, length, head_dim = query
    pairs = length * (length + 1) // 2 if is_causal else length * key[2]
    return 4 * num_sequences * heads * head_dim * pairs


def _attention_backward(
    _grad: Any, query: Sequence[int], key: Sequence[int], value: Any, *others: Any, **_: Any
) -> int:
    """The scores again, and two products for each of the forward's."""
    _out, _logsumexp, dropout, is_causal = others[:4]
    return _attention(query, key, value, dropout, is_causal) * 5 // 2


def _by_kind(counter: FlopCounterMode) -> dict[str, int]:
    found = {"products": 0, "attention": 0}
    for operation, flops in counter.get_flop_counts()["Global"].items():
        kind = "attention" if "attention" in str(operation) else "products"
        found[kind] += flops
    return found


def _random_responses(run: Any, config: Config) -> Any:
    """A step's StepRollouts, whose responses are random and not sampled."""
    from aropd_mcore.rollout.sources import OracleTraces, StepPrompts

    prompts = StepPrompts(config, run.runtime, run.dataset, run.view_builder)
    limit = config.rollout.max_response_tokens
    return OracleTraces(prompts, max_response_tokens=limit).take(0)
