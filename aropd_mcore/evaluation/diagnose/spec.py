"""Validated request of `aropd diagnose`, built before the job's processes start. No Megatron."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aropd_mcore.config import ConfigError, ObjectiveConfig, RolloutConfig
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.source import HFSource, open_source
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.rollout.generation_spec import (
    GenerationSpec,
    build_generation_spec,
    config_of_run,
    run_folder,
)
from aropd_mcore.types import Views

ResponseKey = tuple[int, int]
"""Numbers of a row and of one of its samples."""


@dataclass(frozen=True)
class DiagnosisSpec:
    """A model, rows with their views, and the output file."""

    spec: GenerationSpec
    """Spec of the responses. Its `output` is the JSON file of the diagnosis."""
    views: tuple[Views, ...]
    """Views of each row."""
    objective: ObjectiveConfig
    num_read: int
    """Number of responses that the JSON contains token by token, for the reader."""

    @property
    def keys(self) -> list[ResponseKey]:
        samples = self.spec.rollout.rollouts_per_prompt
        return [(row, sample) for row in range(len(self.views)) for sample in range(samples)]

    @property
    def has_own_teacher(self) -> bool:
        source = self.spec.source
        return (
            self.spec.role == "student" and not isinstance(source, HFSource) and source.has_teacher
        )


def build_diagnosis_spec(
    model: Path,
    data: Path,
    *,
    out: Path | None,
    num_rows: int,
    num_read: int,
    config: Path | None = None,
    rollout: Mapping[str, Any],
    **spec: Any,
) -> DiagnosisSpec:
    """Open the checkpoint (headers only), read the rows, and check the arguments.

    Args:
        model: see open_source.
        data: source of rows; see data.records.read_records.
        out: output folder. None: `diagnose` in the folder of the checkpoint's run.
        num_rows: number of rows to read from `data`.
        num_read: number of responses for the reader.
        config, rollout, spec: see rollout.generation_spec.build_generation_spec. If
            max_response_tokens is None, the run's value is used.
    Raises:
        ValueError: an argument cannot be used. The message states the reason.
    """
    if config is None:
        settings = config_of_run(open_source(model, hf=spec.get("hf"), adapter=spec.get("adapter")))
    else:
        settings = load_config(config)
    sampling = dict(rollout)
    if sampling.get("max_response_tokens") is None:
        defaults = settings.rollout if settings else RolloutConfig()
        sampling["max_response_tokens"] = defaults.max_response_tokens
    generation = build_generation_spec(model, data, Path(), config=config, rollout=sampling, **spec)
    folder = out or _default_folder(generation)
    objective = settings.objective if settings else ObjectiveConfig()
    tokenizer = load_tokenizer(generation.source.hf_folder)
    vocab_size = generation.source.architecture.vocab_size
    builder = ViewBuilder(tokenizer, generation.views, vocab_size=vocab_size)
    views = tuple(builder.build(row) for row in RowDataset.load([data])[:num_rows])
    longest = max(len(ids) for v in views for ids in (v.student_ids, v.partial_ids, v.full_ids))
    if longest > generation.max_prompt_tokens:
        raise ConfigError(
            f"{data}: a view of {longest} tokens and a response of max_response_tokens "
            f"{generation.rollout.max_response_tokens} exceed the model's "
            f"{generation.source.architecture.max_position_embeddings} positions: lower "
            "--max-response-tokens, or views.max_prompt_tokens in --config"
        )
    return DiagnosisSpec(
        replace(generation, output=folder / _name(generation)), views, objective, num_read
    )


def _default_folder(spec: GenerationSpec) -> Path:
    run = run_folder(spec.source)
    if run is None:
        raise ConfigError(f"{spec.source.path}: not a run's checkpoint: specify --out")
    return run / "diagnose"


def _name(spec: GenerationSpec) -> str:
    parts = [spec.prompts.name.partition(".")[0]]
    if spec.role == "teacher":
        parts.append("teacher")
    if spec.weight_version is not None:
        parts.append(f"step{spec.weight_version}")
    return "-".join(parts) + ".json"
