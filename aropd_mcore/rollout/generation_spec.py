"""Specification of an `aropd generate` job, checked before its processes start; no Megatron."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aropd_mcore.config import (
    Config,
    ConfigError,
    ParallelConfig,
    RolloutConfig,
    SamplingConfig,
    ViewsConfig,
)
from aropd_mcore.config_file import load_config, validated, with_template_arguments
from aropd_mcore.convert.architecture import check_layout
from aropd_mcore.convert.source import Role, Source, open_source
from aropd_mcore.data.records import content_hash


@dataclass(frozen=True)
class GenerationSpec:
    """Settings of a job that samples responses of one model to a file of prompts."""

    source: Source
    role: Role
    prompts: Path
    output: Path
    views: ViewsConfig
    rollout: RolloutConfig
    parallel: ParallelConfig
    dtype: str
    """As model.dtype in a run's config."""
    seed: int
    with_logprobs: bool

    @property
    def weight_version(self) -> int | None:
        """Number of training steps of the weights; None if the checkpoint has no such name."""
        if self.source.iteration is None:
            return None
        number = self.source.iteration.name.removeprefix("iter_")
        return int(number) if number.isdecimal() else None

    @property
    def max_prompt_tokens(self) -> int:
        """Largest number of prompt tokens that leaves room for a response."""
        return _room(self.source, self.rollout)

    def identity(self) -> dict[str, Any]:
        """Return all that the responses depend on, as JSON values. The layout is not part of it."""
        source, sampling = self.source, self.rollout.model_dump(mode="json")
        weights = source.iteration or source.path
        return {
            "checkpoint": str(weights.resolve()),
            "role": self.role,
            "hf": str(source.hf_folder.resolve()),
            "sha256 of prompts": content_hash(self.prompts),
            **{f"views.{name}": value for name, value in self.views},
            **{name: sampling[name] for name in SamplingConfig.model_fields},
            "engine": self.rollout.engine,
            "samples": self.rollout.rollouts_per_prompt,
            "dtype": self.dtype,
            "seed": self.seed,
            "logprobs": self.with_logprobs,
        }


def build_generation_spec(
    checkpoint: Path,
    prompts: Path,
    output: Path,
    *,
    role: Role = "student",
    hf: Path | None = None,
    adapter: Path | None = None,
    config: Path | None = None,
    rollout: Mapping[str, Any],
    parallel: Mapping[str, Any],
    dtype: str = "auto",
    seed: int = 1234,
    with_logprobs: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> GenerationSpec:
    """Read the checkpoint's headers and check the settings.

    Args:
        checkpoint: see open_source.
        hf, adapter: see open_source.
        config: YAML file of a run, for its views and, with the vLLM engine, its rollout.vllm. None:
            the views of config.yaml in the checkpoint's run; without that file, the default
            templates with the model's limit. The servers of the checkpoint's run are never used,
            because the run may be training with them.
        rollout: values of RolloutConfig.
        parallel: values of ParallelConfig.
        chat_template_kwargs: arguments of the chat template, in addition to those of the views.
    Raises:
        ValueError: a setting, the checkpoint or the layout cannot be used.
    """
    source = open_source(checkpoint, role=role, hf=hf, adapter=adapter)
    given = load_config(config) if config else None
    servers = {"vllm": given.rollout.vllm} if given else {}
    settings = validated(RolloutConfig, {**rollout, **servers}, "aropd generate")
    sizes = dict(parallel)
    # As in training: with tensor parallelism, Megatron's experts need sequence parallelism.
    sizes["sequence"] = source.architecture.routing is not None and sizes.get("tensor", 1) > 1
    layout = validated(ParallelConfig, sizes, "aropd generate")
    check_layout(
        source.architecture,
        tensor=layout.tensor,
        stages=layout.stages,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
    )
    room = _room(source, settings)
    if room < 1:
        raise ConfigError(
            f"max_response_tokens {settings.max_response_tokens} leaves no room for a prompt: the "
            f"model has {source.architecture.max_position_embeddings} positions"
            + (f", kv_cache_tokens is {c}" if (c := settings.kv_cache_tokens) else "")
        )
    run = given or config_of_run(source)
    views = run.views if run else ViewsConfig(max_prompt_tokens=room, on_long_prompt="drop")
    return GenerationSpec(
        source=source,
        role=role,
        prompts=prompts,
        output=output,
        views=with_template_arguments(views, chat_template_kwargs or {}),
        rollout=settings,
        parallel=layout,
        dtype=dtype,
        seed=seed,
        with_logprobs=with_logprobs,
    )


def _room(source: Source, rollout: RolloutConfig) -> int:
    most = source.architecture.max_position_embeddings
    return min(most, rollout.kv_cache_tokens or most) - rollout.max_response_tokens


def run_folder(source: Source) -> Path | None:
    """Return the output_dir of the run that saved the checkpoint; None if there is none."""
    if source.iteration is None:
        return None
    folder = source.iteration.absolute().parent  # output_dir/checkpoints/iter_NNNNNNN
    return folder.parent if folder.name == "checkpoints" else None


def config_of_run(source: Source) -> Config | None:
    """Return the configuration of the run that saved the checkpoint; None if it is not there."""
    folder = run_folder(source)
    path = folder / "config.yaml" if folder else None
    return load_config(path) if path and path.is_file() else None
