"""Train a base model by sft, train it by AR-OPD on two processes, and evaluate both."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from aropd_mcore.evaluation.figures import plot_curves, results_table

HERE = Path("examples/arithmetic")  # paths are relative to the repository's root
OUT = Path("runs/arithmetic")
METHODS = {
    "aropd": [],
    "full_opd": ["objective.residual_scale=1", "objective.residual_clip=null"],
    "partial_opd": ["objective.residual_scale=0"],
}
TITLES = {"aropd": "AR-OPD", "full_opd": "Full OPD", "partial_opd": "Partial OPD"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also run Full OPD and Partial OPD",
    )
    methods = list(METHODS) if parser.parse_args().compare else ["aropd"]
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)

    script("make_data.py", OUT / "data")
    script("make_model.py", OUT / "random")
    aropd("train", HERE / "sft.yaml")
    aropd("convert", "export", OUT / "sft", OUT / "base")
    for method in methods:
        output_dir = OUT / method
        aropd("train", HERE / "aropd.yaml", *METHODS[method], f"output_dir={output_dir}")
        aropd("convert", "export", output_dir, OUT / f"{method}-hf")
    models = {"base": OUT / "base"} | {method: OUT / f"{method}-hf" for method in methods}
    evaluation = OUT / "evaluation.json"
    rows = OUT / "data/heldout.jsonl"
    script("evaluate.py", HERE / "aropd.yaml", rows, *models.values(), "--out", evaluation)
    aropd("report", *(OUT / method for method in methods), "--out", OUT / "report.html")

    results = json.loads(evaluation.read_text())
    report({name: results[str(folder)] for name, folder in models.items()}, started)


def report(results: dict[str, dict[str, float]], started: float) -> None:
    methods = [name for name in results if name != "base"]
    curves = OUT / "curves.png"
    plot_curves({TITLES[name]: OUT / name / "metrics.jsonl" for name in methods}, curves)
    summary = {
        "base_accuracy": results["base"]["accuracy"],
        **{f"{name}_accuracy": results[name]["accuracy"] for name in methods},
        "seconds": round(time.monotonic() - started, 1),
        "methods": results,
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    table = results_table(
        "200 held-out problems, greedy",
        {("base" if n == "base" else f"after {TITLES[n]}"): r for n, r in results.items()},
        [
            ("accuracy", "accuracy", ".1%"),
            ("response_length", "response tokens", ".1f"),
            ("hindsight_token_rate", "hindsight rate", ".2%"),
        ],
    )
    console = Console()
    console.print(table)
    console.print(f"report: {OUT / 'report.html'}   summary: {OUT / 'summary.json'}")
    console.print(f"curves: {curves}   {summary['seconds']} s")


def aropd(*arguments: object) -> None:
    execute(["-m", "aropd_mcore.cli"], arguments, shown="aropd")


def script(name: str, *arguments: object) -> None:
    execute([str(HERE / name)], arguments, shown=f"python {HERE / name}")


def execute(python_arguments: list[str], arguments: tuple[object, ...], *, shown: str) -> None:
    words = [str(argument) for argument in arguments]
    print(f"\n$ {shown} {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, *python_arguments, *words], check=True)


if __name__ == "__main__":
    main()
