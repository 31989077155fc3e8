"""`aropd generate`."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from aropd_mcore.cli.ranks import add_num_processes_argument, run_as_ranks, sample_here
from aropd_mcore.cli.sampling_arguments import (
    add_model_argument,
    add_sampling_arguments,
    sampling_settings,
)

if TYPE_CHECKING:
    from aropd_mcore.rollout.generation_spec import GenerationSpec

_DESCRIPTION = """\
Sample responses of a student, a teacher or any other checkpoint, and write them as JSONL.

Each record of the prompts has one of these fields:
  question      as in training data; rendered, with `system` if present, as the student view
  messages      chat turns, each with `role` and `content`
  prompt_ids    token ids
Other fields are copied to the output. The output has one line per response: the fields of its
prompt, then
  sample          number of the response among the prompt's responses
  text            the decoded response
  response_ids    token ids, including the EOS
  logprobs        with --logprobs
  finish_reason   stop: ended with an EOS; length: at --max-response-tokens
  weight_version  number of training steps, for a training checkpoint
Order and seeds follow the prompts and do not depend on the layout.

For a run's checkpoint, questions are rendered by the views in the run's config.yaml. With
views.on_long_prompt: cut or cut_chat, long questions are shortened, and their lines have
num_cut_tokens. Any other prompt that is too long is an error. All prompts are checked before the
first response is sampled.

With --engine vllm the processes send their weights to vLLM servers: those in rollout.vllm of
--config, or without --config one server that is started on this machine. Servers in the config of
the checkpoint's run are not used.

Responses are collected in OUT.partial until all are complete. Rerun an interrupted command to
resume. Under torchrun this process is one rank of the job. Otherwise it starts the processes
itself. Several model replicas, if there are enough processes, split the prompts.
"""
_EXAMPLES = """\
examples:
  %(prog)s --model runs/mine --prompts test.jsonl --out out.jsonl --temperature 0
  %(prog)s --model runs/mine --weights teacher --prompts test.jsonl --out teacher.jsonl
  %(prog)s --model Qwen2.5-7B-Instruct --prompts test.jsonl --out base.jsonl --samples 4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_model_argument(parser)
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="SOURCE",
        help="records of prompts: a file, saved data set or data set of the hub (docs/data.md)",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="JSONL file to write"
    )
    parser.add_argument(
        "--logprobs", action="store_true", help="also write the log-probability of each token"
    )
    add_sampling_arguments(parser)
    add_num_processes_argument(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from aropd_mcore.config import hub_name
    from aropd_mcore.rollout.generation_spec import build_generation_spec

    if hub_name(args.prompts) is None and not args.prompts.exists():
        raise ValueError(f"{args.prompts}: no such file or folder; expected records of prompts")
    if args.out.exists():
        raise ValueError(f"{args.out}: exists already; remove it or choose another --out")
    spec = build_generation_spec(
        args.model,
        args.prompts,
        args.out,
        with_logprobs=args.logprobs,
        **sampling_settings(args),
    )
    return run_as_ranks(args, spec, lambda: _generate_here(spec))


def _generate_here(spec: "GenerationSpec") -> int:
    """Run this rank's part of the sampling. Returns the exit code."""
    from aropd_mcore.rollout.generate import generate

    code = sample_here(spec, lambda here: generate(spec, here))
    if not code and int(os.environ.get("RANK", "0")) == 0:
        print(f"{spec.prompts} -> {spec.output}")
    return code
