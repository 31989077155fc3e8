"""Where the time and the memory of training steps go, and how they grow; what two views cost.

    python tools/benchmarks/step.py [RUN.yaml] [SECTION.KEY=VALUE ...] [--parts PART ...] [--json F]

A run's YAML gives the sizes: its layout, its batch and its model's config.json, with random
weights, prompts of views.max_prompt_tokens and responses of rollout.max_response_tokens. Without
one a small model runs that two CPU cores are enough for. README.md says what is measured and how.

    steps    AR-OPD, Full OPD of one view and SFT, step by step in turn: seconds and peaks by phase;
             and AR-OPD with 2 and 4 times the response tokens, and the microbatches
    forward  FLOPs that both views' forward and the student's execute, beside the plan's
    bubble   a pipeline's idle share while the teacher scores, beside (pp - 1) / (2 M + pp - 1)
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
"""Whose forward takes a fraction of STAGE_SECONDS."""
CONFIG: dict[str, Any] = {
    "output_dir": "unused",
    "model": {"path": "unused"},
    "data": {"train": ["unused"]},
    "training": {"num_steps": 1, "global_batch_size": 8, "micro_batch_size": 2},
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
PHASES = ("rollout", "teacher", "student", "optimizer", "sync")
PARTS = ("steps", "forward", "bubble")
FACTORS = (1, 2, 4)
MICROBATCHES = (2, 8)
STAGE_SECONDS = 0.1
"""The bubble is measured with these numbers, and with forwards of a stage that take so long."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    found: dict[str, Any] = {}
    if "steps" in args.parts:
        found["steps"] = measure_steps(args)
        print_steps(args.config, found["steps"])
    if "forward" in args.parts:
        found["forward"] = measure_forward(args.config, args.hf)
        print_forward(found["forward"])
    if "bubble" in args.parts:
        found["bubble"] = list(measure_bubbles(args))
        print_bubble(found["bubble"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", help="a run's YAML, and overrides as of aropd train")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--nproc-per-node", type=int, help="ranks of `steps` (default: one a GPU; without GPUs 2)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args(argv)
    paths = [text for text in args.run if "=" not in text]
    if len(paths) > 1:
        parser.error(f"expected one YAML, found {' '.join(paths)}")
    overrides = [text for text in args.run if "=" in text]
    args.ranks = args.nproc_per_node or torch.cuda.device_count() or 2
    try:
        args.config, args.hf = _run_of(paths, overrides)
        for config in rows_of(args.config).values():
            build_setup(config, args.ranks, architecture=read_architecture(args.hf))
    except ValueError as error:
        parser.error(str(error))
    return args


def _run_of(paths: list[str], overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """The configuration and its model's config.json."""
    if paths:
        config = load_config(Path(paths[0]), overrides)
        return config, json.loads((config.model.path / "config.json").read_text())
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(CONFIG, file)
        file.flush()
        return load_config(Path(file.name), overrides), SMALL


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """With other values in sections of it."""
    updated = {
        name: getattr(config, name).model_copy(update=values) for name, values in sections.items()
    }
    return config.model_copy(update=updated)


# --- steps ---------------------------------------------------------------------------------------


def rows_of(config: Config) -> dict[str, Config]:
    """Every run that is measured, by name; the first is what the others are compared with."""
    rows = {name: changed(config, objective=of) for name, of in METHODS.items()}
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
"""Rows of each table; ratios are to its first row."""


def measure_steps(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Name of a row -> seconds and bytes by phase, of the rank that has the most."""
    rows, ranks = rows_of(args.config), args.ranks
    seconds = _job(measure_seconds, ranks, rows, args.hf, args.repeats)
    num_bytes = _job(measure_bytes, ranks, rows, args.hf, exact_memory=True)
    return {
        name: {"seconds": _largest(seconds, name), "bytes": _largest(num_bytes, name)}
        for name in rows
    }


def _largest(ranks: list[dict[str, dict[str, float]]], name: str) -> dict[str, float]:
    return {key: max(rank[name][key] for rank in ranks) for key in ranks[0][name]}


def print_steps(config: Config, found: dict[str, dict[str, dict[str, float]]]) -> None:
    print(
        f"{config.training.global_batch_size} responses of {config.rollout.max_response_tokens} "
        f"tokens, prompts of {config.views.max_prompt_tokens}"
    )
    for title, names in TABLES.items():
        print(f"\n{title}: seconds, and / the first row's")
        print(" " * 22 + "".join(f"{phase:>15}" for phase in (*PHASES, "step")))
        for name in names:
            _print_row(name, found, names[0], "seconds", (*PHASES, "step"), 1.0, ".3f")
        print(f"{title}: peak MB of a rank, and / the first row's")
        columns = ("state", *PHASES[:-1], "peak")
        print(" " * 22 + "".join(f"{phase:>15}" for phase in columns))
        for name in names:
            _print_row(name, found, names[0], "bytes", columns, 1e6, ".0f")
    print(flush=True)


def _print_row(
    name: str,
    found: dict[str, dict[str, dict[str, float]]],
    first: str,
    what: str,
    columns: Sequence[str],
    unit: float,
    spec: str,
) -> None:
    cells, own, other = [], found[name][what], found[first][what]
    for column in columns:
        if column not in own:
            cells.append("")
            continue
        ratio = f" ({own[column] / other[column]:.2f})" if other.get(column) else ""
        cells.append(f"{own[column] / unit:{spec}}{ratio}")
    print(f"{name:22}" + "".join(f"{cell:>15}" for cell in cells))


# --- what two views cost -------------------------------------------------------------------------


def measure_forward(config: Config, hf: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """FLOPs of one sample on one rank, executed and planned, by part and kind."""
    objective = {"name": "aropd", "skip_response_tokens": 0}
    one_sample = {"global_batch_size": 1, "micro_batch_size": 1, "recompute": "none"}
    alone = changed(
        config,
        objective=objective,
        training=one_sample | {"packing": False, "max_tokens_per_microbatch": None},
        rollout={"max_response_tokens": RESPONSE, "rollouts_per_prompt": 1},
        parallel={"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "expert": 1}
        | {"sequence": False},
    )
    (executed,) = _job(count_flops, 1, alone, hf)
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
        # A backward is two forwards; and the loss has products alone.
        "student, planned": {kind: 3 * student[kind] for kind in student}
        | {"products": 3 * student["products"] + loss},
    }


def print_forward(found: dict[str, dict[str, int]]) -> None:
    lengths = "/".join(str(prompt) for prompt in PROMPTS.values())
    print(f"MFLOPs of a sample; prompts {lengths} (student/partial/full), response {RESPONSE}")
    print(f"{'':28}{'products':>12}{'attention':>12}{'together':>12}")
    for name, counts in found.items():
        numbers = (*counts.values(), sum(counts.values()))
        print(f"{name:28}" + "".join(f"{number / 1e6:12.1f}" for number in numbers))
    for how in ("executed", "planned"):
        views, student = (
            sum(found[f"{of}, {how}"].values()) for of in ("teacher", "student forward")
        )
        print(f"both views / the student's forward, {how}: {views / student:.3f}")
    print(flush=True)


def measure_bubbles(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """With stages that take a fixed time, and where there are cores or GPUs enough, as they are."""
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
        idle = [statistics.mean(of_stages) for of_stages in rounds]
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
    print(f"{'':6}{'M':>4}{'a stage':>12}{'measured':>10}{'from - to':>18}{'expected':>10}")
    for row in rows:
        stage = f"{1e3 * row['stage_seconds']:g} ms" if row["stage_seconds"] else "as it is"
        span = f"{row['from']:.3f} - {row['to']:.3f}"
        print(
            f"PP {row['pipeline']:<3}{row['microbatches']:4}{stage:>12}{row['measured']:10.3f}"
            f"{span:>18}{row['expected']:10.3f}"
        )


def _job(
    function: Callable[..., None], ranks: int, *args: Any, exact_memory: bool = False
) -> list[Any]:
    """What every rank leaves, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(function, ranks, folder, *args, exact_memory=exact_memory)
        return [json.loads(Path(folder, f"rank{r}.json").read_text()) for r in range(ranks)]


if __name__ == "__main__":
    sys.exit(main())
