"""`aropd generate`."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from aropd_mcore.cli.ranks import add_num_processes_argument, run_as_ranks, sample_here
from aropd_mcore.cli.sampling_arguments import (
    add_sampling_arguments,
    add_source_argument,
    sampling_settings,
)

if TYPE_CHECKING:
    from aropd_mcore.rollout.generation_spec import GenerationSpec

_DESCRIPTION = """\
Write responses of a student, a teacher or any other checkpoint, as JSONL.

A line of FILE (JSONL or Parquet) has one of
  question      as training data: with its `system`, rendered as the student's view in training
  messages      chat turns, each with `role` and `content`
  prompt_ids    token ids
and any other fields, which go into its output lines as they are. An output line is a response: the
fields of its prompt, then sample, text, response_ids (with the EOS), logprobs (with --logprobs),
finish_reason (stop: an EOS; length: --max-response-tokens) and, of a training checkpoint,
weight_version, its training steps. Order and seeds are those of the prompts, whatever the layout.

Of a run's checkpoint, questions are rendered by the views of its config.yaml, where
views.on_long_prompt: cut and cut_chat shorten long ones; their lines have num_cut_tokens. Any other
prompt that does not fit is an error, and every prompt is checked before the first response.

With --engine vllm the processes hand their weights to vLLM servers: those of --config's
rollout.vllm, never of the checkpoint's run by itself, or one that is started on this machine.

Responses gather in OUTPUT.partial until all are there. After an interruption the same command goes
on where it stopped. Under torchrun this process is one rank of the job; otherwise it starts the
processes itself. Those beyond one model replica are further replicas, which share out the prompts.
"""
_EXAMPLES = """\
examples:
  %(prog)s --checkpoint runs/mine --prompts test.jsonl --output out.jsonl --temperature 0
  %(prog)s --checkpoint runs/mine --weights teacher --prompts test.jsonl --output teacher.jsonl
  %(prog)s --checkpoint Qwen2.5-7B-Instruct --prompts test.jsonl --output base.jsonl --samples 4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_source_argument(parser, "--checkpoint")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    parser.add_argument("--logprobs", action="store_true", help="write each token's log-prob too")
    add_sampling_arguments(parser)
    add_num_processes_argument(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from aropd_mcore.rollout.generation_spec import build_generation_spec

    if not args.prompts.is_file():
        raise ValueError(f"{args.prompts}: no such file; expected prompts, JSONL or Parquet")
    if args.output.exists():
        raise ValueError(f"{args.output}: exists already; remove it, or name another --output")
    spec = build_generation_spec(
        args.checkpoint,
        args.prompts,
        args.output,
        with_logprobs=args.logprobs,
        **sampling_settings(args),
    )
    return run_as_ranks(args, spec, lambda: _generate_here(spec))


def _generate_here(spec: "GenerationSpec") -> int:
    """Do this rank's part of the sampling; return the exit code."""
    from aropd_mcore.rollout.generate import generate

    code = sample_here(spec, lambda here: generate(spec, here))
    if not code and int(os.environ.get("RANK", "0")) == 0:
        print(f"{spec.prompts} -> {spec.output}")
    return code
