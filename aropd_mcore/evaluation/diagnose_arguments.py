"""The arguments of `aropd diagnose`."""

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
    pass

_DESCRIPTION = """\
Look at what a teacher would teach: responses are sampled, and scored once by the student and under
both privileged views.

FILE has rows as training data: question, reasoning, answer. The teacher is the checkpoint's own;
where it has none, and with --weights teacher, the model itself. Views, lambda, clip, thresholds,
skip_response_tokens and, unless it is given, --max-response-tokens are those of the checkpoint's
run or of --config.

The terminal shows P(EOS) where responses end, by view, the accuracy, and the AUC of the teacher's
signals for a right response. Grading needs math-verify: pip install 'aropd-mcore[eval]'.

OUT gets NAME.json, whose parts evaluation/diagnose/summary.py describes, and NAME.png; NAME is of the file,
the weights and the step. `aropd report` shows what lies in a run's folder `diagnose`. Processes are
those of `aropd generate`.
"""
_EXAMPLES = """\
examples:
  %(prog)s --model runs/mine --data test.jsonl --rows 256
  %(prog)s --model Qwen2.5-7B-Instruct --data test.jsonl --config run.yaml --out base --tensor 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything but how many processes to start."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_source_argument(parser, "--model")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="(default: of a run, its folder diagnose)"
    )
    parser.add_argument(
        "--rows", type=positive, default=64, help="the first of FILE (default: %(default)s)"
    )
    parser.add_argument(
        "--read",
        type=int,
        default=8,
        metavar="N",
        help="responses that are written token by token, for the reader (default: %(default)s)",
    )
    add_sampling_arguments(parser, max_response_tokens=None)


def diagnosis_of_arguments(args: argparse.Namespace) -> "Diagnosis":
    """As diagnose.diagnosis_of."""
    from aropd_mcore.evaluation.diagnose.score import build_diagnosis_spec

    return build_diagnosis_spec(
        args.model,
        args.data,
        out=args.out,
        num_rows=args.rows,
        num_read=args.read,
        **sampling_of_arguments(args),
    )
