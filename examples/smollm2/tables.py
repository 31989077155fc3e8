"""Make results.json from the study's runs, and tables from results.json.

    python examples/smollm2/tables.py collect      # adds the runs in runs/smollm2 to results.json
    python examples/smollm2/tables.py views        # prints a table; also signals, grid, main,
                                                   # lengths, differences, problems, ablations,
                                                   # predictors

Each number is a mean over seeds with its 95 % confidence interval (Student's t), except in the
table of problems, where it is a mean over the problems of all seeds. Each seed has its own training
rows, held-out problems, order and samples. All runs of a seed share the base model: machines that
round in another way make another base. Differences are paired by seed, or by problem, and are those
of aropd_0.8 with the others (--reference chooses another method).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from methods import ABLATIONS, GRID, MAIN, METHODS, RATES, REFERENCE
from study import ANCHORS, DECODINGS, DIAGNOSED_SEED, VIEWS

from aropd_mcore.evaluation.predictors import SIGNALS
from aropd_mcore.evaluation.statistics import interval, percent

HERE = Path(__file__).parent
BUCKETS = {"2 steps": (2,), "3 and 4 steps": (3, 4), "5 and 6 steps": (5, 6)}
TRAINING = (
    *("hindsight_token_rate", "kl_full_partial", "clip_fraction", "residual_capture_ratio"),
    *("truncation_rate", "eos_prob_student", "eos_prob_target"),
)
"""Metrics of training in results.json, as means over the last steps."""
Results = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["collect", *TABLES, *COMPARISONS])
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument(
        "--reference",
        choices=MAIN,
        default=REFERENCE,
        help="method that `differences` and `problems` compare with the others (default: "
        "%(default)s)",
    )
    args = parser.parse_args(argv)
    if args.what == "collect":
        if not args.runs.is_dir():
            raise ValueError(f"{args.runs}: no such folder; run study.py first")
        old = json.loads(args.results.read_text()) if args.results.exists() else {}
        results = merged(old, collect(args.runs))
        args.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    else:
        results = json.loads(args.results.read_text())
        if comparison := COMPARISONS.get(args.what):
            if args.reference not in results["runs"]:
                found = ", ".join(results["runs"])
                raise ValueError(
                    f"{args.results}: found no run of {args.reference}, only of {found}; choose "
                    "--reference among them, or run study.py and tables.py collect"
                )
            print(comparison(results, args.reference))
        else:
            print(TABLES[args.what](results))


def collect(runs: Path) -> dict[str, Any]:
    """Return all numbers: `views` by model and view, `grid` by method and learning rate, `runs` by
    method and seed, `diagnoses` by model.

    Parts that study.py has not made in this folder are left out.
    """
    results: dict[str, Any] = {"views": {}, "grid": {}, "runs": {}, "diagnoses": {}}
    for model in ("untouched", "base"):
        paths = {decoding: runs / "views" / model / f"{decoding}.json" for decoding in DECODINGS}
        if all(path.exists() for path in paths.values()):
            answers = {decoding: json.loads(path.read_text()) for decoding, path in paths.items()}
            results["views"][model] = {
                view: numbers({d: answers[d][view] for d in DECODINGS}) for view in VIEWS
            }
    diagnoses = {name: runs / "views" / name for name in ANCHORS}
    diagnoses |= {method: runs / method / f"seed-{DIAGNOSED_SEED}" for method in METHODS}
    for name, folder in diagnoses.items():
        path = folder / "diagnosis.json"
        if path.exists():
            results["diagnoses"][name] = json.loads(path.read_text())
    for path in sorted(runs.glob("*/*/result.json")):
        result = json.loads(path.read_text())
        training = {k: result["training"][k] for k in TRAINING if k in result["training"]}
        is_grid = path.parent.parent.name == "grid"
        group = results["grid" if is_grid else "runs"].setdefault(result["method"], {})
        group[f"{result['lr']:g}" if is_grid else str(result["seed"])] = (
            numbers(result)
            | training
            | {"seconds": round(result["seconds"]["train"]), "base": result["base"]}
        )
    return results


def merged(old: Results, new: Results) -> dict[str, Any]:
    """Return `new` with the results that only `old` has: a study may run on several machines.

    Raises:
        ValueError: the runs of a seed have different base models.
    """
    both = {}
    for name, group in new.items():
        old_group = old.get(name, {})
        both[name] = {
            key: old_group.get(key, {}) | entries for key, entries in (old_group | group).items()
        }
    bases: dict[str, str] = {}
    for method, runs in both["runs"].items():
        for seed, run in runs.items():
            if bases.setdefault(seed, run["base"]) != run["base"]:
                raise ValueError(
                    f"seed {seed}: found runs of the base models {bases[seed]} and {run['base']} "
                    f"({method}), expected one: make all runs of a seed on one machine"
                )
    return both


def numbers(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return means over responses, by decoding. Accuracy also by kind and by number of steps, and
    with its 95 % interval. `problems` has each problem's number of right responses as a digit."""
    values: dict[str, float] = {}
    digits: dict[str, str] = {}
    for decoding in DECODINGS:
        lines = answers[decoding]
        for name in ("right", "cut", "skips", "premature", "length"):
            values[f"{decoding}/{name}"] = mean(line[name] for line in lines)
        groups = {kind: [a for a in lines if a["kind"] == kind] for kind in ("shop", "carry")}
        groups |= {b: [a for a in lines if a["num_steps"] in n] for b, n in BUCKETS.items()}
        for name, group in groups.items():
            values[f"{decoding}/right/{name}"] = mean(line["right"] for line in group)
        problems: dict[str, list[bool]] = {}
        for line in lines:
            problems.setdefault(line["id"], []).append(line["right"])
        for name, bound in zip(("low", "high"), interval(list(problems.values())), strict=True):
            values[f"{decoding}/right/{name}"] = bound
        digits[f"{decoding}/problems"] = "".join(
            str(sum(problems[key])) for key in sorted(problems)
        )
    return {name: round(value, 6) for name, value in values.items()} | digits


def run_values(results: Results, method: str, name: str) -> list[float]:
    return [run[name] for run in results["runs"][method].values() if name in run]


def gains(results: Results, first: str, second: str, name: str) -> list[float]:
    """Return the first method's number minus the second's, for each common seed."""
    firsts, seconds = results["runs"][first], results["runs"][second]
    return [firsts[seed][name] - seconds[seed][name] for seed in firsts if seed in seconds]


def problem_gains(results: Results, first: str, second: str, decoding: str) -> list[float]:
    """Return `gains` of the accuracy for each problem of each common seed."""
    num_samples = DECODINGS[decoding][1]
    runs = [results["runs"][method] for method in (first, second)]
    return [
        (int(a) - int(b)) / num_samples
        for seed in sorted(runs[0].keys() & runs[1].keys())
        for a, b in zip(*(run[seed][f"{decoding}/problems"] for run in runs), strict=True)
    ]


def markdown(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heading, ["---"] * len(heading), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table(
    results: Results, methods: Iterable[str], columns: Mapping[str, Callable[[str], str]]
) -> str:
    available = [method for method in methods if method in results["runs"]]
    return markdown(
        ["", *columns],
        [[method, *(cell(method) for cell in columns.values())] for method in available],
    )


def cells(results: Results, names: Mapping[str, str]) -> dict[str, Callable[[str], str]]:
    """Return the cell function of each heading. `names` are result names by heading."""
    return {
        heading: lambda method, name=name: percent(run_values(results, method, name))
        for heading, name in names.items()
    }


def views_table(results: Results) -> str:
    def cell(found: Mapping[str, float], decoding: str) -> str:
        share, low, high = (100 * found[f"{decoding}/right{end}"] for end in ("", "/low", "/high"))
        return f"{share:.0f} ({low:.0f} to {high:.0f})"

    lines = [
        [
            model,
            view,
            *(cell(found, decoding) for decoding in DECODINGS),
            percent([found["greedy/cut"]], digits=0),
            f"{found['greedy/length']:.0f}",
        ]
        for model, views in results["views"].items()
        for view, found in views.items()
    ]
    heading = ["model", "it is shown", *(f"{decoding}, %" for decoding in DECODINGS)]
    return markdown([*heading, "cut at the limit, %", "tokens"], lines)


def grid_table(results: Results) -> str:
    def cell(method: str, rate: float) -> str:
        run = results["grid"].get(method, {}).get(f"{rate:g}")
        if run is None:
            return "–"
        return f"{100 * run['greedy/right']:.0f} / {100 * run['sampled/right']:.0f}"

    lines = [[method, *(cell(method, rate) for rate in RATES)] for method in GRID]
    return markdown(["greedy / sampled, %", *(f"{rate:g}" for rate in RATES)], lines)


def main_table(results: Results) -> str:
    names = {
        "sampled, %": "sampled/right",
        "greedy, %": "greedy/right",
        "cut, %": "sampled/cut",
        "skips steps, %": "sampled/skips",
        "premature, %": "sampled/premature",
        "hindsight tokens, %": "hindsight_token_rate",
    }
    return table(results, MAIN, cells(results, names))


def lengths_table(results: Results) -> str:
    names = {f"{bucket}, sampled, %": f"sampled/right/{bucket}" for bucket in BUCKETS}
    return table(results, MAIN, cells(results, names))


_COMPARED = {
    "sampled": "sampled/right",
    "greedy": "greedy/right",
    **{f"{bucket}, sampled": f"sampled/right/{bucket}" for bucket in BUCKETS},
}


def _gain_cells(
    results: Results, pair: Callable[[str], tuple[str, str]]
) -> dict[str, Callable[[str], str]]:
    """Return the cell function of each heading: the first of pair(method) minus the second."""
    return {
        heading: lambda method, name=name: percent(gains(results, *pair(method), name), sign="+")
        for heading, name in _COMPARED.items()
    }


def differences_table(results: Results, reference: str) -> str:
    """Return the reference minus each other method, paired by seed."""
    others = [method for method in MAIN if method != reference]
    return table(results, others, _gain_cells(results, lambda method: (reference, method)))


def problems_table(results: Results, reference: str) -> str:
    """Return `differences_table` paired by problem. Its intervals cover problems, not trainings."""

    def cell(method: str, decoding: str) -> str:
        return percent(problem_gains(results, reference, method, decoding), sign="+")

    columns: dict[str, Callable[[str], str]] = {
        decoding: lambda method, decoding=decoding: cell(method, decoding) for decoding in DECODINGS
    }
    seeds = {"seeds": lambda method: str(len(gains(results, reference, method, "greedy/right")))}
    return table(results, [m for m in MAIN if m != reference], seeds | columns)


def ablations_table(results: Results) -> str:
    """Return each ablation minus the method that it changes, paired by seed."""
    return table(results, ABLATIONS, _gain_cells(results, lambda method: (method, REFERENCE)))


def signals_table(results: Results) -> str:
    """Return the size of the residual with each of the two anchors, on the base model's samples."""
    names = {
        "KL(full ‖ partial), nats": "kl_full_partial",
        "KL(partial ‖ student), nats": "kl_partial_student",
    }
    shares = {"hindsight tokens, %": "hindsight_token_rate", "clipped p-mass, %": "clip_fraction"}
    lines = []
    for name, partial_view in ANCHORS.items():
        found = results["diagnoses"][name]
        tenths = found["tenths"]["kl_full_partial"]
        cells = [f"{found['metrics'][metric]:.3f}" for metric in names.values()]
        cells += [f"{tenths[k]:.3f}" for k in (0, 4, 9)]
        cells += [f"{100 * found['metrics'][metric]:.2f}" for metric in shares.values()]
        lines.append([partial_view, *cells])
    tenths = ("in the 1st tenth", "5th", "10th")
    return markdown(["partial view", *names, *tenths, *shares], lines)


def predictors_table(results: Results) -> str:
    def cell(signal: Mapping[str, Any]) -> str:
        if signal["auc"] is None:
            return "–"
        low, high = signal["interval_95"] or (float("nan"),) * 2
        return f"{signal['auc']:.3f} ({low:.2f} to {high:.2f})"

    lines = [
        [
            name,
            f"{found['predictors']['right']} / {found['predictors']['wrong']}",
            *(cell(found["predictors"]["signals"][signal]) for signal in SIGNALS),
        ]
        for name, found in results["diagnoses"].items()
        if name not in ANCHORS
    ]
    return markdown(["", "right / wrong", *SIGNALS], lines)


TABLES: dict[str, Callable[[Results], str]] = {
    "views": views_table,
    "signals": signals_table,
    "predictors": predictors_table,
    "grid": grid_table,
    "main": main_table,
    "lengths": lengths_table,
    "ablations": ablations_table,
}
COMPARISONS: dict[str, Callable[[Results, str], str]] = {
    "differences": differences_table,
    "problems": problems_table,
}


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"tables.py: error: {error}")
    except FileNotFoundError as error:
        problem = f"{error.filename}: no such file; run study.py, then tables.py collect"
        sys.exit(f"tables.py: error: {problem}")
