"""Tables and plots from runs' metrics.jsonl."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

PANELS = {
    "loss": "loss",
    "kl_full_student": "KL(full ‖ student)",
    "residual_uptake": "residual uptake",
    "hindsight_token_rate": "hindsight token rate",
    "response_length_mean": "mean response length",
    "grad_norm": "gradient norm",
}
"""Metric -> title of the curves that `plot_curves` draws."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, one a step.

    Raises:
        ValueError: the file is missing, or a line is not JSON; it names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a run writes it to its output_dir")
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
    return lines


def plot_curves(runs: Mapping[str, Path], out: Path, *, panels: Mapping[str, str] = PANELS) -> None:
    """Draw metrics over steps to a PNG: for each run its values, and their running mean.

    Args:
        runs: label -> metrics.jsonl.
        out: the PNG.
        panels: metric -> title; steps without the metric are left out.
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
            # null, on a skipped step, or not reported at all
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


def _running_mean(values: Sequence[float]) -> list[float]:
    """Each value's mean with those before it, over a tenth of the run."""
    width = max(1, len(values) // 10)
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def results_table(title: str, rows: Mapping[str, Mapping[str, float]], formats: Sequence[Any]):
    """A table of results, a line a model.

    Args:
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
