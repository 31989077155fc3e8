"""Peak memory of real training steps on CPU ranks, beside what `aropd plan` says of them.

    python tools/benchmarks/memory.py [--layout NAME ...] [--phases] [--json FILE]

Each layout is a job of its own over gloo, with a random model and responses of full length. What a
rank had resident after its imports and a tiny run is its baseline; its peak is the kernel's figure
(VmHWM) over whole steps, the model's construction not counted.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from aropd_mcore.config import Config
from aropd_mcore.convert.architecture import Architecture, read_architecture
from aropd_mcore.plan.memory import Memory, stage_memory
from aropd_mcore.plan.setup import setup_of
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
MOE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
}
WARM_UP = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512}


@dataclass(frozen=True)
class Layout:
    """A job to measure: its ranks, and what it changes in `CONFIG`."""

    ranks: int
    overrides: dict[str, dict[str, Any]]
    model: str = "dense"


LAYOUTS = {
    "one rank": Layout(1, {}),
    "DP 2": Layout(2, {}),
    "TP 2": Layout(2, {"parallel": {"tensor": 2}}),
    "TP 2 + SP": Layout(2, {"parallel": {"tensor": 2, "sequence": True}}),
    "PP 2": Layout(2, {"parallel": {"pipeline": 2}}),
    "CP 2": Layout(2, {"parallel": {"context": 2}}),
    "PP 2, recompute full": Layout(
        2, {"parallel": {"pipeline": 2}, "training": {"recompute": "full"}}
    ),
    "DP 2, recompute selective": Layout(2, {"training": {"recompute": "selective"}}),
    "TP 2 x DP 2": Layout(4, {"parallel": {"tensor": 2}}),
    "DP 2, frozen teacher": Layout(2, {"teacher": {"kind": "frozen"}}),
    "DP 2, live teacher": Layout(2, {"teacher": {"kind": "live"}}),
    "DP 2, experts": Layout(2, {}, "moe"),
    "TP 2 + SP, experts": Layout(2, {"parallel": {"tensor": 2, "sequence": True}}, "moe"),
    "EP 2": Layout(2, {"parallel": {"expert": 2}}, "moe"),
    "PP 2 x VPP 2": Layout(2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
}
CONFIG: dict[str, Any] = {
    "output_dir": "unused",
    "model": {"path": "unused", "dtype": "fp32"},
    "data": {"train": ["unused"]},
    "training": {"num_steps": 8, "global_batch_size": 8, "micro_batch_size": 2},
    "views": {"max_prompt_tokens": 448},
    "rollout": {"max_response_tokens": 64, "batch_size": 8},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Peak memory beside the plan's.")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--phases", action="store_true", help="each phase as well as the peak")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args(argv)
    print(f"{'layout':28}{'stage':>6}{'phase':>10}{'measured':>11}{'planned':>10}{'ratio':>8}")
    rows = []
    for name in args.layout:
        for row in measure(name, phases=args.phases):
            rows.append(row)
            print(
                f"{name:28}{row['stage']:6}{row['phase']:>10}{row['measured'] / 1e6:8.1f} MB"
                f"{row['planned'] / 1e6:7.1f} MB{row['planned'] / row['measured']:8.3f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


def measure(name: str, *, phases: bool = False, responses: int = 8) -> list[dict[str, Any]]:
    """Measured and planned bytes of a layout, a row a pipeline stage: the rank with the most.

    Args:
        phases: a row a phase as well.
        responses: of a step; fewer take less time.
    """
    layout = LAYOUTS[name]
    config = _config(layout, responses)
    setup = setup_of(config, layout.ranks, device="cpu", architecture=_architecture(layout.model))
    # Read by the C library at a process's start: freed blocks go back to the system at once.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, (name, folder, responses), nprocs=layout.ranks, start_method="spawn")
        found = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("rank*.json"))]
    rows = []
    for stage in range(setup.pipeline):
        planned = stage_memory(setup, stage)
        ranks = [rank for rank in found if rank["stage"] == stage]
        measured = {
            phase: max(rank["bytes"][phase] for rank in ranks) for phase in ranks[0]["bytes"]
        }
        for phase, size in measured.items():
            if phase == "peak" or phases:
                rows.append(
                    {
                        "layout": name,
                        "stage": stage,
                        "phase": phase,
                        "measured": size,
                        "planned": round(_planned(planned, phase)),
                    }
                )
    return rows


def _planned(memory: Memory, phase: str) -> float:
    if phase == "state":
        return sum(memory.state.values())
    return memory.peak if phase == "peak" else memory.at(phase)


def _config(layout: Layout, responses: int) -> Config:
    tree = {**CONFIG, "training": {**CONFIG["training"], "global_batch_size": responses}}
    for section, values in layout.overrides.items():
        tree[section] = {**tree.get(section, {}), **values}
    return Config.model_validate(tree)


def _hf(model: str) -> dict[str, Any]:
    return {"dense": DENSE, "moe": MOE}[model]


def _architecture(model: str) -> Architecture:
    return read_architecture(_hf(model))


# --- on the ranks --------------------------------------------------------------------------------


def _rank(rank: int, name: str, folder: str, responses: int) -> None:
    layout = LAYOUTS[name]
    config = _config(layout, responses)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=layout.ranks,
        timeout=timedelta(minutes=5),
    )
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.step import train_step

    runtime = start_runtime(config)
    small = _hf(layout.model) | WARM_UP
    warm_up = _build(config, runtime, small)
    train_step(warm_up, 0)
    del warm_up
    baseline = _settle()

    run = _build(config, runtime, _hf(layout.model))
    train_step(run, 0)  # buffers that stay are there from now on
    found = {"state": _settle() - baseline}
    phases = _Phases(run)
    train_step(run, 1)
    found |= {name: peak - baseline for name, peak in phases.finish().items()}
    found["peak"] = max(found.values())
    result = {"stage": runtime.pp_rank, "bytes": found}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # megatron's groups end with the process


class _Phases:
    """The peak of each phase of a step, by the calls that begin them."""

    def __init__(self, run: Any):
        self.peaks: dict[str, int] = {}
        self._phase = ""
        run.student.optimizer.step = self._begins("optimizer", run.student.optimizer.step)
        run.student.forward_backward = self._begins("student", run.student.forward_backward)
        if run.teacher:
            run.teacher.score = self._begins("teacher", run.teacher.score)
            run.engine.generate = self._begins("rollout", run.engine.generate)

    def _begins(self, phase: str, call: Any) -> Any:
        def measured(*args: Any, **kwargs: Any) -> Any:
            self.finish()
            self._phase = phase
            _reset_peak()
            return call(*args, **kwargs)

        return measured

    def finish(self) -> dict[str, int]:
        if self._phase:
            self.peaks[self._phase] = _memory("VmHWM")
        return self.peaks


def _build(config: Config, runtime: Any, hf: dict[str, Any]) -> Any:
    """As trainer.build.build_run, with a random model and prompts of full length; no files."""
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.optim import Optimizer
    from aropd_mcore.mcore.student import Student
    from aropd_mcore.mcore.teacher import Teacher
    from aropd_mcore.rollout.native import NativeEngine
    from aropd_mcore.trainer.step import Run

    def random_model() -> Any:
        model = build_model(hf, runtime, dtype=torch.float32, recompute=config.training.recompute)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        return model

    model = random_model()
    teacher_model = None if config.teacher.kind == "live" else random_model()
    optimizer = Optimizer(model, config.optimizer, num_steps=8)
    batch_size = config.rollout.batch_size
    tokens = random.Random(0)

    def prompt() -> tuple[int, ...]:
        return tuple(tokens.randrange(512) for _ in range(config.views.max_prompt_tokens))

    def views(row: Row) -> Views:
        return Views(row, prompt(), prompt(), prompt())

    return Run(
        config=config,
        runtime=runtime,
        num_steps=8,
        dataset=SimpleNamespace(row_at=lambda *_, **__: Row("", "", "")),  # type: ignore[arg-type]
        view_builder=SimpleNamespace(build=views),  # type: ignore[arg-type]
        student=Student(model, optimizer, config.objective, runtime),
        teacher=Teacher(config.teacher, runtime, student=model, model=teacher_model),
        engine=NativeEngine(model, runtime, eos_token_ids=(), batch_size=batch_size),
        pad_token_id=0,
    )


def _settle() -> int:
    """Resident bytes with nothing freed kept back; the peak starts from there."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _reset_peak()
    return _memory("VmRSS")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status[name].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
