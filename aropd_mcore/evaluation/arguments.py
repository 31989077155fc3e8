"""The arguments of `aropd eval`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from aropd_mcore.rollout.arguments import (
    add_sampling_arguments,
    add_source_argument,
    positive,
    sampling_of_arguments,
)

if TYPE_CHECKING:
    from aropd_mcore.evaluation.run import Evaluation

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
    """Everything but how many processes to start."""
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


def evaluation_of_arguments(args: argparse.Namespace) -> "Evaluation":
    """As evaluate.evaluation_of."""
    from aropd_mcore.evaluation.run import build_evaluation
    from aropd_mcore.evaluation.tasks import parse_task

    return build_evaluation(
        args.model,
        [parse_task(text) for text in args.tasks],
        args.out,
        allow_code_execution=args.allow_code_execution,
        code_asserts=args.code_asserts,
        **sampling_of_arguments(args),
    )
