"""`aropd report`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write one HTML page from the folders of runs: curves, drift, accuracy by length, step "
        "time, and a reader of responses. The page needs no network."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from aropd_mcore.evaluation.report import write_report

    print(write_report(args.runs, args.out))
