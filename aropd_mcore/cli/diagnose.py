"""`aropd diagnose`."""

import argparse
import os
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
    from aropd_mcore.evaluation.diagnose.spec import DiagnosisSpec

_DESCRIPTION = """\
Look at what a teacher would teach: responses are sampled, and scored once by the student and under
both privileged views.

FILE has rows as training data: question, reasoning, answer. The teacher is the checkpoint's own;
where it has none, and with --weights teacher, the model itself. Views, lambda, clip, thresholds,
skip_response_tokens and, unless it is given, --max-response-tokens are those of the checkpoint's
run or of --config.

The terminal shows P(EOS) where responses end, by view, the accuracy, and the AUC of the teacher's
signals for a right response. Grading needs math-verify: pip install 'aropd-mcore[eval]'.

OUT gets NAME.json, whose parts evaluation/diagnose/summary.py describes, and NAME.png; NAME is of
the file, the weights and the step. `aropd report` shows what lies in a run's folder `diagnose`.
Processes are those of `aropd generate`.
"""
_EXAMPLES = """\
examples:
  %(prog)s --model runs/mine --data test.jsonl --rows 256
  %(prog)s --model Qwen2.5-7B-Instruct --data test.jsonl --config run.yaml --out base --tensor 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    add_num_processes_argument(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from aropd_mcore.evaluation.diagnose.spec import build_diagnosis_spec

    request = build_diagnosis_spec(
        args.model,
        args.data,
        out=args.out,
        num_rows=args.rows,
        num_read=args.read,
        **sampling_settings(args),
    )
    return run_as_ranks(args, request.spec, lambda: _diagnose_here(request))


def _diagnose_here(request: "DiagnosisSpec") -> int:
    from aropd_mcore.evaluation.diagnose.score import diagnose

    code = sample_here(request.spec, lambda here: diagnose(request, here))
    if not code and int(os.environ.get("RANK", "0")) == 0:
        print(f"{request.spec.prompts} -> {request.spec.output}")
    return code
