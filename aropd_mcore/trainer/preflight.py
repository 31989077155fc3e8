"""Checks of everything that a run opens before it builds models.

They cover rows, headers of the weights, tokenizer, chat template and output_dir. The run itself,
`aropd train --dry-run` and `aropd launch` share them. They need neither Megatron nor a GPU, so a
login node finds the same errors as the job.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.manifest import iterations, parse_step, problems, read_manifest
from aropd_mcore.convert.source import HFSource
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.records import DataError
from aropd_mcore.data.tokenizer import eos_token_ids, load_tokenizer
from aropd_mcore.data.views import PromptTooLong, ViewBuilder
from aropd_mcore.evaluation.validation_set import ValidationProblem, read_validation_set
from aropd_mcore.trainer.resume_policy import check_changes, describe_run
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
    notes: tuple[str, ...]
    """Notes for the user, one sentence each, such as the number of rows whose residual is zero."""


def open_inputs(config: Config) -> Inputs:
    """Open and check the inputs of a run.

    Raises:
        ConfigError: a template or tokenizer is unusable, or num_epochs gives less than one step.
        CheckpointError: a weight is missing, or its shape differs from config.json.
        DataError: a file or row is invalid, or no row is left.
    """
    path = config.model.path
    source = HFSource(path)
    tokenizer = load_tokenizer(path)
    builder = ViewBuilder(tokenizer, config.views, vocab_size=source.architecture.vocab_size)
    ends = eos_token_ids(path, tokenizer)
    rows = RowDataset.load(config.data.train, on_bad_row=config.data.on_bad_row)
    dataset, notes = _usable_rows(rows, builder, config)
    return Inputs(
        source,
        tokenizer,
        builder,
        ends,
        dataset,
        read_validation_set(config, builder, source.architecture.max_position_embeddings),
        num_steps=config.training.num_steps or _count_epoch_steps(config, len(dataset)),
        about=describe_run(config, dataset, builder.identity),
        notes=(*builder.notes, *notes),
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
    """Format the number of rows, and the number of left out rows with the first reason."""
    if not dataset.num_bad_rows:
        return f"{len(dataset)} rows"
    left_out = f"{dataset.num_bad_rows} left out, first: {dataset.bad_rows[0]}"
    return f"{len(dataset)} rows ({left_out})"


def _usable_rows(
    dataset: RowDataset, builder: ViewBuilder, config: Config
) -> tuple[RowDataset, list[str]]:
    """Return the rows whose prompts fit, and notes about them. No other row may stop the run later.

    With views.on_long_prompt "drop" or data.on_bad_row "skip", a row that does not fit is moved to
    the bad_rows of the result.

    Raises:
        DataError: a row does not fit and neither setting is active, or no row with a weight above 0
            is left.
    """
    rows, bad_rows, notes = [], list(dataset.bad_rows), _RowNotes(config, builder)
    lenient = config.views.on_long_prompt == "drop" or config.data.on_bad_row == "skip"
    for row in dataset:
        try:
            notes.add(builder.build(row))
            rows.append(row)
        except PromptTooLong as error:
            if not lenient:
                raise
            bad_rows.append(error)
    where = str(Path(config.data.train[0]))
    if not rows:
        raise DataError(where, "no row's prompts fit", str(bad_rows[0]))
    if not any(row.sample_weight > 0 for row in rows):
        raise DataError(where, "expected a row with a sample_weight above 0", "0 in all rows")
    return RowDataset(rows, bad_rows), notes.sentences()


class _RowNotes:
    """Statistics of the rows' views, as notes for the user."""

    def __init__(self, config: Config, builder: ViewBuilder):
        self._config = config
        self._builder = builder
        self._num_rows = 0
        self._longest = 0
        self._cut: list[str] = []
        """Origins of the rows with a cut prompt."""
        self._equal: list[str] = []
        """Origins of the rows whose partial view equals the full view."""
        self._truncated: list[str] = []
        """Origins of the rows whose trace, as the response of sft, is cut."""
        self._without_thoughts: list[str] = []
        """Origins of the rows whose earlier turns lose their thoughts."""

    def add(self, views: Views) -> None:
        self._num_rows += 1
        prompts = (views.student_ids, views.partial_ids, views.full_ids)
        self._longest = max(self._longest, *map(len, prompts))
        if views.num_cut_tokens:
            self._cut.append(views.row.origin)
        if views.partial_ids == views.full_ids:
            self._equal.append(views.row.origin)
        if self._builder.loses_thoughts(views.row):
            self._without_thoughts.append(views.row.origin)
        if self._config.objective.name == "sft":
            response = self._builder.oracle_response_ids(views.row)
            if len(response) > self._config.rollout.max_response_tokens:
                self._truncated.append(views.row.origin)

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
        if self._equal and len(config.objective.views) == 2:
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
