"""Arguments of the commands that sample responses."""

import argparse
from pathlib import Path
from typing import Any, get_args

from aropd_mcore.config import ConfigError, ModelConfig, RolloutConfig
from aropd_mcore.yaml_core import parse_yaml

_SAMPLING = ("max_response_tokens", "temperature", "top_p", "top_k")
_ENGINE = ("engine", "batch_size", "kv_cache_tokens")
_PARALLEL = {
    "tensor": "tensor-parallel ranks",
    "pipeline": "pipeline stages",
    "layers_in_first_stage": "layers on the first stage",
    "layers_in_last_stage": "layers on the last stage",
    "expert": "expert-parallel ranks",
    "expert_tensor": "tensor-parallel ranks of each expert",
}
LAYOUT_HELP = (
    "layers of every pipeline stage, such as 'Et*3|t*4|t*3L'; see parallel.pipeline_layout "
    "(default: an even split)"
)
_TYPES = {"temperature": float, "top_p": float, "engine": str}


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add --model, the path of the weights."""
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="DIR",
        help="an HF folder, a Megatron checkpoint, one iteration of a Megatron checkpoint, or a "
        "run's output_dir",
    )


def add_template_argument(parser: argparse.ArgumentParser) -> None:
    """Add --chat-template-kwargs, a YAML or JSON mapping."""
    parser.add_argument(
        "--chat-template-kwargs",
        type=_template_arguments,
        metavar="MAPPING",
        help="arguments of the chat template, such as '{enable_thinking: false}', in addition to "
        "those of views.chat_template_kwargs (default: none)",
    )


def _template_arguments(text: str) -> dict[str, Any]:
    try:
        arguments = parse_yaml(text, text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(arguments, dict):
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected a mapping such as {{enable_thinking: false}}"
        )
    return arguments


def add_sampling_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the options for weights, engine, sampling and layout.

    Args:
        defaults: values that replace RolloutConfig's defaults. max_response_tokens=None: the run's
            setting.
    """
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="weights to use of a training checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="folder of config.json and tokenizer (default: hf/ next to the checkpoint); for a run "
        "that trains an adapter, the base model (default: the run's model.path)",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="PEFT folder of a LoRA adapter to merge into the weights of an HF folder "
        "(default: none)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="YAML",
        help="config of a run, for its views (default: those of the checkpoint's run) and for the "
        "vLLM servers in its rollout.vllm (default: one server, started on this machine)",
    )
    add_template_argument(parser)
    rollout = RolloutConfig.model_fields
    parser.add_argument(
        "--samples",
        type=positive,
        default=1,
        metavar="N",
        help="number of responses per prompt (default: 1)",
    )
    for name in (*_SAMPLING, *_ENGINE):
        default = defaults.get(name, rollout[name].default)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=_TYPES.get(name, int),
            choices=get_args(rollout[name].annotation) if name == "engine" else None,
            default=default,
            metavar={"temperature": "T", "top_p": "P", "engine": None}.get(name, "N"),
            help=_help_text(rollout[name].description or "", default),
        )
    parser.add_argument(
        "--seed", type=int, default=1234, help="seed of sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(ModelConfig.model_fields["dtype"].annotation),
        default="auto",
        help=_help_text(ModelConfig.model_fields["dtype"].description or "", "auto"),
    )
    for name, description in _PARALLEL.items():
        option = f"--{name.replace('_', '-')}"
        is_split = name.startswith("layers_")
        parser.add_argument(
            option,
            type=positive,
            default=None if is_split else 1,
            metavar="N",
            help=f"number of {description} (default: {'an even split' if is_split else '1'})",
        )
    parser.add_argument("--pipeline-layout", metavar="LAYOUT", help=LAYOUT_HELP)


def _help_text(description: str, default: object) -> str:
    """Return a setting's description with its default. Descriptions state the meaning of null."""
    if default is not None:
        return f"{description} (default: %(default)s)"
    if "null:" in description:
        return description.replace("null:", "Default:")
    return f"{description} (default: the run's setting)"


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_sampling_arguments` as arguments of `build_generation_spec`."""
    return {
        "role": args.weights,
        "hf": args.hf,
        "adapter": args.adapter,
        "config": args.config,
        "rollout": {name: getattr(args, name) for name in (*_SAMPLING, *_ENGINE)}
        | {"rollouts_per_prompt": args.samples},
        "parallel": {name: getattr(args, name) for name in (*_PARALLEL, "pipeline_layout")},
        "dtype": args.dtype,
        "seed": args.seed,
        "chat_template_kwargs": args.chat_template_kwargs,
    }


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {number}")
    return number
