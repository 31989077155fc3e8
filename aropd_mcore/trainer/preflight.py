"""Everything that a run opens before it builds models: data, weights' headers, tokenizer, output.

The run itself, `aropd train --dry-run` and `aropd launch` share these checks. No Megatron is
imported and no GPU is needed, so a login node finds what the job would find.
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
from aropd_mcore.trainer.resume_policy import check_changes, describe_run
from aropd_mcore.types import Views

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked."""

    source: HFSource
    """Headers of the model's weights."""
    tokenizer: "PreTrainedTokenizerBase"
    view_builder: ViewBuilder
    eos_token_ids: tuple[int, ...]
    dataset: RowDataset
    """Rows whose prompts fit."""
    num_steps: int
    about: dict[str, Any]
    """Description of the run for its checkpoints (trainer.resume_policy.describe_run)."""
    notes: tuple[str, ...]
    """Sentences for the user to read once, such as rows whose residual is zero."""


def open_inputs(config: Config) -> Inputs:
    """Open and check what a run reads.

    Raises:
        ConfigError: A template or a tokenizer cannot be used, or an epoch has no step.
        CheckpointError: A weight is missing, or has another shape than config.json describes.
        DataError: A file or row cannot be used, or no row is left.
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
        num_steps=config.training.num_steps or _steps_of_epochs(config, len(dataset)),
        about=describe_run(config, dataset, builder.identity),
        notes=(*builder.notes, *notes),
    )


def preflight(config: Config, *, same_environment: bool = True) -> list[str]:
    """Check what a run would open, read and write, without a change on the disk.

    Args:
        same_environment: The run uses this interpreter, so its packages are checked too.
    Returns:
        What was found, one sentence each.
    Raises:
        ValueError: The run could not start; the message is what the run would print.
    """
    if same_environment:
        check_packages(config)
    for folder in (".", "checkpoints", "hf"):
        _check_writable(config.output_dir / folder)
    inputs = open_inputs(config)
    steps = f"{inputs.num_steps} steps of {config.training.global_batch_size} responses"
    return [f"{describe_rows(inputs.dataset)}, {steps}", *inputs.notes, *_start(config, inputs)]


def check_packages(config: Config) -> None:
    """Check that the optional packages which the settings ask for are installed.

    Raises:
        ConfigError: One is not; the message says how to install it.
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
    """The number of rows, and which were left out and why."""
    if not dataset.num_bad_rows:
        return f"{len(dataset)} rows"
    left_out = f"{dataset.num_bad_rows} left out, first: {dataset.bad_rows[0]}"
    return f"{len(dataset)} rows ({left_out})"


def _usable_rows(
    dataset: RowDataset, builder: ViewBuilder, config: Config
) -> tuple[RowDataset, list[str]]:
    """The rows whose prompts fit, so that no row can stop the run later on, and notes about them.

    A row that does not fit is left out, and is among the result's bad_rows, with
    views.on_long_prompt "drop" or data.on_bad_row "skip".

    Raises:
        DataError: A row does not fit and neither setting lets it go, or no row is left that
            counts in the loss.
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
    """Counts over the rows' views, for the user."""

    def __init__(self, config: Config, builder: ViewBuilder):
        self._config = config
        self._builder = builder
        self._num_rows = 0
        self._longest = 0
        self._cut: list[str] = []
        """Origins of the rows of which a prompt is cut."""
        self._equal: list[str] = []
        """Origins of the rows whose partial view is the full view."""
        self._truncated: list[str] = []
        """Origins of the rows whose trace is cut, where the trace is the response."""

    def add(self, views: Views) -> None:
        self._num_rows += 1
        prompts = (views.student_ids, views.partial_ids, views.full_ids)
        self._longest = max(self._longest, *map(len, prompts))
        if views.num_cut_tokens:
            self._cut.append(views.row.origin)
        if views.partial_ids == views.full_ids:
            self._equal.append(views.row.origin)
        if self._config.objective.name == "sft":
            response = self._builder.oracle_response_ids(views.row)
            if len(response) > self._config.rollout.max_response_tokens:
                self._truncated.append(views.row.origin)

    def sentences(self) -> list[str]:
        config, found = self._config, []
        limit, response = config.views.max_prompt_tokens, config.rollout.max_response_tokens
        found.append(
            f"longest prompt: {self._longest} tokens of views.max_prompt_tokens {limit}; responses "
            f"have up to {response}"
        )
        if self._cut:
            part = "chat" if config.views.on_long_prompt == "cut_chat" else "question"
            found.append(
                f"the {part} of {self._of_all(self._cut)} is cut to fit "
                f"views.max_prompt_tokens; first: {self._cut[0]}"
            )
        if self._equal and len(config.objective.views) == 2:
            found.append(
                f"the partial view of {self._of_all(self._equal)} equals the full view, so their "
                f"residual is zero; first: {self._equal[0]}"
            )
        skip = config.objective.skip_response_tokens
        if skip >= response and not config.objective.has_prompt_loss:
            found.append(
                f"no token counts in the loss, so every step will be skipped: "
                f"objective.skip_response_tokens {skip} is not less than "
                f"rollout.max_response_tokens {response}; lower the former"
            )
        if self._truncated:
            found.append(
                f"the trace of {self._of_all(self._truncated)} is cut to "
                f"rollout.max_response_tokens, and does not end; first: {self._truncated[0]}"
            )
        return found

    def _of_all(self, origins: list[str]) -> str:
        return f"{len(origins)} of {self._num_rows} rows"


def _steps_of_epochs(config: Config, num_rows: int) -> int:
    assert config.training.num_epochs is not None
    num_steps = config.training.num_epochs * num_rows // config.prompts_per_step
    if num_steps == 0:
        raise ConfigError(
            f"{config.training.num_epochs} epochs of {num_rows} rows are less than one step of "
            f"{config.prompts_per_step} prompts; lower training.global_batch_size"
        )
    return num_steps


def _check_writable(folder: Path) -> None:
    """Check that the folder can be written to, or made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output_dir: {nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir: {nearest} cannot be written to")


def _start(config: Config, inputs: Inputs) -> list[str]:
    """Where the run would start, as far as manifests and sizes of files tell.

    Raises:
        CheckpointError: There are checkpoints, and none is whole.
        ConfigError: The newest is of another run.
    """
    folder, notes = config.output_dir / "checkpoints", []
    candidates = iterations(folder)
    for path in candidates:
        wrong = problems(path, with_sums=False)
        if wrong:
            notes.append(f"{wrong[0]}; the run will set this checkpoint aside")
            continue
        changes = check_changes(read_manifest(path), inputs.about, config.checkpoint.allow_changes)
        step = parse_step(path)
        left = "" if step < inputs.num_steps else ", which is the end: no step is left"
        return [*notes, f"the run will resume at step {step} from {path}{left}", *changes]
    if candidates or list(folder.glob("iter_*.corrupt*")):
        lines = [f"\n  {note}" for note in notes]
        raise CheckpointError(
            f"{folder}: none of the checkpoints is whole; put one back that is, or move the "
            f"folder away to start from step 0{''.join(lines)}"
        )
    return ["the run will start at step 0: there is no checkpoint yet"]
