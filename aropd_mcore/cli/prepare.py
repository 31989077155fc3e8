"""`aropd prepare`."""

import argparse
from pathlib import Path

from aropd_mcore.cli.sampling_arguments import positive

_DESCRIPTION = """\
Make training rows (question, reasoning, answer) from published data sets, and report what was
dropped and what is in doubt.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.add_argument("inputs", nargs="+", type=Path, help="JSONL or Parquet files")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument(
        "--format",
        default="auto",
        help="format of the inputs, such as numina or code (default: by each record's keys)",
    )
    parser.add_argument(
        "--rows",
        type=positive,
        metavar="N",
        help="write N rows, drawn at random from the usable ones (default: all of them)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of --rows (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from aropd_mcore.data.prepare import prepare

    print(prepare(args.inputs, args.output, format=args.format, num_rows=args.rows, seed=args.seed))
