"""`aropd prepare`."""

import argparse
from pathlib import Path

from aropd_mcore.cli.sampling_arguments import positive

_DESCRIPTION = """\
Convert published data sets to training rows (question, reasoning, answer), and report how many
records were dropped and which rows look doubtful.
"""
_EXAMPLES = """\
examples:
  %(prog)s gsm8k.jsonl --out rows.jsonl
  %(prog)s train-*.parquet --format numina --rows 10000 --out rows.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help="records: files, saved data sets and data sets of the hub (docs/data.md)",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="JSONL file to write"
    )
    parser.add_argument(
        "--format",
        default="auto",
        help="format of the inputs, such as numina or code (default: auto, which detects it from "
        "each record's keys)",
    )
    parser.add_argument(
        "--rows",
        type=positive,
        metavar="N",
        help="write N rows, drawn at random from the usable rows (default: all usable rows)",
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="seed of --rows (default: %(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from aropd_mcore.data.prepare import prepare

    print(prepare(args.inputs, args.out, format=args.format, num_rows=args.rows, seed=args.seed))
