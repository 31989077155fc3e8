"""Checks of everything that a run opens before it builds models.

They cover rows, headers of the weights, tokenizer, chat template and output_dir. The run itself,
`aropd train --dry-run` and `aropd launch` share them. They need neither Megatron nor a GPU, so a
login node finds the same errors as the job.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib.util import find_spec
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.manifest import iterations, parse_step, problems, read_manifest
from aropd_mcore.convert.source import HFSource
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.ranks import OneRank, Ranks, load_in_turn, raise_first, share_of
from aropd_mcore.data.records import DataError
from aropd_mcore.data.tokenizer import eos_token_ids, load_tokenizer
from aropd_mcore.data.views import PromptTooLong, ViewBuilder
from aropd_mcore.evaluation.validation_set import ValidationProblem, read_validation_set
from aropd_mcore.trainer.adapter import AdapterInputs, open_adapter
from aropd_mcore.trainer.resume_policy import check_changes, describe_run
from aropd_mcore.trainer.row_groups import describe_groups
from aropd_mcore.trainer.teacher_model import TeacherModel, open_teacher_models
from aropd_mcore.types import Views

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run, opened and checked."""

    source: HFSource
    """Headers of the model's weights."""
    tokenizer: "PreTrainedTokenizerBase"
    view_builder: ViewBuilder
    eos_token_ids: tuple[int, ...]
    dataset: RowDataset
    """Rows whose prompts fit views.max_prompt_tokens."""
    problems: list[ValidationProblem]
    """Problems of validation."""
    num_steps: int
    about: dict[str, Any]
    """Description of the run for its checkpoints (trainer.resume_policy.describe_run)."""
    teachers: dict[str, TeacherModel]
    """Checkpoints of the teachers of kind `model` by name."""
    adapter: AdapterInputs | None
    notes: tuple[str, ...]
    """Notes for the user, one sentence each, such as the number of rows whose residual is zero."""


def open_inputs(config: Config, ranks: Ranks | None = None) -> Inputs:
    """Open and check the inputs of a run.

    Every rank reads all rows, but builds the prompts of its share only.

    Args:
        ranks: processes that share the checks of the rows. None: this process only.
    Raises:
        ConfigError: a template or tokenizer is unusable, num_epochs gives less than one step, or
            a teacher's checkpoint or the adapter cannot be used.
        CheckpointError: a weight is missing, or its shape differs from config.json.
        DataError: a file or row is invalid, or no row is left. An invalid row raises the same error
            on every rank.
    Collectives: gathers of `ranks`. Every rank must call it.
    """
    ranks = ranks or OneRank()
    path = config.model.path
    source = HFSource(path)
    if (
        isinstance(source.config.quantization, tuple)
        and config.rollout.engine == "vllm"
        and not config.rollout.vllm.urls
    ):
        raise ConfigError(
            f"rollout.engine vllm: {path} has FP8 weights, which servers would keep, and updates "
            "are in bf16; expected a folder in bf16: write it with `aropd convert import` and "
            "`export`, and set model.path to it"
        )
    tokenizer = load_tokenizer(path)
    builder = ViewBuilder(
        tokenizer,
        config.views,
        vocab_size=source.architecture.vocab_size,
        is_privileged=config.has_privileged_views,
    )
    teachers = open_teacher_models(config, source.architecture, builder)
    adapter = open_adapter(config, source)
    ends = eos_token_ids(path, tokenizer)
    rows = load_in_turn(
        ranks,
        lambda: RowDataset.load(
            config.data.train, on_bad_row=config.data.on_bad_row, teachers=config.row_teachers
        ),
        config.data.paths,
    )
    dataset, notes = _usable_rows(rows, builder, config, ranks)
    max_positions = source.architecture.max_tokens(config.parallel.context)
    problems, more_notes = read_validation_set(config, builder, max_positions, ranks)
    return Inputs(
        source,
        tokenizer,
        builder,
        ends,
        dataset,
        problems,
        num_steps=config.training.num_steps or _count_epoch_steps(config, dataset.epoch_length),
        about=describe_run(
            config,
            dataset,
            builder.identity,
            teacher_fingerprints={name: t.fingerprint for name, t in teachers.items()},
            base_fingerprint=adapter.base_fingerprint if adapter else None,
        ),
        teachers=teachers,
        adapter=adapter,
        notes=(*builder.notes, *describe_groups(config, dataset), *notes, *more_notes),
    )


def preflight(config: Config, *, same_environment: bool = True) -> list[str]:
    """Check everything that a run would open, read and write. Nothing on the disk is changed.

    Args:
        same_environment: whether the run uses this interpreter. If so, check its packages.
    Returns:
        Summary and notes, one sentence each.
    Raises:
        ValueError: the run could not start. The message is the one that the run would print.
    """
    if same_environment:
        check_packages(config)
    for folder in (".", "checkpoints", "hf"):
        _check_writable(config.output_dir / folder)
    inputs = open_inputs(config)
    steps = f"{inputs.num_steps} steps of {config.training.global_batch_size} responses"
    validation = [f"validation: {len(inputs.problems)} problems"] if inputs.problems else []
    return [
        f"{describe_rows(inputs.dataset)}, {steps}",
        *_describe_sources(inputs.dataset),
        *validation,
        *inputs.notes,
        *_describe_start(config, inputs),
    ]


def check_packages(config: Config) -> None:
    """Check that the optional packages that the settings need are installed.

    Raises:
        ConfigError: a package is missing. The message states how to install it.
    """
    wanted = {"tensorboard": config.logging.tensorboard, "wandb": config.logging.wandb != "off"}
    for package, is_wanted in wanted.items():
        if is_wanted and not _is_installed(package):
            raise ConfigError(
                f"logging.{package} is on, but the package {package} is not installed: "
                f"pip install 'aropd-mcore[{package}]'"
            )
    vllm = config.rollout.vllm
    if config.objective.name == "sft" or config.rollout.engine != "vllm" or vllm.urls:
        return
    if vllm.python is None and not _is_installed("vllm"):
        raise ConfigError(
            f"rollout.vllm.python is null, and {sys.executable} has no vllm; set it to an "
            "interpreter that has vllm, or set rollout.vllm.urls to running servers"
        )
    if vllm.python is not None and shutil.which(vllm.python) is None:
        raise ConfigError(
            f"rollout.vllm.python {vllm.python}: no such program; expected the interpreter of an "
            "environment that has vllm"
        )


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    # A folder of that name, such as W&B's own logs, counts as a package without an origin.
    return spec is not None and spec.origin is not None


def describe_rows(dataset: RowDataset) -> str:
    """Format the numbers of rows, of rows per epoch, and of left out rows with the first reason."""
    parts = []
    if dataset.has_weights:
        parts.append(f"{dataset.epoch_length} per epoch")
    if dataset.num_bad_rows:
        parts.append(f"{dataset.num_bad_rows} left out, first: {dataset.bad_rows[0]}")
    return f"{len(dataset)} rows" + (f" ({'; '.join(parts)})" if parts else "")


def _describe_sources(dataset: RowDataset) -> list[str]:
    """Describe each source of rows. Empty for one source without a weight."""
    if len(dataset.sources) == 1 and not dataset.has_weights:
        return []
    return [
        f"{source.name}: {source.num_rows} rows"
        + (f", {source.num_drawn} per epoch (weight {source.weight:g})" * (source.weight != 1))
        for source in dataset.sources
    ]


def _usable_rows(
    dataset: RowDataset, builder: ViewBuilder, config: Config, ranks: Ranks
) -> tuple[RowDataset, list[str]]:
    """Return the rows whose prompts fit, and notes about them. No other row may stop the run later.

    With views.on_long_prompt "drop" or data.on_bad_row "skip", a row that does not fit is moved to
    the bad_rows of the result.

    Raises:
        DataError: a row does not fit and neither setting is active, no row with a weight above 0 is
            left, or a source's weight draws none of its rows. Raised on every rank.
    Collectives: one gather of `ranks`, of the rows to leave out and of statistics.
    """
    lenient = config.views.on_long_prompt == "drop" or config.data.on_bad_row == "skip"
    counts = _RowCounts()
    dropped: dict[int, DataError] = {}
    error: tuple[int, DataError] | None = None
    for index, row in share_of(ranks, dataset, "rows"):
        try:
            counts.add(index, builder.build_each(row), builder, config)
        except DataError as problem:
            if not (lenient and isinstance(problem, PromptTooLong)):
                error = (index, problem)
                break
            dropped[index] = problem
    parts = ranks.gather((counts, dropped, error))
    raise_first(error for _, _, error in parts if error)
    origins = [row.origin for row in dataset]
    notes = _RowNotes(config, reduce(add, (counts for counts, _, _ in parts)), origins)
    dataset = dataset.without({i: e for _, dropped, _ in parts for i, e in dropped.items()})
    _check_weights(dataset)
    return dataset, notes.sentences()


def _check_weights(dataset: RowDataset) -> None:
    """Check that the usable rows and each source's share of an epoch are not empty."""
    first = dataset.sources[0].name
    if not len(dataset):
        raise DataError(first, "no row's prompts fit", str(dataset.bad_rows[0]))
    if not any(row.sample_weight > 0 for row in dataset):
        raise DataError(first, "expected a row with a sample_weight above 0", "0 in all rows")
    for source in dataset.sources:
        if source.num_rows and not source.num_drawn:
            problem = "data.train: expected a weight that draws at least one row per epoch"
            found = f"weight {source.weight:g} of {source.num_rows} rows"
            raise DataError(source.name, problem, found)


@dataclass
class _RowCounts:
    """Statistics of the views of one rank's rows."""

    num_rows: int = 0
    longest: int = 0
    cut: list[int] = field(default_factory=list)
    """Indices of the rows with a cut prompt."""
    equal: list[int] = field(default_factory=list)
    """Indices of the rows whose partial view equals the full view, at every ratio."""
    truncated: list[int] = field(default_factory=list)
    """Indices of the rows whose trace, as the response of sft, is cut."""
    without_thoughts: list[int] = field(default_factory=list)
    """Indices of the rows whose earlier turns lose their thoughts."""

    def add(self, index: int, views: Sequence[Views], builder: ViewBuilder, config: Config) -> None:
        """Count a row.

        Args:
            views: its views at every ratio.
        """
        self.num_rows += 1
        prompts = [ids for v in views for ids in (v.student_ids, v.partial_ids, v.full_ids)]
        self.longest = max(self.longest, *map(len, prompts))
        if any(v.num_cut_tokens for v in views):
            self.cut.append(index)
        if all(v.partial_ids == v.full_ids for v in views):
            self.equal.append(index)
        if builder.loses_thoughts(views[0].row):
            self.without_thoughts.append(index)
        if config.objective.name == "sft":
            response = builder.oracle_response_ids(views[0].row)
            if len(response) > config.rollout.max_response_tokens:
                self.truncated.append(index)

    def __add__(self, other: "_RowCounts") -> "_RowCounts":
        return _RowCounts(
            self.num_rows + other.num_rows,
            max(self.longest, other.longest),
            self.cut + other.cut,
            self.equal + other.equal,
            self.truncated + other.truncated,
            self.without_thoughts + other.without_thoughts,
        )


class _RowNotes:
    """Statistics of the rows' views, as notes for the user."""

    def __init__(self, config: Config, counts: _RowCounts, origins: Sequence[str]):
        self._config = config
        self._num_rows = counts.num_rows
        self._longest = counts.longest
        self._cut, self._equal, self._truncated, self._without_thoughts = (
            [origins[index] for index in sorted(indices)]
            for indices in (counts.cut, counts.equal, counts.truncated, counts.without_thoughts)
        )

    def sentences(self) -> list[str]:
        config, notes = self._config, []
        limit, response = config.views.max_prompt_tokens, config.rollout.max_response_tokens
        notes.append(
            f"longest prompt: {self._longest} of {limit} tokens (views.max_prompt_tokens); "
            f"responses: up to {response} tokens"
        )
        if self._cut:
            part = "chat" if config.views.on_long_prompt == "cut_chat" else "question"
            notes.append(
                f"the {part} of {self._of_all(self._cut)} is cut to fit "
                f"views.max_prompt_tokens; first: {self._cut[0]}"
            )
        if self._equal and config.has_privileged_views and len(config.objective.views) == 2:
            notes.append(
                f"the partial view of {self._of_all(self._equal)} equals the full view, so their "
                f"residual is zero; first: {self._equal[0]}"
            )
        skip = config.objective.skip_response_tokens
        if skip >= response and not config.objective.has_prompt_loss:
            notes.append(
                f"no token counts in the loss, so all updates will be skipped: "
                f"objective.skip_response_tokens is {skip}, expected less than "
                f"rollout.max_response_tokens {response}"
            )
        if self._truncated:
            notes.append(
                f"the trace of {self._of_all(self._truncated)} is cut to "
                f"rollout.max_response_tokens, without its end; first: {self._truncated[0]}"
            )
        if self._without_thoughts:
            notes.append(
                "the chat template removes the thoughts of earlier assistant turns in "
                f"{self._of_all(self._without_thoughts)}; first: {self._without_thoughts[0]}"
            )
        return notes

    def _of_all(self, origins: list[str]) -> str:
        return f"{len(origins)} of {self._num_rows} rows"


def _count_epoch_steps(config: Config, num_rows: int) -> int:
    assert config.training.num_epochs is not None
    num_steps = config.training.num_epochs * num_rows // config.prompts_per_step
    if num_steps == 0:
        raise ConfigError(
            f"training.num_epochs {config.training.num_epochs} of {num_rows} rows: fewer than one "
            f"step of {config.prompts_per_step} prompts; lower training.global_batch_size"
        )
    return num_steps


def _check_writable(folder: Path) -> None:
    """Check that the folder can be created or written to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output_dir: {nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir: {nearest} is not writable")


def _describe_start(config: Config, inputs: Inputs) -> list[str]:
    """Describe where the run would start. Checkpoints are judged by manifests and file sizes only.

    Raises:
        CheckpointError: there are checkpoints, but no intact one.
        ConfigError: the newest checkpoint belongs to another run.
    """
    folder, notes = config.output_dir / "checkpoints", []
    candidates = iterations(folder)
    for path in candidates:
        damage = problems(path, with_sums=False)
        if damage:
            notes.append(f"{damage[0]}; the run will set this checkpoint aside")
            continue
        changes = check_changes(read_manifest(path), inputs.about, config.checkpoint.allow_changes)
        step = parse_step(path)
        end = "" if step < inputs.num_steps else "; no step is left"
        return [*notes, f"the run will resume at step {step} from {path}{end}", *changes]
    if candidates or list(folder.glob("iter_*.corrupt*")):
        lines = [f"\n  {note}" for note in notes]
        raise CheckpointError(
            f"{folder}: none of the checkpoints is intact; restore an intact one, or move the "
            f"folder away to start from step 0{''.join(lines)}"
        )
    return ["the run will start at step 0: there is no checkpoint"]
