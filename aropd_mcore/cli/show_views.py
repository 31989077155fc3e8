"""`aropd show-views`."""

import argparse
from pathlib import Path

from aropd_mcore.cli.config_arguments import add_preset_argument
from aropd_mcore.cli.sampling_arguments import add_template_argument

_DESCRIPTION = """\
Print the three prompts that a run builds from one row: the student view, the partial view and the
full view. Below them is the oracle response, with its thinking and its answer. The place where a
response begins is marked.
"""
_EXAMPLES = """\
examples:
  %(prog)s rows.jsonl --config run.yaml
  %(prog)s rows.jsonl --row 3 --model Qwen2.5-7B-Instruct
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument(
        "data",
        type=Path,
        metavar="SOURCE",
        help="rows: a file, saved data set or data set of the hub (docs/data.md)",
    )
    parser.add_argument(
        "--row",
        type=int,
        default=0,
        metavar="N",
        help="number of the row, counted from 0 (default: %(default)s)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--config", type=Path, metavar="YAML", help="use the tokenizer and views of this run"
    )
    source.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="use the tokenizer of this HF folder and the default views",
    )
    add_preset_argument(parser)
    add_template_argument(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from aropd_mcore.config import ViewsConfig
    from aropd_mcore.config_file import load_config, with_template_arguments
    from aropd_mcore.data.dataset import RowDataset
    from aropd_mcore.data.preview import render_views
    from aropd_mcore.data.tokenizer import load_tokenizer
    from aropd_mcore.data.views import ViewBuilder

    if args.preset and not args.config:
        raise ValueError(
            "--preset with --model: expected --config, since a preset changes the views of a run"
        )
    config = load_config(args.config, preset=args.preset) if args.config else None
    views = with_template_arguments(
        config.views if config else ViewsConfig(), args.chat_template_kwargs or {}
    )
    rows = RowDataset.load([args.data])
    if not 0 <= args.row < len(rows):
        raise ValueError(
            f"--row {args.row}: {rows.sources[0].name} has rows 0 to {len(rows) - 1}; choose one "
            "of them"
        )
    builder = ViewBuilder(
        load_tokenizer(config.model.path if config else args.model),
        views,
        is_privileged=config is None or config.has_privileged_views,
    )
    Console().print(render_views(builder, rows[args.row]))
