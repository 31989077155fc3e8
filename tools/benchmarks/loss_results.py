"""Rates, floors, ratios and bars from the measurements of `loss.py`.

A bar is a required value on a CPU, and a goal on a GPU.
"""

import statistics
from typing import Any

from loss_measure import COPY_BYTES
from loss_methods import DENSE, DTYPES, METRICS, OURS, Point

CPU_BARS = Point(1024, 512, 32768, 1, "fp32", "kl_target_student", "cpu")
CUDA_BARS = Point(8192, 4096, 128256, 1, "bf16", "kl_target_student", "cuda")

Result = dict[str, Any]


def are_bars_for(point: Point) -> bool:
    return point in (CPU_BARS, CUDA_BARS)


def machine_rates(point: Point, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Compute the machine's rates, and from them the floor of each form.

    The floor from logits is ten passes over [T, V] at the speed of a copy, which reads and writes.
    The floor from hidden states is the time of the five products.
    """
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    copied_per_second = 2 * COPY_BYTES[point.device] / medians.pop("copy")
    flops = 10 * point.tokens * point.hidden * point.vocab
    passes = 10 * point.tokens * point.vocab * DTYPES[point.dtype].itemsize
    return {
        "rates": {
            "copy_bytes_per_second": copied_per_second,
            **{f"{name}_flops_per_second": flops / median for name, median in medians.items()},
        },
        "floors": {
            "logits": passes / copied_per_second,
            "hidden": min(medians.values()),
        },
    }


def add_ratios(result: Result, single: Result) -> None:
    """Add ratios to the rows of `result`: to the dense formula, and to the floors in `single`."""
    for row in result["rows"]:
        if row["missing"]:
            continue
        row["median"] = statistics.median(row["seconds"])
        dense = find_row(single, row["form"], DENSE)
        if not dense["missing"]:
            row["time_to_dense"] = row["median"] / dense["median"]
            row["memory_to_dense"] = row["peak_bytes"] / dense["peak_bytes"]
        row["time_to_floor"] = row["median"] / single["floors"][row["form"]]


def find_row(result: Result, form: str, method: str) -> dict[str, Any]:
    [row] = [row for row in result["rows"] if (row["form"], row["method"]) == (form, method)]
    return row


def verdicts(point: Point, result: Result) -> list[dict[str, Any]]:
    """Return the bars of the point's device with their verdicts."""
    return _cpu_bars(point, result) if point.device == "cpu" else cuda_goals(result)


def _cpu_bars(point: Point, result: Result) -> list[dict[str, Any]]:
    fused, logits = (find_row(result, form, OURS) for form in ("hidden", "logits"))
    longer = result["longer"]
    hidden_gradient = 4 * point.hidden
    beyond, beyond_longer = (
        run["peak_bytes"] - hidden_gradient * tokens
        for run, tokens in ((fused, point.tokens), (longer, longer["tokens"]))
    )
    return [
        _bar("fused: time / dense", fused["time_to_dense"], 0.60),
        _bar("fused: memory / dense", fused["memory_to_dense"], 0.20),
        _bar(
            f"fused: memory at T = {longer['tokens']} / {point.tokens}, without hidden gradients",
            beyond_longer / beyond,
            1.0,
        ),
        _bar("logits: time / dense", logits["time_to_dense"], 0.40),
        _bar("logits: memory / dense", logits["memory_to_dense"], 0.25),
        _bar("fused: metrics (no top-k) / none, time", _metrics_ratio(result, "hidden"), 1.10),
        _bar("logits: metrics (no top-k) / none, time", _metrics_ratio(result, "logits"), None),
    ]


def cuda_goals(result: Result) -> list[dict[str, Any]]:
    """Return the goals on a GPU with their verdicts. On a CPU the values show nothing."""
    fused, logits = (find_row(result, form, OURS) for form in ("hidden", "logits"))
    bars = [
        _bar("logits: share of a copy's bandwidth", 1 / logits["time_to_floor"], 0.75, least=True),
        _bar("fused: time / five products", fused["time_to_floor"], 1.20),
        _bar("fused: peak extra GB", fused["peak_bytes"] / 1e9, 2.5),
        _bar("fused: metrics (no top-k) / none, time", _metrics_ratio(result, "hidden"), 1.10),
        _bar("logits: metrics (no top-k) / none, time", _metrics_ratio(result, "logits"), None),
    ]
    one_teacher = [row for row in result["rows"] if row["kind"] == "one teacher"]
    ligers = [row for row in one_teacher if not row["missing"]]
    for quantity, key in (("time", "median"), ("memory", "peak_bytes")):
        best = min((row[key] for row in ligers), default=None)
        whole = None if best is None else fused[key] / best
        per_stream = None if best is None else fused[key] / 2 / best
        bars.append(_bar(f"fused: {quantity} per teacher stream / Liger's", per_stream, 1.0))
        bars.append(_bar(f"fused: {quantity} / Liger's", whole, None))
    return bars


def _metrics_ratio(result: Result, form: str) -> float:
    return find_row(result, form, METRICS)["median"] / find_row(result, form, OURS)["median"]


def _bar(
    name: str, value: float | None, limit: float | None, *, least: bool = False
) -> dict[str, Any]:
    """Return a bar; `passed` is None without a limit or a value."""
    passed = None
    if value is not None and limit is not None:
        passed = value >= limit if least else value <= limit
    return {"name": name, "value": value, "limit": limit, "least": least, "passed": passed}
