"""Tables and plots of `loss.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loss_methods import FORMS
from rich.console import Console
from rich.table import Table

TITLES = {"hidden": "from hidden states", "logits": "from logits"}
WIDTH = 150
"""Width of a table if the output is not a terminal. The default of a pipe is 80 columns."""


def print_point(result: dict[str, Any]) -> None:
    """Print the machine's rates, and one table per form."""
    console = _console()
    sizes = ", ".join(
        f"{name[0].upper()} = {result[name]}" for name in ("tokens", "hidden", "vocab")
    )
    console.print(
        f"\n[bold]{sizes}, {result['dtype']}, {result['divergence']}, tp {result['tp']}[/bold], "
        f"{result['device']}, {result['threads']} threads per rank, load {result['load']:.1f}"
    )
    for name, rate in result.get("rates", {}).items():
        label = name.removesuffix("_per_second").replace("_", " ")
        console.print(f"machine: {label:22} {rate / 1e9:8.1f} G/s")
    for form in FORMS:
        rows = [row for row in result["rows"] if row["form"] == form]
        title = TITLES[form]
        if "floors" in result:
            title += f"; floor {result['floors'][form] * 1e3:.1f} ms"
        console.print(_table(title, rows))


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for heading in ("median ms", "from – to", "/ dense", "/ floor", "extra MB", "/ dense"):
        table.add_column(heading, justify="right")
    for heading in ("moved MB", "GFLOP", "collectives", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row["missing"]:
            table.add_row(row["method"], row["missing"])
            continue
        times = row["seconds"]
        collectives = [
            f"{counts['calls']} ({counts['bytes'] / 1e6:.2f} MB) {name}"
            for name, counts in row["collectives"].items()
            if counts["calls"]
        ]
        table.add_row(
            row["method"],
            f"{row['median'] * 1e3:.1f}",
            f"{min(times) * 1e3:.1f} – {max(times) * 1e3:.1f}",
            _number(row.get("time_to_dense"), ".2f"),
            _number(row["time_to_floor"], ".2f"),
            f"{row['peak_bytes'] / 1e6:.1f}",
            _number(row.get("memory_to_dense"), ".3f"),
            _number(row.get("moved_bytes"), ".0f", 1e-6),
            _number(row["flops"], ".0f", 1e-9),
            ", ".join(collectives) or "none",
            f"{max(row['errors']):.0e}",
        )
    return table


def print_bars(bars: Sequence[dict[str, Any]]) -> None:
    if not bars:
        return
    table = Table(title="bars", title_justify="left")
    for heading in ("quantity", "measured", "bar", ""):
        table.add_column(heading)
    words = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: ""}
    for bar in bars:
        limit = "" if bar["limit"] is None else f"{'≥' if bar['least'] else '≤'} {bar['limit']:.2f}"
        table.add_row(bar["name"], _number(bar["value"], ".3f"), limit, words[bar["passed"]])
    _console().print(table)


def _number(value: float | None, spec: str, scale: float = 1.0) -> str:
    return "—" if value is None else format(value * scale, spec)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a PNG of tp 1: ratios to the dense formula, or curves over several token counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    single = [point for point in points if point["tp"] == 1]
    figure, axes = pyplot.subplots(2, len(FORMS), figsize=(12, 7), squeeze=False)
    several = len({point["tokens"] for point in single}) > 1
    for column, form in enumerate(FORMS):
        for quantity, axis in zip(("time", "memory"), axes[:, column], strict=True):
            (_draw_sweep if several else _draw_bars)(axis, single, form, quantity)
            axis.set_title(f"{quantity}, {TITLES[form]}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_bars(axis, points: Sequence[dict[str, Any]], form: str, quantity: str) -> None:
    """Draw one bar per method and size."""
    key = f"{quantity}_to_dense"
    names = [row["method"] for row in points[0]["rows"] if row["form"] == form]
    height = 0.8 / len(points)
    for k, point in enumerate(points):
        rows = [row for row in point["rows"] if row["form"] == form and key in row]
        places = [names.index(row["method"]) + k * height for row in rows]
        bars = axis.barh(places, [row[key] for row in rows], height, label=_sizes(point))
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_yticks([k + 0.4 - height / 2 for k in range(len(names))], names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("ratio to the dense formula", fontsize=8)
    axis.legend(fontsize=7)


def _draw_sweep(axis, points: Sequence[dict[str, Any]], form: str, quantity: str) -> None:
    """Draw seconds or GB over the tokens, with one line per method and other sizes."""
    key, unit, label = {"time": ("median", 1, "s"), "memory": ("peak_bytes", 1e9, "GB")}[quantity]
    lines: dict[str, list[tuple[int, float]]] = {}
    sizes = {_sizes(point, tokens=False) for point in points}
    for point in points:
        for row in point["rows"]:
            if row["form"] == form and key in row:
                suffix = f", {_sizes(point, tokens=False)}" if len(sizes) > 1 else ""
                line = lines.setdefault(row["method"] + suffix, [])
                line.append((point["tokens"], row[key] / unit))
    for name, line in lines.items():
        axis.plot(*zip(*sorted(line), strict=True), marker="o", label=name)
    axis.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _sizes(point: dict[str, Any], *, tokens: bool = True) -> str:
    names = ["tokens", "hidden", "vocab"] if tokens else ["hidden", "vocab"]
    return ", ".join(f"{name[0].upper()} = {point[name]}" for name in names)
