"""`aropd eval`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aropd_mcore.cli.ranks import add_num_processes_argument, run_as_ranks, sample_here
from aropd_mcore.cli.sampling_arguments import (
    add_sampling_arguments,
    add_source_argument,
    positive,
    sampling_settings,
)

if TYPE_CHECKING:
    from aropd_mcore.evaluation.run import Evaluation
    from aropd_mcore.mcore.runtime import Runtime

_DESCRIPTION = """\
Accuracy of a student, a teacher or any other checkpoint on benchmarks in local files.

A task is name=FILE, JSONL (also .gz) or Parquet as published, whose format is found from its keys:
  gsm8k      GSM8K                              medmcqa    MedMCQA
  math       MATH-500, AMC, AIME, Minerva, rows gpqa       GPQA
  choices    MMLU, MMLU-Pro, MedQA              humaneval  HumanEval, HumanEval+
                                                mbpp       MBPP, MBPP+
or name:format=FILE. Questions are rendered as in training, by the views of the checkpoint's run or
of --config, greedy unless --temperature says otherwise.

Mathematics is graded by math-verify, choices by letter, code by running it: --allow-code-execution
does that in a sandbox, which evaluation/README.md describes.

OUT gets responses.jsonl, samples.jsonl (a graded line a response) and summary.json. After an
interruption the same command goes on where it stopped. Processes are those of `aropd generate`.
"""
_EXAMPLES = """\
examples:
  %(prog)s --model runs/mine --task gsm8k=test.jsonl --task amc23=amc.jsonl --out runs/mine/eval
  %(prog)s --model runs/mine --weights teacher --task gsm8k=test.jsonl --out teacher
  %(prog)s --model HF --task aime=aime.jsonl --samples 16 --temperature 0.6 --engine vllm --out aime
  %(prog)s --model HF --task humaneval=HumanEval.jsonl.gz --allow-code-execution --out humaneval
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_source_argument(parser, "--model")
    parser.add_argument(
        "--task", required=True, action="append", dest="tasks", metavar="NAME=FILE", help="several"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run the code that the model writes, in a sandbox",
    )
    parser.add_argument(
        "--code-asserts",
        type=positive,
        metavar="N",
        help="show up to N of a code problem's asserts in its prompt; they are among those that "
        "grade it (default: the benchmark's own prompt, which is all of MBPP's test_list and none "
        "of HumanEval's)",
    )
    add_sampling_arguments(parser, temperature=0.0)
    add_num_processes_argument(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from aropd_mcore.evaluation.run import build_evaluation
    from aropd_mcore.evaluation.tasks import parse_task

    evaluation = build_evaluation(
        args.model,
        [parse_task(text) for text in args.tasks],
        args.out,
        allow_code_execution=args.allow_code_execution,
        code_asserts=args.code_asserts,
        **sampling_settings(args),
    )
    if evaluation.is_sampled and "RANK" not in os.environ:
        _grade(evaluation)
        return 0
    return run_as_ranks(args, evaluation.spec, lambda: _evaluate_here(evaluation))


def _evaluate_here(evaluation: "Evaluation") -> int:
    """Do this rank's part of sampling and grading; return the exit code."""
    from aropd_mcore.mcore.rank0 import run_on_rank0
    from aropd_mcore.rollout.generate import generate

    def work(runtime: "Runtime") -> None:
        if not run_on_rank0(lambda: evaluation.is_sampled):
            generate(evaluation.spec, runtime)
        run_on_rank0(lambda: _grade(evaluation), takes_long=True)

    return sample_here(evaluation.spec, work)


def _grade(evaluation: "Evaluation") -> None:
    from rich.console import Console

    from aropd_mcore.evaluation.run import grade
    from aropd_mcore.evaluation.summary import tables

    if evaluation.not_isolated:
        print(
            f"aropd: the sandbox for code has no namespaces here ({evaluation.not_isolated}): the "
            "model's code can reach the network, and files that are not its own",
            file=sys.stderr,
        )
    Console(soft_wrap=True).print(*tables(grade(evaluation)), sep="\n")
