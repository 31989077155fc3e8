"""From the study's runs to results.json, from that to tables and the figure.

    python examples/study/tables.py collect                    # runs/study -> results.json
    python examples/study/tables.py teacher                    # prints a table: also main, lengths,
                                                               # differences, ablations
    python examples/study/tables.py figure                     # -> study.png

Each number is a mean over seeds with a 95 % interval, Student's t over the seeds: it is about other
orders of the problems and other samples, with this base model and these held-out problems. A
difference is taken seed by seed, over the same problems. The base's intervals are Wilson's.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from methods import ABLATIONS, MAIN, REFERENCE, SCALES, TITLES
from study import DECODINGS, VIEWS, counted

from aropd_mcore.evaluate.statistics import wilson

HERE = Path(__file__).parent
BUCKETS = {"short": range(3, 7), "middle": range(7, 11), "long": range(11, 15)}
"""Numbers of operations."""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for 1, 2, ... degrees of freedom; the last one serves for more."""
Numbers = Mapping[str, float]
"""Of a run: `greedy/right`, `sampled/right/long`, `hindsight_token_rate` and so on."""


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
    """Every run's numbers, by method and seed, and the base's by what it is shown."""
    base = {
        view: numbers({name: counted(runs / f"base-{name}", runs)[view] for name in DECODINGS})
        for view in VIEWS
    }
    found: dict[str, dict[str, Any]] = {}
    for method in [*MAIN, *ABLATIONS]:
        for path in sorted(runs.glob(f"{method}/seed-*/result.json")):
            result = json.loads(path.read_text())
            training = result["training"]
            found.setdefault(method, {})[str(result["seed"])] = numbers(result) | {
                name: training[name] for name in TRAINING if name in training
            }
    num_heldout = len((runs / "data/heldout.jsonl").read_text().splitlines())
    return {"num_heldout": num_heldout, "base": base, "runs": found}


TRAINING = ("hindsight_token_rate", "kl_full_partial", "clip_fraction", "entropy_student")
"""Of metrics.jsonl, over the last steps' rollouts; sft has none of them but the entropy."""


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Means of what `counted` counts, of all problems and by their length."""
    found: dict[str, float] = {}
    for decoding in DECODINGS:
        answers = result[decoding]
        for name in ("right", "skips", "premature", "length"):
            found[f"{decoding}/{name}"] = mean(a[name] for a in answers)
        for bucket, lengths in BUCKETS.items():
            inside = [a["right"] for a in answers if a["num_operations"] in lengths]
            found[f"{decoding}/right/{bucket}"] = mean(inside)
    return {name: round(value, 6) for name, value in found.items()}


# ------------------------------------------------------------------- results.json -> tables


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval; None: of one seed there is none."""
    if len(values) < 2:
        return mean(values), None
    t = T_975[min(len(values) - 1, len(T_975)) - 1]
    return mean(values), t * stdev(values) / math.sqrt(len(values))


def of_method(results: Mapping[str, Any], method: str, name: str) -> list[float]:
    return [run[name] for run in results["runs"][method].values() if name in run]


def differences(results: Mapping[str, Any], method: str, name: str) -> list[float]:
    """The reference less the method, for every seed that both have."""
    ours, theirs = results["runs"][REFERENCE], results["runs"][method]
    return [ours[seed][name] - theirs[seed][name] for seed in ours if seed in theirs]


def percent(values: Sequence[float], *, sign: str = "") -> str:
    if not values:
        return "–"
    middle, half = over_seeds(values)
    return f"{100 * middle:{sign}.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def plain(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}"


def table(heading: Sequence[str], lines: Iterator[Sequence[str]]) -> str:
    rows = [heading, ["---"] * len(heading), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def methods_in(results: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    return [method for method in methods if method in results["runs"]]


def teacher_table(results: Mapping[str, Any]) -> str:
    def lines() -> Iterator[list[str]]:
        for view, found in results["base"].items():
            cells = []
            for decoding in DECODINGS:
                share, num = found[f"{decoding}/right"], results["num_heldout"]
                low, high = wilson(round(share * num), num)
                cells.append(f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})")
            yield [view, *cells, f"{100 * found['sampled/skips']:.1f}"]

    return table(["the base is shown", "greedy, %", "sampled, %", "skips steps, %"], lines())


def main_table(results: Mapping[str, Any]) -> str:
    heading = [
        "",
        "sampled, %",
        "greedy, %",
        "skips steps, %",
        "hindsight tokens, %",
        "premature, %",
        "tokens",
    ]

    def lines() -> Iterator[list[str]]:
        base = results["base"]["none"]
        shares = [
            f"{100 * base[n]:.1f}" for n in ("sampled/right", "greedy/right", "sampled/skips")
        ]
        yield [
            "base",
            *shares,
            "–",
            f"{100 * base['sampled/premature']:.1f}",
            f"{base['sampled/length']:.1f}",
        ]
        for method in methods_in(results, list(MAIN)):

            def cell(name: str, show: Callable = percent, method: str = method) -> str:
                return show(of_method(results, method, name))

            yield [
                TITLES[method],
                cell("sampled/right"),
                cell("greedy/right"),
                cell("sampled/skips"),
                cell("hindsight_token_rate"),
                cell("sampled/premature"),
                cell("sampled/length", plain),
            ]

    return table(heading, lines())


def lengths_table(results: Mapping[str, Any]) -> str:
    def lines() -> Iterator[list[str]]:
        base = results["base"]["none"]
        yield ["base", *(f"{100 * base[f'sampled/right/{b}']:.1f}" for b in BUCKETS)]
        for method in methods_in(results, list(MAIN)):
            yield [
                TITLES[method],
                *(percent(of_method(results, method, f"sampled/right/{b}")) for b in BUCKETS),
            ]

    heads = [f"{name}, {steps[0]} to {steps[-1]} steps" for name, steps in BUCKETS.items()]
    return table(["", *heads], lines())


def differences_table(results: Mapping[str, Any]) -> str:
    names = [
        "sampled/right",
        "greedy/right",
        *(f"sampled/right/{b}" for b in BUCKETS),
        "sampled/skips",
    ]

    def lines() -> Iterator[list[str]]:
        for method in methods_in(results, list(MAIN)):
            if method != REFERENCE:
                yield [
                    TITLES[method],
                    *(percent(differences(results, method, n), sign="+") for n in names),
                ]

    heads = ["sampled", "greedy", *(f"{b}, sampled" for b in BUCKETS), "skips steps"]
    return table([f"{TITLES[REFERENCE]} less", *heads], lines())


def ablations_table(results: Mapping[str, Any]) -> str:
    def lines() -> Iterator[list[str]]:
        for method in methods_in(results, [REFERENCE, *ABLATIONS]):
            found = [
                of_method(results, method, n)
                for n in ("sampled/right", "greedy/right", "sampled/skips", "hindsight_token_rate")
            ]
            gain = (
                ""
                if method == REFERENCE
                else percent([-d for d in differences(results, method, "sampled/right")], sign="+")
            )
            yield [TITLES[method], str(len(found[0])), *map(percent, found), gain]

    heads = [
        "seeds",
        "sampled, %",
        "greedy, %",
        "skips steps, %",
        "hindsight tokens, %",
        "less reference, sampled",
    ]
    return table(["", *heads], lines())


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "teacher": teacher_table,
    "main": main_table,
    "lengths": lengths_table,
    "differences": differences_table,
    "ablations": ablations_table,
}


# ------------------------------------------------------------------- results.json -> figure


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy and skipped steps over lambda, and accuracy by number of operations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (right, skips, lengths) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    scales = [(s, f"aropd_{s}") for s in SCALES if f"aropd_{s}" in results["runs"]]
    for axis, name, title in (
        (right, "sampled/right", "right, %"),
        (skips, "sampled/skips", "skips steps, %"),
    ):
        line = [(scale, *over_seeds(of_method(results, method, name))) for scale, method in scales]
        marks = [(0.0, "partial_opd", "C2"), (1.0, "full_opd", "C3"), (None, "sft", "C1")]
        errors = [100 * (half or 0) for *_, half in line]
        axis.errorbar(
            [x for x, *_ in line],
            [100 * y for _, y, _ in line],
            errors,
            marker="o",
            capsize=3,
            label="AR-OPD",
        )
        for x, method, colour in marks:
            if method not in results["runs"]:
                continue
            middle, half = over_seeds(of_method(results, method, name))
            if x is None:
                axis.axhline(100 * middle, color=colour, linestyle="--", label=TITLES[method])
            else:
                axis.errorbar(
                    [x],
                    [100 * middle],
                    [100 * (half or 0)],
                    marker="s",
                    color=colour,
                    capsize=3,
                    linestyle="",
                    label=TITLES[method],
                )
        axis.axhline(100 * results["base"]["none"][name], color="grey", linestyle=":", label="base")
        axis.set(xlabel="λ", title=f"{title} (sampled)")
    right.legend(fontsize=7)
    places = range(len(BUCKETS))
    for method in ("sft", "partial_opd", "full_opd", REFERENCE):
        if method in results["runs"]:
            found = [over_seeds(of_method(results, method, f"sampled/right/{b}")) for b in BUCKETS]
            lengths.errorbar(
                places,
                [100 * m for m, _ in found],
                [100 * (h or 0) for _, h in found],
                marker="o",
                capsize=3,
                label=TITLES[method],
            )
    base = results["base"]["none"]
    lengths.plot(
        places,
        [100 * base[f"sampled/right/{b}"] for b in BUCKETS],
        color="grey",
        linestyle=":",
        label="base",
    )
    lengths.set(title="right, % (sampled), by operations")
    lengths.set_xticks(list(places), [f"{steps[0]}–{steps[-1]}" for steps in BUCKETS.values()])
    lengths.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
