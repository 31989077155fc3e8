"""Compare the peak memory of real training steps with the estimates of `aropd plan`.

    python tools/benchmarks/memory.py [--layout NAME ...] [--phases] [--json FILE]

Each layout is a separate job, with a random model and responses of full length. A rank's baseline
is its memory after its imports and a tiny run. On CPU ranks, over gloo, its peak is the kernel's
figure (VmHWM) over whole steps, without the construction of the model. On GPUs it is torch's
allocated memory, for a larger model in bf16. Phase `context` is then the GPU's memory outside of
torch's, if no other process uses the GPU, against the plan's fixed overhead, which the other phases
leave out.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_runs import DENSE, WARM_UP, build_run, measure_step_peaks, on_ranks

from aropd_mcore.config import Config
from aropd_mcore.convert.architecture import Architecture, read_architecture
from aropd_mcore.plan.memory import Memory, stage_memory
from aropd_mcore.plan.setup import build_setup

ON_GPU = torch.cuda.is_available()
if ON_GPU:  # Qwen2.5-1.5B's shape
    DENSE = DENSE | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
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


@dataclass(frozen=True)
class Layout:
    """A job to measure: its number of ranks, and its changes to `CONFIG`."""

    ranks: int
    overrides: dict[str, dict[str, Any]]
    model: str = "dense"


TEACHER_MODEL: dict[str, Any] = {"kind": "model", "path": "unused"}
"""A teacher of the student's architecture."""
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
    "TP 2 x DP 2, teacher model": Layout(4, {"parallel": {"tensor": 2}, "teacher": TEACHER_MODEL}),
    "TP 2 x DP 2, teacher TP 2 x PP 2": Layout(
        4,
        {
            "parallel": {"tensor": 2},
            "teacher": TEACHER_MODEL | {"parallel": {"tensor": 2, "pipeline": 2}},
        },
    ),
    "DP 2, experts": Layout(2, {}, "moe"),
    "TP 2 + SP, experts": Layout(2, {"parallel": {"tensor": 2, "sequence": True}}, "moe"),
    "EP 2": Layout(2, {"parallel": {"expert": 2}}, "moe"),
    "DP 2, one view": Layout(2, {"objective": {"residual_scale": 0.0, "metrics": False}}),
    "PP 2 x VPP 2": Layout(2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
}
ON_ONE_GPU = {
    "one rank": Layout(1, {}),
    "recompute full": Layout(1, {"training": {"recompute": "full"}}),
    "fp8, tensorwise": Layout(1, {"precision": {"fp8": "hybrid", "fp8_recipe": "tensorwise"}}),
    "fp8, blockwise": Layout(1, {"precision": {"fp8": "hybrid", "fp8_recipe": "blockwise"}}),
    "teacher on the host": Layout(1, {"teacher": {"weights": "host", "hidden_states": "host"}}),
}
if ON_GPU:
    num_gpus = torch.cuda.device_count()
    LAYOUTS = ON_ONE_GPU | {k: v for k, v in LAYOUTS.items() if 1 < v.ranks <= num_gpus}
CONFIG: dict[str, Any] = {
    "output_dir": "unused",
    "model": {"path": "unused", "dtype": "fp32"},
    "data": {"train": ["unused"]},
    "training": {"num_steps": 8, "global_batch_size": 8, "micro_batch_size": 2, "packing": False},
    "views": {"max_prompt_tokens": 448},
    "rollout": {"max_response_tokens": 64, "batch_size": 8},
}
if ON_GPU:
    CONFIG["model"]["dtype"] = "bf16"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare measured and planned peak memory.")
    parser.add_argument(
        "--layout",
        nargs="+",
        choices=LAYOUTS,
        default=list(LAYOUTS),
        help="layouts to measure (default: all)",
    )
    parser.add_argument("--phases", action="store_true", help="also report each phase")
    parser.add_argument("--json", type=Path, help="file for the figures (default: none)")
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
    """Measure and plan the bytes of a layout.

    Args:
        phases: whether to also return each phase.
        responses: number of responses per step; fewer take less time.
    Returns:
        One row per pipeline stage, of the rank with the most memory.
    """
    layout = LAYOUTS[name]
    config = _config(layout, responses)
    device = "gpu" if ON_GPU else "cpu"
    architecture = _architecture(layout.model)
    setup = build_setup(
        config,
        layout.ranks,
        device=device,
        architecture=architecture,
        teachers=dict.fromkeys(config.teacher_models, architecture),
    )
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(_rank, layout.ranks, folder, name, responses, exact_memory=True)
        results = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("rank*.json"))]
    rows = []
    for stage in range(setup.pipeline):
        planned = stage_memory(setup, stage)
        ranks = [rank for rank in results if rank["stage"] == stage]
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
                        "planned": round(_planned(planned, phase, measured)),
                    }
                )
    return rows


def _planned(memory: Memory, phase: str, phases: Iterable[str]) -> float:
    """Return the planned bytes of `state`, of one phase, or of the peak over `phases`."""
    if phase == "peak":
        return max(_planned(memory, each, ()) for each in phases if each not in ("peak", "context"))
    if phase == "context":
        return memory.state["fixed overhead"]
    whole = sum(memory.state.values()) if phase == "state" else memory.at(phase)
    return whole - memory.state.get("fixed overhead", 0.0)


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


def _rank(folder: str, name: str, responses: int) -> None:
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.step import train_step

    layout = LAYOUTS[name]
    config = _config(layout, responses)
    runtime = start_runtime(config)
    # A first step, since its leftovers in the process do not belong to the run.
    train_step(build_run(config, runtime, _hf(layout.model) | WARM_UP), 0)
    peaks = measure_step_peaks(config, runtime, _hf(layout.model))
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        peaks["context"] = total - free - torch.cuda.memory_reserved()
    result = {"stage": runtime.pp_rank, "bytes": peaks}
    Path(folder, f"rank{runtime.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
