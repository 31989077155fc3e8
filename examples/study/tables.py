"""Collect the study's runs in results.json, and make tables and the figure from it.

    python examples/study/tables.py collect                    # runs/study -> results.json
    python examples/study/tables.py teacher                    # prints a table; also main,
                                                               # differences, ablations
    python examples/study/tables.py figure                     # -> study.png

Each number is a mean over seeds with its 95 % confidence interval (Student's t). The interval
covers other orders of the problems and other samples, but not other base models or held-out
problems. Differences are paired by seed. The base model's intervals are Wilson intervals.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from methods import ABLATIONS, MAIN, REFERENCE, SCALES, TITLES
from study import DECODINGS, VIEWS, measure_samples

from aropd_mcore.evaluation.statistics import over_seeds, percent, wilson

HERE = Path(__file__).parent
BUCKETS = {"short": range(3, 7), "middle": range(7, 11), "long": range(11, 15)}
"""Numbers of operations by bucket."""
COLOURS = {"base": "grey", "sft": "C1", "partial_opd": "C2", "full_opd": "C3", REFERENCE: "C0"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["collect", *TABLES, "figure"])
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    args = parser.parse_args(argv)
    if args.what == "collect":
        args.results.write_text(json.dumps(collect(args.runs), indent=1) + "\n")
        return
    results = json.loads(args.results.read_text())
    if args.what == "figure":
        draw(results, args.results.with_name("study.png"))
    else:
        print(TABLES[args.what](results))


# ------------------------------------------------------------------- runs -> results.json


def collect(runs: Path) -> dict[str, Any]:
    """Return all runs' numbers by method and seed, and the base model's by view."""
    base = {
        view: numbers(
            {name: measure_samples(runs / f"base-{name}", runs)[view] for name in DECODINGS}
        )
        for view in VIEWS
    }
    by_method: dict[str, dict[str, Any]] = {}
    for method in [*MAIN, *ABLATIONS]:
        for path in sorted(runs.glob(f"{method}/seed-*/result.json")):
            result = json.loads(path.read_text())
            training = result["training"]
            by_method.setdefault(method, {})[str(result["seed"])] = numbers(result) | {
                name: training[name] for name in TRAINING if name in training
            }
    num_heldout = len((runs / "data/heldout.jsonl").read_text().splitlines())
    return {"num_heldout": num_heldout, "base": base, "runs": by_method}


TRAINING = ("hindsight_token_rate", "kl_full_partial", "clip_fraction", "entropy_student")
"""Metrics of training in results.json, as means over the last steps. sft only has the entropy."""


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return means of the measurements of `measure_samples`, over all problems and by length."""
    values: dict[str, float] = {}
    for decoding in DECODINGS:
        answers = result[decoding]
        for name in ("right", "skips", "premature", "length"):
            values[f"{decoding}/{name}"] = mean(a[name] for a in answers)
        skipping = [a["right"] for a in answers if a["skips"]]
        if skipping:
            values[f"{decoding}/right/skipping"] = mean(skipping)
        for bucket, lengths in BUCKETS.items():
            inside = [a["right"] for a in answers if a["num_operations"] in lengths]
            values[f"{decoding}/right/{bucket}"] = mean(inside)
    return {name: round(value, 6) for name, value in values.items()}


# ------------------------------------------------------------------- results.json -> tables


def run_values(results: Mapping[str, Any], method: str, name: str) -> list[float]:
    """Return a number of each of the method's runs that has it. The base model has one run."""
    runs = {"0": results["base"]["none"]} if method == "base" else results["runs"][method]
    return [run[name] for run in runs.values() if name in run]


def differences(results: Mapping[str, Any], first: str, second: str, name: str) -> list[float]:
    """Return the first method's number minus the second's, for each common seed."""
    firsts, seconds = results["runs"][first], results["runs"][second]
    return [firsts[seed][name] - seconds[seed][name] for seed in firsts if seed in seconds]


def plain(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}"


Column = Callable[[str], str]
"""Function from a method to its cell."""


def column(
    results: Mapping[str, Any], name: str, show: Callable[[list[float]], str] = percent
) -> Column:
    return lambda method: show(run_values(results, method, name))


def table(results: Mapping[str, Any], methods: Iterable[str], columns: Mapping[str, Column]) -> str:
    """Return a Markdown table with one line per method that has runs."""
    available = [method for method in methods if method == "base" or method in results["runs"]]
    lines = [[TITLES[method], *(cell(method) for cell in columns.values())] for method in available]
    return markdown(["", *columns], lines)


def markdown(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heading, ["---"] * len(heading), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def teacher_table(results: Mapping[str, Any]) -> str:
    def lines() -> Iterator[list[str]]:
        num = results["num_heldout"]
        for view, values in results["base"].items():
            shares = [values[f"{decoding}/right"] for decoding in DECODINGS]
            intervals = [wilson(round(share * num), num) for share in shares]
            cells = [
                f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"
                for share, (low, high) in zip(shares, intervals, strict=True)
            ]
            yield [view, *cells, percent([values["sampled/skips"]])]

    heading = [f"{decoding}, %" for decoding in DECODINGS]
    return markdown(["view of the base model", *heading, "skips steps, %"], lines())


def main_table(results: Mapping[str, Any]) -> str:
    columns = {
        "sampled, %": column(results, "sampled/right"),
        "greedy, %": column(results, "greedy/right"),
        "skips steps, %": column(results, "sampled/skips"),
        "tokens": column(results, "sampled/length", plain),
    }
    return table(results, ["base", *MAIN], columns)


def differences_table(results: Mapping[str, Any]) -> str:
    def less(name: str) -> Column:
        return lambda method: percent(differences(results, REFERENCE, method, name), sign="+")

    columns = {
        "sampled": less("sampled/right"),
        "greedy": less("greedy/right"),
        **{f"{bucket}, sampled": less(f"sampled/right/{bucket}") for bucket in BUCKETS},
        "skips steps": less("sampled/skips"),
    }
    return table(results, [method for method in MAIN if method != REFERENCE], columns)


def ablations_table(results: Mapping[str, Any]) -> str:
    def gain(method: str) -> str:
        if method == REFERENCE:
            return ""
        return percent(differences(results, method, REFERENCE, "sampled/right"), sign="+")

    columns = {
        "sampled, %": column(results, "sampled/right"),
        "vs. the reference": gain,
        "greedy, %": column(results, "greedy/right"),
        "skips steps, %": column(results, "sampled/skips"),
    }
    return table(results, [REFERENCE, *ABLATIONS], columns)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "teacher": teacher_table,
    "main": main_table,
    "differences": differences_table,
    "ablations": ablations_table,
}


# ------------------------------------------------------------------- results.json -> figure


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy and skipped steps over lambda, and accuracy by number of operations.

    All numbers are of sampled responses.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))

    def dots(axis: Any, places: Sequence[float], names: Sequence[tuple[str, str]], **style: Any):
        """Plot the number of each (method, name) at its place, with its interval."""
        bars = [over_seeds(run_values(results, *name)) for name in names]
        heights, halves = ([100 * (v or 0) for v in values] for values in zip(*bars, strict=True))
        axis.errorbar(places, heights, halves, capsize=3, **style)

    scales = [scale for scale in SCALES if f"aropd_{scale}" in results["runs"]]
    for axis, name in zip(axes, ("sampled/right", "sampled/skips"), strict=False):
        names = [(f"aropd_{scale}", name) for scale in scales]
        dots(axis, scales, names, marker="o", color=COLOURS[REFERENCE], label="AR-OPD")
        singles = {"partial_opd": 0.0, "full_opd": 1.03, "sft": -0.15, "base": -0.25}
        for method, place in singles.items():  # next to their lambda, or left of 0
            if method == "base" or method in results["runs"]:
                style = {"color": COLOURS[method], "label": TITLES[method]}
                dots(axis, [place], [(method, name)], marker="s", ls="", **style)
        axis.set(xlabel="λ", xticks=[0, *SCALES])
    axes[0].set(title="right, %")
    axes[0].legend(fontsize=7)
    axes[1].set(title="skips steps, %")
    for method, colour in COLOURS.items():
        if method == "base" or method in results["runs"]:
            names = [(method, f"sampled/right/{bucket}") for bucket in BUCKETS]
            style = {"color": colour, "label": TITLES[method]}
            dots(axes[2], range(len(BUCKETS)), names, marker="o", **style)
    axes[2].set(title="right, %, by number of operations")
    ticks = [f"{steps[0]} to {steps[-1]}" for steps in BUCKETS.values()]
    axes[2].set_xticks(range(len(BUCKETS)), ticks)
    axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
