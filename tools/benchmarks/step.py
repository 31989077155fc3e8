"""Measure time and memory of training steps by phase, and the cost of two views.

    python tools/benchmarks/step.py [RUN.yaml] [SECTION.KEY=VALUE ...] [--parts PART ...] [--json F]

A run's YAML gives the sizes: layout, batch, the model's config.json, prompts of
views.max_prompt_tokens and responses of rollout.max_response_tokens. Weights are random. Without a
YAML, a small model runs that fits two CPU cores. docs/benchmarks.md describes the measurements.

    steps    seconds and peak memory by phase: AR-OPD, Full OPD of one view and SFT; and AR-OPD with
             2 and 4 times the response tokens or the microbatches
    forward  executed FLOPs of both views' forward and of the student's, against the plan's
    bubble   idle share of a pipeline while the teacher scores, against (pp - 1) / (2 M + pp - 1)
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from random_runs import DENSE, WARM_UP, on_ranks
from step_measure import (
    PROMPTS,
    RESPONSE,
    count_flops,
    measure_bubble,
    measure_bytes,
    measure_seconds,
)

from aropd_mcore.config import Config
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.cost import bubble_fraction, forward_flops, loss_flops
from aropd_mcore.plan.setup import Setup, build_setup

SMALL: dict[str, Any] = DENSE | {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 4096,
}
SMALL_STAGES = SMALL | WARM_UP
"""Model whose forward takes a fraction of STAGE_SECONDS."""
CONFIG: dict[str, Any] = {
    "output_dir": "unused",
    "model": {"path": "unused"},
    "data": {"train": ["unused"]},
    "training": {"num_steps": 1, "global_batch_size": 8, "micro_batch_size": 2, "packing": False},
    "views": {"max_prompt_tokens": 128},
    "rollout": {"max_response_tokens": 32, "batch_size": 8},
}
METHODS: dict[str, dict[str, Any]] = {
    "AR-OPD": {"name": "aropd"},
    "AR-OPD, no metrics": {"name": "aropd", "metrics": False},
    "Full OPD, one view": {
        "name": "aropd",
        "residual_scale": 1.0,
        "residual_clip": None,
        "metrics": False,
    },
    "SFT": {"name": "sft"},
}
PHASES = ("rollout", "batch", "teacher", "student", "optimizer", "sync")
PARTS = ("steps", "forward", "bubble")
FACTORS = (1, 2, 4)
MICROBATCHES = (2, 8)
STAGE_SECONDS = 0.1
"""Seconds to which a stage's forward is extended for the bubble."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    figures: dict[str, Any] = {}
    if "steps" in args.parts:
        figures["steps"] = measure_steps(args)
        print_steps(args.config, figures["steps"])
    if "forward" in args.parts:
        figures["forward"] = measure_forward(args.config, args.hf)
        print_forward(figures["forward"])
    if "bubble" in args.parts:
        figures["bubble"] = list(measure_bubbles(args))
        print_bubble(figures["bubble"])
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", help="YAML of a run, and overrides as in aropd train")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="parts to measure (default: all)",
    )
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        help="number of ranks of `steps` (default: one per GPU; 2 without GPUs)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="number of measured steps (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures (default: none)")
    args = parser.parse_args(argv)
    paths = [text for text in args.run if "=" not in text]
    if len(paths) > 1:
        parser.error(f"found {' '.join(paths)}: expected one YAML file")
    overrides = [text for text in args.run if "=" in text]
    args.ranks = args.nproc_per_node or torch.cuda.device_count() or 2
    try:
        args.config, args.hf = _load_run(paths, overrides)
        for config in build_rows(args.config).values():
            build_setup(config, args.ranks, architecture=read_architecture(args.hf))
    except ValueError as error:
        parser.error(str(error))
    return args


def _load_run(paths: list[str], overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """Load the configuration and its model's config.json."""
    if paths:
        config = load_config(Path(paths[0]), overrides)
        return config, json.loads((config.model.path / "config.json").read_text())
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(CONFIG, file)
        file.flush()
        return load_config(Path(file.name), overrides), SMALL


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """Return the configuration with other values in some sections."""
    updated = {
        name: getattr(config, name).model_copy(update=values) for name, values in sections.items()
    }
    return config.model_copy(update=updated)


# --- steps ---------------------------------------------------------------------------------------


def build_rows(config: Config) -> dict[str, Config]:
    """Return all measured runs by name. The others are compared with the first."""
    rows = {name: changed(config, objective=objective) for name, objective in METHODS.items()}
    base = next(iter(rows.values()))
    for factor in FACTORS[1:]:
        response = {"max_response_tokens": factor * config.rollout.max_response_tokens}
        batch = {"global_batch_size": factor * config.training.global_batch_size}
        rows[f"{factor} x response tokens"] = changed(base, rollout=response)
        rows[f"{factor} x microbatches"] = changed(base, training=batch)
    return rows


TABLES = {
    "methods": list(METHODS),
    "response tokens": ["AR-OPD", *(f"{factor} x response tokens" for factor in FACTORS[1:])],
    "microbatches": ["AR-OPD", *(f"{factor} x microbatches" for factor in FACTORS[1:])],
    "views 2, 1 and 0, no metrics": ["AR-OPD, no metrics", "Full OPD, one view", "SFT"],
}
"""Rows of each table, with ratios to its first row."""


def measure_steps(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Measure seconds and bytes by row and phase, of the rank with the largest value."""
    rows, ranks = build_rows(args.config), args.ranks
    seconds = _job(measure_seconds, ranks, rows, args.hf, args.repeats)
    num_bytes = _job(measure_bytes, ranks, rows, args.hf, exact_memory=True)
    return {
        name: {"seconds": _largest(seconds, name), "bytes": _largest(num_bytes, name)}
        for name in rows
    }


def _largest(ranks: list[dict[str, dict[str, float]]], name: str) -> dict[str, float]:
    return {key: max(rank[name][key] for rank in ranks) for key in ranks[0][name]}


def print_steps(config: Config, figures: dict[str, dict[str, dict[str, float]]]) -> None:
    print(
        f"{config.training.global_batch_size} responses of {config.rollout.max_response_tokens} "
        f"tokens, prompts of {config.views.max_prompt_tokens}"
    )
    for title, names in TABLES.items():
        print(f"\n{title}: seconds, and ratio to the first row")
        print(" " * 22 + "".join(f"{phase:>15}" for phase in (*PHASES, "step")))
        for name in names:
            _print_row(name, figures, names[0], "seconds", (*PHASES, "step"), 1.0, ".3f")
        print(f"{title}: peak MB per rank, and ratio to the first row")
        columns = ("state", *(p for p in PHASES if p not in ("batch", "sync")), "peak")
        print(" " * 22 + "".join(f"{phase:>15}" for phase in columns))
        for name in names:
            _print_row(name, figures, names[0], "bytes", columns, 1e6, ".0f")
    print(flush=True)


def _print_row(
    name: str,
    figures: dict[str, dict[str, dict[str, float]]],
    first: str,
    quantity: str,
    columns: Sequence[str],
    unit: float,
    spec: str,
) -> None:
    cells, own, other = [], figures[name][quantity], figures[first][quantity]
    for column in columns:
        if column not in own:
            cells.append("")
            continue
        ratio = f" ({own[column] / other[column]:.2f})" if other.get(column) else ""
        cells.append(f"{own[column] / unit:{spec}}{ratio}")
    print(f"{name:22}" + "".join(f"{cell:>15}" for cell in cells))


# --- cost of two views ---------------------------------------------------------------------------


def measure_forward(config: Config, hf: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Count FLOPs of one sample on one rank, executed and planned, by part and kind."""
    objective = {"name": "aropd", "skip_response_tokens": 0}
    one_sample = {"global_batch_size": 1, "micro_batch_size": 1, "recompute": "none"}
    single = changed(
        config,
        objective=objective,
        training=one_sample | {"packing": False, "max_tokens_per_microbatch": None},
        rollout={"max_response_tokens": RESPONSE, "rollouts_per_prompt": 1},
        parallel={"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "expert": 1}
        | {"sequence": False},
    )
    (executed,) = _job(count_flops, 1, single, hf)
    architecture = read_architecture(hf)
    planned: dict[str, dict[str, int]] = {}
    for view, prompt in PROMPTS.items():
        products, attention = forward_flops(architecture, prompt + RESPONSE)
        planned[view] = {"products": products, "attention": attention}
    loss = loss_flops(Setup(architecture, response_tokens=RESPONSE))
    student = planned["student"]
    return {
        "teacher, executed": executed["teacher"],
        "teacher, planned": {
            kind: planned["partial"][kind] + planned["full"][kind] for kind in student
        },
        "student forward, executed": executed["student forward"],
        "student forward, planned": student,
        "student, executed": executed["student"],
        # A backward is two forwards. The loss consists of matrix products only.
        "student, planned": {kind: 3 * student[kind] for kind in student}
        | {"products": 3 * student["products"] + loss},
    }


def print_forward(figures: dict[str, dict[str, int]]) -> None:
    lengths = "/".join(str(prompt) for prompt in PROMPTS.values())
    print(f"MFLOPs per sample; prompts {lengths} (student/partial/full), response {RESPONSE}")
    print(f"{'':28}{'products':>12}{'attention':>12}{'total':>12}")
    for name, counts in figures.items():
        numbers = (*counts.values(), sum(counts.values()))
        print(f"{name:28}" + "".join(f"{number / 1e6:12.1f}" for number in numbers))
    for how in ("executed", "planned"):
        views, student = (
            sum(figures[f"{part}, {how}"].values()) for part in ("teacher", "student forward")
        )
        print(f"forward of both views / of the student, {how}: {views / student:.3f}")
    print(flush=True)


def measure_bubbles(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure with forwards of fixed duration, and unchanged if there are enough cores or GPUs."""
    places = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    for pipeline in (2, 4):
        for stage_seconds in (STAGE_SECONDS, 0.0):
            # Ranks that sleep can share a core, but not a GPU.
            if pipeline <= places or (stage_seconds and not torch.cuda.is_available()):
                yield from _bubbles(args, pipeline, stage_seconds)


def _bubbles(
    args: argparse.Namespace, pipeline: int, stage_seconds: float
) -> Iterator[dict[str, Any]]:
    configs = [_pipelined(args.config, pipeline, number) for number in MICROBATCHES]
    hf = SMALL_STAGES if stage_seconds else args.hf
    ranks = _job(measure_bubble, pipeline, configs, hf, stage_seconds, args.repeats)
    for number, stages in zip(MICROBATCHES, zip(*ranks, strict=True), strict=True):
        rounds = zip(*(stage["idle"] for stage in stages), strict=True)
        idle = [statistics.mean(shares) for shares in rounds]
        yield {
            "pipeline": pipeline,
            "microbatches": number,
            "views": stages[0]["views"],
            "stage_seconds": stage_seconds,
            "measured": statistics.median(idle),
            "from": min(idle),
            "to": max(idle),
            "expected": bubble_fraction(pipeline, 1, 2 * number),
        }


def _pipelined(config: Config, pipeline: int, num_microbatches: int) -> Config:
    one_each = {"global_batch_size": num_microbatches, "micro_batch_size": 1, "packing": False}
    return changed(
        config,
        objective={"name": "aropd"},
        training=one_each | {"max_tokens_per_microbatch": None},
        rollout={"rollouts_per_prompt": 1},
        parallel={"tensor": 1, "pipeline": pipeline, "virtual_pipeline": 1, "context": 1}
        | {"expert": 1, "sequence": False},
    )


def print_bubble(rows: list[dict[str, Any]]) -> None:
    print("idle share of the stages while the teacher scores 2 M microbatches")
    print(f"{'':6}{'M':>4}{'stage':>12}{'measured':>10}{'from - to':>18}{'expected':>10}")
    for row in rows:
        stage = f"{1e3 * row['stage_seconds']:g} ms" if row["stage_seconds"] else "no sleep"
        span = f"{row['from']:.3f} - {row['to']:.3f}"
        print(
            f"PP {row['pipeline']:<3}{row['microbatches']:4}{stage:>12}{row['measured']:10.3f}"
            f"{span:>18}{row['expected']:10.3f}"
        )


def _job(
    function: Callable[..., None], ranks: int, *args: Any, exact_memory: bool = False
) -> list[Any]:
    """Run `function` on the ranks of a new job, and return their results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(function, ranks, folder, *args, exact_memory=exact_memory)
        return [json.loads(Path(folder, f"rank{r}.json").read_text()) for r in range(ranks)]


if __name__ == "__main__":
    sys.exit(main())
