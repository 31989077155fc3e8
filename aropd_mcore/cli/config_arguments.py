"""Arguments of the commands that read a run's YAML file."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from aropd_mcore.config import Config
from aropd_mcore.config_file import PRESETS, load_config, preset_changes


def add_config_arguments(parser: argparse.ArgumentParser, *, example: str) -> None:
    """Add the YAML file, overrides of its settings, and --preset."""
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"settings that replace those of the file and of --preset, such as {example}",
    )
    add_preset_argument(parser)


def add_preset_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="settings of a published method, which replace those of the file (default: none): "
        f"{', '.join(PRESETS)}. aropd_mcore/presets/NAME.yaml names the source of each.",
    )


def load(args: argparse.Namespace) -> Config:
    """Load the configuration that the arguments name."""
    return load_config(args.config, args.overrides, preset=args.preset)


def config_words(args: argparse.Namespace) -> list[str]:
    """Return the command-line arguments from which another process loads the same config."""
    preset = ["--preset", args.preset] if args.preset else []
    return [str(args.config), *preset, *args.overrides]


def print_preset(args: argparse.Namespace, config: Config) -> None:
    """Print which settings the preset changes."""
    if args.preset:
        changes = preset_changes(args.config, args.preset, config)
        print_comments(f"preset {args.preset}: {line}" for line in changes or ["changes nothing"])


def print_comments(texts: Iterable[str]) -> None:
    """Print texts as comments, below the YAML or the command that they describe."""
    print("".join(f"# {line}\n" for text in texts for line in text.splitlines()), end="")
