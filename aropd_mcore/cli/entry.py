"""Parsing of command lines, start of subcommands, printing of errors."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from aropd_mcore import __version__, lifetime
from aropd_mcore.cli import (
    convert,
    diagnose,
    evaluate,
    generate,
    launch,
    plan,
    prepare,
    report,
    serve,
    show_views,
    train,
)
from aropd_mcore.cli.ranks import joined_job, leave_job
from aropd_mcore.environment import prepare_process
from aropd_mcore.local_launch import PASSED_ON, SAVED

_DESCRIPTION = """\
Privileged on-policy distillation on Megatron-Core: a student learns from its own rollouts and from
a teacher that sees the solution.
"""
_EXAMPLES = """\
examples:
  aropd prepare gsm8k.jsonl --out rows.jsonl    convert a data set to training rows
  aropd train run.yaml --dry-run                check everything, start nothing
  aropd train run.yaml                          train; rerun the command to resume
  aropd eval --model runs/mine --task gsm8k=test.jsonl --out runs/mine/eval
  aropd COMMAND --help                          all options of a command
"""
_COMMANDS = (
    (prepare, "prepare", "convert published data sets to training rows"),
    (show_views, "show-views", "print the student's and the teacher's prompts for one row"),
    (train, "train", "start or resume a training run"),
    (plan, "plan", "estimate memory and step time of a run without starting it"),
    (launch, "launch", "submit a run to Slurm"),
    (serve, "serve", "start a vLLM server for a run"),
    (generate, "generate", "sample a checkpoint's responses to prompts"),
    (evaluate, "eval", "measure a checkpoint's accuracy on benchmarks in local files"),
    (diagnose, "diagnose", "compare the teacher's signals on a checkpoint's responses"),
    (report, "report", "write an HTML page about one or more runs"),
    (convert, "convert", "convert, compare and inspect checkpoints"),
)
_RENAMED_OPTIONS = {
    "prepare": {"--output": "--out"},
    "generate": {"--output": "--out", "--checkpoint": "--model"},
}
"""Former names of options by command. They still work and are not in --help."""


class UsageError(ValueError):
    """An invalid command line. `usage` is the usage text of the parser that rejected it."""

    def __init__(self, message: str, usage: str):
        super().__init__(message)
        self.usage = usage


class _Parser(argparse.ArgumentParser):
    """A parser that raises UsageError. The base class would end the calling process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Print errors that users can act on without a traceback.

    Args:
        argv: arguments of the command line. None: those of this process. If this process is a rank,
            it then ends when its launcher ends.
    Returns:
        The exit code.
    """
    if argv is None:
        lifetime.end_with_launcher()
    is_in_job = joined_job()
    try:
        code = run(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"{error.usage}aropd: error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        # An error may occur on one rank only, so each rank prints its own. Copies of rank 0's error
        # are not printed again.
        rank = int(os.environ.get("RANK", "0"))
        if not getattr(error, "is_from_rank0", False):
            print(f"aropd: error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aropd: interrupted", file=sys.stderr)
        return 130
    if code in (0, SAVED) and not is_in_job:
        leave_job()
    if argv is None and "RANK" in os.environ:
        for number in PASSED_ON:  # torchrun sends them to the other ranks when the first one ends
            signal.signal(number, signal.SIG_IGN)
    return code


def run(argv: Sequence[str]) -> int:
    """Run one subcommand.

    Returns:
        The exit code. 0: success. 1: checkpoints differ (`convert verify`). 3: sampling or training
        cannot continue. 75: training stopped early and saved. Otherwise the exit code of a rank.
    Raises:
        ValueError, OSError, FloatingPointError: an error that users can act on.
    """
    prepare_process()
    args = parse(argv)
    return args.run(args) or 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. An empty one asks for help.

    Raises:
        UsageError: the command line is invalid.
    """
    argv = _rename_options(argv) or ["--help"]
    own, for_sbatch = argv, []
    if own[:1] == ["launch"] and "--" in own:
        place = own.index("--")
        own, for_sbatch = own[:place], own[place + 1 :]
    parser = _build_parser()
    args, rest = parser.parse_known_args(own)
    args.argv, args.sbatch_options = argv, for_sbatch
    if hasattr(args, "overrides"):
        # argparse stores the overrides before the first option, and returns those after it in rest.
        late = [text for text in rest if "=" in text and not text.startswith("-")]
        args.overrides += late
        rest = [text for text in rest if text not in late]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _rename_options(argv: Sequence[str]) -> list[str]:
    """Replace former names of options by the current names. Print one line on stderr for each."""
    renamed = _RENAMED_OPTIONS.get(argv[0], {}) if argv else {}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name in renamed:
            if os.environ.get("RANK", "0") == "0":
                print(f"aropd: {name} is deprecated: use {renamed[name]}", file=sys.stderr)
            word = f"{renamed[name]}{equals}{value}"
        words.append(word)
    return words


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="aropd",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module, name, summary in _COMMANDS:
        module.add_arguments(commands.add_parser(name, help=summary))
    return parser
