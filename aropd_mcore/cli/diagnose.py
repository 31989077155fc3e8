"""`aropd diagnose`."""

import argparse
import os
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
    from aropd_mcore.evaluation.diagnose.spec import DiagnosisSpec

_DESCRIPTION = """\
Compare the teacher's signals on sampled responses. The student scores each response, and the
teacher scores it under both privileged views.

The data has training rows: question, reasoning, answer. The teacher is the one in the checkpoint.
If the checkpoint has none, or with --weights teacher, the model is its own teacher. Views, lambda,
clip, thresholds and skip_response_tokens are those of the checkpoint's run or of --config.

Prints P(EOS) at the ends of responses by view, the accuracy, and the AUC of the teacher's signals
as predictors of a correct response. Grading needs math-verify: pip install 'aropd-mcore[eval]'.

Writes NAME.json, which evaluation/diagnose/summary.py describes, and NAME.png to the folder OUT.
NAME consists of the data file's name, the weights and the step. `aropd report` shows the files in a
run's folder `diagnose`. Processes are started as by `aropd generate`.
"""
_EXAMPLES = """\
examples:
  %(prog)s --model runs/mine --data test.jsonl --rows 256
  %(prog)s --model Qwen2.5-7B-Instruct --data test.jsonl --config run.yaml --out base --tensor 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_model_argument(parser)
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="SOURCE",
        help="rows: a file, saved data set or data set of the hub (docs/data.md)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write (default for a run's checkpoint: the run's folder diagnose)",
    )
    parser.add_argument(
        "--rows",
        type=positive,
        default=64,
        metavar="N",
        help="use the first N rows of the data (default: %(default)s)",
    )
    parser.add_argument(
        "--read",
        type=int,
        default=8,
        metavar="N",
        help="number of responses written token by token for the page of `aropd report` (default: "
        "%(default)s)",
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
