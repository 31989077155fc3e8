"""The arguments of `aropd generate`, and those that `aropd eval` has too."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from aropd_mcore.config import ModelConfig, RolloutConfig

if TYPE_CHECKING:
    pass

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

_SAMPLING = ("max_response_tokens", "temperature", "top_p", "top_k")
_ENGINE = ("engine", "batch_size", "kv_cache_tokens")
_PARALLEL = {
    "tensor": "tensor-parallel ranks",
    "pipeline": "pipeline stages",
    "expert": "ranks that share out the experts",
    "expert_tensor": "ranks that share out the matrices of each expert",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything but how many processes to start."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_source_argument(parser, "--checkpoint")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    parser.add_argument("--logprobs", action="store_true", help="write each token's log-prob too")
    add_sampling_arguments(parser)


def add_source_argument(parser: argparse.ArgumentParser, name: str) -> None:
    """Where the weights are."""
    parser.add_argument(
        name,
        required=True,
        type=Path,
        metavar="DIR",
        help="an HF folder; a Megatron checkpoint or one iteration of it; a run's output_dir",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Whose weights, who samples, and how.

    Args:
        defaults: in place of RolloutConfig's.
    """
    parser.add_argument(
        "--weights",
        dest="who",
        choices=("student", "teacher"),
        default="student",
        help="whose weights, of a training checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="folder of config.json and tokenizer (default: the hf/ beside the checkpoint)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="YAML",
        help="a run's, for its views (default: of the run that the checkpoint is of) and the vLLM "
        "servers of its rollout.vllm (default: one, here)",
    )
    rollout = RolloutConfig.model_fields
    parser.add_argument("--samples", type=positive, default=1, help="a prompt (default: 1)")
    for name in (*_SAMPLING, *_ENGINE):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type={"temperature": float, "top_p": float, "engine": str}.get(name, int),
            choices=get_args(rollout[name].annotation) if name == "engine" else None,
            default=defaults.get(name, rollout[name].default),
            help=f"{rollout[name].description} (default: %(default)s)",
        )
    parser.add_argument("--seed", type=int, default=1234, help="(default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=get_args(ModelConfig.model_fields["dtype"].annotation),
        default="auto",
        help=ModelConfig.model_fields["dtype"].description,
    )
    for name, what in _PARALLEL.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=positive, default=1, help=f"{what} (default: 1)")


def job_of_arguments(args: argparse.Namespace) -> "Job":
    """As rollout.generation_spec.build_generation_spec; ValueError too where there are no prompts, or the output is there."""
    from aropd_mcore.rollout.generation_spec import build_generation_spec

    if not args.prompts.is_file():
        raise ValueError(f"{args.prompts}: no such file; expected prompts, JSONL or Parquet")
    if args.output.exists():
        raise ValueError(f"{args.output}: exists already; remove it, or name another --output")
    return build_generation_spec(
        args.checkpoint,
        args.prompts,
        args.output,
        with_logprobs=args.logprobs,
        **sampling_of_arguments(args),
    )


def sampling_of_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling_arguments` adds, as arguments of rollout.generation_spec.build_generation_spec."""
    return {
        "who": args.who,
        "hf": args.hf,
        "config": args.config,
        "rollout": {name: getattr(args, name) for name in (*_SAMPLING, *_ENGINE)}
        | {"rollouts_per_prompt": args.samples},
        "parallel": {name: getattr(args, name) for name in _PARALLEL},
        "dtype": args.dtype,
        "seed": args.seed,
    }


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {number}")
    return number
