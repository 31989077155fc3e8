"""`aropd report`."""

import argparse
from pathlib import Path

_DESCRIPTION = """\
Write one HTML page about one or more runs: training curves, validation, answers over the run,
drift, accuracy by response length, step time, and a viewer for responses. The page works offline.
"""
_EXAMPLES = """\
examples:
  %(prog)s runs/mine
  %(prog)s runs/baseline runs/mine --out comparison.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="HTML file to write (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from aropd_mcore.evaluation.report import write_report

    print(write_report(args.runs, args.out))
