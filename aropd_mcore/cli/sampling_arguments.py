"""Arguments of the commands that sample."""

import argparse
from pathlib import Path
from typing import Any, get_args

from aropd_mcore.config import ModelConfig, RolloutConfig

_SAMPLING = ("max_response_tokens", "temperature", "top_p", "top_k")
_ENGINE = ("engine", "batch_size", "kv_cache_tokens")
_PARALLEL = {
    "tensor": "tensor-parallel ranks",
    "pipeline": "pipeline stages",
    "expert": "ranks that share out the experts",
    "expert_tensor": "ranks that share out the matrices of each expert",
}


def add_source_argument(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the option that names the weights."""
    parser.add_argument(
        name,
        required=True,
        type=Path,
        metavar="DIR",
        help="an HF folder; a Megatron checkpoint or one iteration of it; a run's output_dir",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the options of weights, engine, sampling and layout.

    Args:
        defaults: values in place of RolloutConfig's defaults.
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
    parser.add_argument(
        "--samples", type=positive, default=1, help="responses per prompt (default: 1)"
    )
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


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `add_sampling_arguments` adds, as arguments of `build_generation_spec`."""
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
    """Parse a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {number}")
    return number
