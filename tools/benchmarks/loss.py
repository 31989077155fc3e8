"""Measure time, memory and traffic of the AR-OPD loss and its backward, against other methods.

    python tools/benchmarks/loss.py --out DIR [--tokens 1024 4096] [--tp 2] [--divergence jsd]
    python tools/benchmarks/loss.py --out DIR --neighbours 1    # beside a process that computes

All methods take turns within each repetition. A copy, and the matrix products without the loss, run
in the same turns to measure the machine's speed. docs/benchmarks.md describes the measurements. The
results are in DIR/loss.json and DIR/loss.png.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from loss_measure import TOLERANCE, Job, measure_memory, measure_times, run_on_ranks
from loss_methods import (
    DTYPES,
    FORMS,
    OURS,
    RESIDUAL_CLIP,
    RESIDUAL_SCALE,
    Form,
    Point,
    build_methods,
)
from loss_report import draw, print_bars, print_point
from loss_results import add_ratios, are_bars_for, machine_rates, verdicts

from aropd_mcore import lifetime
from aropd_mcore.config import Divergence

DEFAULTS = {
    "cpu": {"tokens": [1024], "hidden": [512], "vocab": [32768], "dtype": "fp32"},
    "cuda": {"tokens": [8192], "hidden": [4096], "vocab": [128256], "dtype": "bf16"},
}
LONGER = 4
"""Factor of the bars' tokens with which the fused form must need no more memory."""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    points, bars = [], []
    for sizes in itertools.product(args.tokens, args.hidden, args.vocab):
        point = Point(*sizes, 1, args.dtype, args.divergence, args.device)
        results = measure(point, args.tp, args.repeats, args.threads, args.neighbours)
        for result in results:
            print_point(result)
        points += results
        if are_bars_for(point) and not args.neighbours:
            bars += verdicts(point, results[0])
    print_bars(bars)
    figures = {
        "machine": describe_machine(args.device, args.threads),
        "settings": {
            "residual_scale": RESIDUAL_SCALE,
            "residual_clip": RESIDUAL_CLIP,
            "repeats": args.repeats,
            "neighbours": args.neighbours,
            "tolerance": TOLERANCE[args.dtype],
        },
        "points": points,
        "bars": bars,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "loss.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(points, args.out / "loss.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    for name, letter in (("tokens", "T"), ("hidden", "H"), ("vocab", "V")):
        defaults = ", ".join(f"{kind} {sizes[name][0]}" for kind, sizes in DEFAULTS.items())
        parser.add_argument(
            f"--{name}",
            type=int,
            nargs="+",
            metavar=letter,
            help=f"one or more sizes (default: {defaults})",
        )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype (default: cpu fp32, cuda bf16)")
    parser.add_argument(
        "--divergence",
        choices=get_args(Divergence),
        default="kl_target_student",
        help="divergence of the loss (default: %(default)s)",
    )
    parser.add_argument(
        "--tp",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="further tensor-parallel sizes, on CPU processes that share the cores (default: none)",
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="number of repetitions (default: %(default)s)"
    )
    parser.add_argument(
        "--neighbours",
        type=int,
        default=0,
        metavar="N",
        help="number of other processes that compute while times are measured (default: 0)",
    )
    parser.add_argument(
        "--device", choices=list(DEFAULTS), help="device (default: cuda if available, else cpu)"
    )
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, default in DEFAULTS[args.device].items():
        setattr(args, name, getattr(args, name) or default)
    args.tp = [tp for tp in args.tp if tp != 1]
    if args.tp and args.device == "cuda":
        parser.error("--tp with --device cuda: expected CPU processes; add --device cpu")
    for tp, vocab in itertools.product(args.tp, args.vocab):
        if tp < 1 or vocab % tp:
            parser.error(f"--tp {tp} with --vocab {vocab}: expected a divisor of the vocabulary")
    args.threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
    return args


def measure(
    point: Point, tps: list[int], repeats: int, threads: int, neighbours: int
) -> list[dict[str, Any]]:
    """Measure all methods at `point`, and this package's methods at each tensor-parallel size."""
    every: list[tuple[Form, str]] = []
    ours: list[tuple[Form, str]] = []
    for form in FORMS:
        for method in build_methods(form, point.device):
            every.append((form, method.name))
            if method.kind == "ours":
                ours.append((form, method.name))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(point, every, threads, repeats, folder, neighbours, save_gradients=bool(tps))
        results = [_measure(job)]
        results[0] |= machine_rates(point, results[0].pop("machine"))
        if are_bars_for(point) and point.device == "cpu":
            longer = replace(point, tokens=LONGER * point.tokens)
            results[0]["longer"] = asdict(longer) | _memory(
                replace(job, point=longer), "hidden", OURS
            )
        for tp in tps:
            shares = {"threads": max(threads // tp, 1), "save_gradients": False}
            results.append(
                _measure(replace(job, point=replace(point, tp=tp), methods=ours, **shares))
            )
    for result in results:
        add_ratios(result, results[0])
    return results


def _measure(job: Job) -> dict[str, Any]:
    result: dict[str, Any] = asdict(job.point) | {"threads": job.threads}
    with busy_neighbours(job.neighbours):
        result |= run_on_ranks(measure_times, job) | {"load": os.getloadavg()[0]}
    for row in result["rows"]:
        if job.point.device == "cpu":
            row |= _memory(job, row["form"], row["method"])
    return result


@contextmanager
def busy_neighbours(number: int) -> Iterator[None]:
    """Context in which `number` other processes of one thread compute all the time."""
    command = [sys.executable, "-c", "while True: pass"]
    neighbours = [lifetime.start(command) for _ in range(number)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def _memory(job: Job, form: Form, method: str) -> dict[str, int]:
    return run_on_ranks(measure_memory, replace(job, methods=[(form, method)]))


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        name = fields.get("model name\t", "unknown").strip()
    return {"device": device, "name": name, "threads": threads, "torch": torch.__version__}


if __name__ == "__main__":
    main()
