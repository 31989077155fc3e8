"""Plots as PNG files, and tables for a terminal. `aropd report` writes an interactive page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from aropd_mcore.numerics.position_metrics import BY_POSITION, METRICS
from aropd_mcore.numerics.token_diagnostics import SUPPORT_GAPS

PANELS = {
    **{
        name: METRICS[name].title
        for name in ("loss", "kl_full_student", "residual_uptake", "hindsight_token_rate")
    },
    "response_length_mean": "mean response length",
    "grad_norm": "gradient norm",
}
"""Metric -> title of its plot in `plot_curves`."""
_KLS = tuple(name for name in BY_POSITION if name.startswith("kl_"))
_SUPPORT_GAPS = tuple(SUPPORT_GAPS)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, one per step.

    Raises:
        ValueError: the file is missing, or a line is not JSON. The message names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file. A run writes this file to its output_dir")
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
    return lines


def plot_curves(runs: Mapping[str, Path], out: Path, *, panels: Mapping[str, str] = PANELS) -> None:
    """Draw metrics over steps to a PNG file, with the values and the running mean of each run.

    Args:
        runs: label -> path of metrics.jsonl.
        out: path of the PNG file.
        panels: metric -> title. Steps without the metric are skipped.
    Raises:
        ValueError: see `read_metrics`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_columns = 3
    num_rows = -(-len(panels) // num_columns)
    figure, axes = pyplot.subplots(
        num_rows, num_columns, figsize=(4 * num_columns, 3 * num_rows), squeeze=False
    )
    metrics = {label: read_metrics(path) for label, path in runs.items()}
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=False):
        for label, lines in metrics.items():
            # A metric is null on a skipped step, or absent.
            points = [(m["step"], m[name]) for m in lines if m.get(name) is not None]
            steps, values = [step for step, _ in points], [value for _, value in points]
            [mean] = axis.plot(steps, _running_mean(values), label=label)
            axis.plot(steps, values, color=mean.get_color(), alpha=0.25, linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def plot_diagnosis(diagnosis: Mapping[str, Any], out: Path) -> None:
    """Draw the plots of a diagnosis (evaluation/diagnose/summary.py) to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7))
    residual, tenths, swept = (diagnosis[part] for part in ("residual", "tenths", "hindsight"))
    lefts, total = residual["edges"][:-1], sum(residual["counts"])
    bars = axes[0, 0]
    bars.bar(lefts, [c / total for c in residual["counts"]], width=0.5, align="edge")
    bars.set_yscale("log")
    _label(bars, "residual of the sampled tokens", "log f − log p, nats", "share of tokens")

    at = [10 * tenth + 5 for tenth in range(10)]
    for axis, names, title, unit in (
        (axes[0, 1], _KLS, "divergences", "nats"),
        (axes[0, 2], _SUPPORT_GAPS, "support gaps", "probability mass"),
        (axes[1, 0], ("hindsight_token_rate",), "hindsight token rate", "share of tokens"),
    ):
        for name in names:
            values = [float("nan") if value is None else value for value in tenths[name]]
            axis.plot(at, values, marker="o", markersize=3, label=name)
        _label(axis, f"{title} over the response", "position in the response, %", unit)
        if len(names) > 1:
            axis.legend(fontsize=7)

    heat = axes[1, 1]
    image = heat.imshow(swept["rates"], aspect="auto", cmap="viridis")
    heat.set_xticks(range(len(swept["floors"])), [f"{floor:g}" for floor in swept["floors"]])
    heat.set_yticks(range(len(swept["gaps"])), [f"{gap:g}" for gap in swept["gaps"]])
    _label(heat, "hindsight token rate by thresholds", "floor ε", "gap τ, nats")
    heat.grid(visible=False)
    figure.colorbar(image, ax=heat)

    trust = axes[1, 2]
    for name in ("ends_with_answer", "prefers_right"):
        points = [
            ((part["tokens_from"] + part["tokens_to"]) / 2, part[name])
            for part in diagnosis["reliability"]
            if part[name] is not None
        ]
        trust.plot(*(zip(*points, strict=True) if points else ([], [])), marker="o", label=name)
    trust.set_ylim(-0.05, 1.05)
    trust.legend(fontsize=7)
    _label(trust, "teacher's reliability", "tokens of the trace in the full view", "share")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def describe_diagnosis(diagnosis: Mapping[str, Any]) -> str:
    """Format the response ends and the predictors of a diagnosis for a terminal."""
    ends, predictors = diagnosis["response_ends"], diagnosis["predictors"]
    lines = [f"response ends: {ends['finished']} finished, {ends['cut']} cut at the limit"]
    if ends["finished"]:
        probs = ", ".join(f"{name} {prob:.3f}" for name, prob in ends["eos_prob"].items())
        lines.append(f"P(EOS) at the end of finished responses: {probs}")
    if predictors["graded"]:
        low, high = predictors["accuracy_95"]
        lines.append(
            f"accuracy: {predictors['accuracy']:.1%} of {predictors['graded']} responses "
            f"({low:.1%} to {high:.1%})"
        )
    if predictors["reason"]:
        lines.append(f"predictors of a right answer: none, {predictors['reason']}")
    else:
        counts = f"{predictors['right']} right, {predictors['wrong']} wrong"
        aucs = ", ".join(_format_auc(*signal) for signal in predictors["signals"].items())
        lines.append(f"predictors of a right answer, AUC ({counts}): {aucs}")
    return "\n".join(lines)


def _format_auc(name: str, signal: Mapping[str, Any]) -> str:
    bounds = signal["interval_95"]
    interval = f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else ""
    return f"{name} {signal['auc']:.3f}{interval}"


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.grid(alpha=0.3)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its predecessors, over a tenth of the run."""
    width = max(1, len(values) // 10)
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def results_table(title: str, rows: Mapping[str, Mapping[str, float]], formats: Sequence[Any]):
    """Build a table of results with one row per model.

    Args:
        title: title of the table.
        rows: label -> metric -> value.
        formats: (metric, heading, format specification) of each column.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for _, heading, _ in formats:
        table.add_column(heading, justify="right")
    for label, values in rows.items():
        table.add_row(label, *(format(values[name], spec) for name, _, spec in formats))
    return table
