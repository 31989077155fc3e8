"""`aropd eval`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aropd_mcore.cli.ranks import add_num_processes_argument, run_as_ranks, sample_here
from aropd_mcore.cli.sampling_arguments import (
    add_model_argument,
    add_sampling_arguments,
    positive,
    sampling_settings,
)

if TYPE_CHECKING:
    from aropd_mcore.evaluation.run import Evaluation
    from aropd_mcore.mcore.runtime import Runtime

_DESCRIPTION = """\
Measure the accuracy of a student, a teacher or any other checkpoint on benchmarks.

A task is NAME=FILE or NAME:FORMAT=FILE. FILE has the published records (docs/data.md, Sources).
Choose any NAME. Without FORMAT the format is detected from the file's keys:
  gsm8k      GSM8K                              medmcqa    MedMCQA
  math       MATH-500, AMC, AIME, Minerva, rows gpqa       GPQA
  choices    MMLU, MMLU-Pro, MedQA              humaneval  HumanEval, HumanEval+
                                                mbpp       MBPP, MBPP+
Questions are rendered as in training, by the views of the checkpoint's run or of --config. Decoding
is greedy unless --temperature is given.

Mathematics is graded by math-verify, multiple choice by letter, and code by running it in a
sandbox, which needs --allow-code-execution. docs/evaluation.md describes the sandbox.

The folder OUT receives responses.jsonl, samples.jsonl (one graded line per response) and
summary.json. Rerun an interrupted command to resume. Processes are started as by `aropd generate`.
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
    add_model_argument(parser)
    parser.add_argument(
        "--task",
        required=True,
        action="append",
        dest="tasks",
        metavar="NAME=FILE",
        help="benchmark; repeat the option for several",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run the code that the model writes, in a sandbox",
    )
    parser.add_argument(
        "--code-asserts",
        type=positive,
        metavar="N",
        help="show up to N of a code problem's asserts in its prompt. The same asserts also grade "
        "the answer. (default: the benchmark's own prompt, which shows all of MBPP's test_list and "
        "no asserts of HumanEval)",
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
    """Run this rank's part of sampling and grading. Returns the exit code."""
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
            f"aropd: the sandbox cannot use namespaces here ({evaluation.not_isolated}): the "
            "model's code can reach the network and files outside its folder",
            file=sys.stderr,
        )
    Console(soft_wrap=True).print(*tables(grade(evaluation)), sep="\n")
