"""`aropd show-views`."""

import argparse
from pathlib import Path

from aropd_mcore.cli.config_arguments import add_preset_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the three views of one row: the student's, the partial, the full."
    parser.add_argument("data", type=Path, help="JSONL or Parquet file of rows")
    parser.add_argument("--row", type=int, default=0, help="counted from 0 (default: %(default)s)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="YAML file of a run: its tokenizer and views")
    source.add_argument("--model", type=Path, help="HF folder: its tokenizer, default views")
    add_preset_argument(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from aropd_mcore.config import ViewsConfig
    from aropd_mcore.config_file import load_config
    from aropd_mcore.data.dataset import RowDataset
    from aropd_mcore.data.preview import render_views
    from aropd_mcore.data.tokenizer import load_tokenizer
    from aropd_mcore.data.views import ViewBuilder

    if args.preset and not args.config:
        raise ValueError("--preset changes the views of a run: give --config in place of --model")
    config = load_config(args.config, preset=args.preset) if args.config else None
    views = config.views if config else ViewsConfig()
    rows = RowDataset.load([args.data])
    if not 0 <= args.row < len(rows):
        raise ValueError(f"{args.data}: has rows 0 to {len(rows) - 1}, found --row {args.row}")
    builder = ViewBuilder(load_tokenizer(config.model.path if config else args.model), views)
    Console().print(render_views(builder, rows[args.row]))
