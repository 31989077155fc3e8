"""Resume, step, log, save, stop."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aropd_mcore.config import Config
from aropd_mcore.config_file import dump_config
from aropd_mcore.convert.convert import keep_companions
from aropd_mcore.convert.source import HF_FOLDER, HFSource
from aropd_mcore.mcore.checkpoint import SaveFailed
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.plan.layout import describe
from aropd_mcore.rollout.engine import RolloutFailed
from aropd_mcore.rollout.vllm import VllmEngine
from aropd_mcore.trainer.build import build_run
from aropd_mcore.trainer.metrics import Metrics, MetricsLog, step_metrics
from aropd_mcore.trainer.saving import Counters, Saver
from aropd_mcore.trainer.step import Run, StepResult, train_step


class TrainingStopped(RuntimeError):
    """The run cannot usefully go on; the message says why and where the last checkpoint is."""


def train(config: Config, runtime: Runtime) -> None:
    """Train until num_steps, from the newest checkpoint under config.output_dir if there is one.

    Writes to output_dir: config.yaml (resolved), metrics.jsonl, checkpoints/, and hf/ with the
    model's config and tokenizer, which an export needs.

    Raises:
        TrainingStopped: too many steps in a row had a non-finite loss or gradient; no checkpoint
            can be written; or there is nobody left who could sample: the steps so far are saved
            first.
        CheckpointError, ConfigError: the checkpoints there cannot be gone on from.
    Collectives: every rank of the job must call it.
    """
    run = build_run(config, runtime)
    try:
        _train(run)
    finally:
        if run.engine:
            run.engine.close()


def _train(run: Run) -> None:
    config, runtime = run.config, run.runtime
    saver = Saver(run)
    resumed, notes = saver.resume()
    first_step, num_skipped, weight_version = 0, 0, 0
    if resumed is not None:
        first_step, num_skipped = resumed["step"], resumed["num_skipped_in_a_row"]
        weight_version = resumed["weight_version"]

    def progress(num_done: int) -> dict[str, Any]:
        return {
            "step": num_done,
            "num_skipped_in_a_row": num_skipped,
            "weight_version": run.engine.weight_version if run.engine else num_done,
        }

    with Reporter(run, first_step) as reporter:
        saver.say = reporter.say
        for note in notes:
            reporter.say(note)
        if run.engine:
            run.engine.sync(weight_version=weight_version)
        for step in range(first_step, run.num_steps):
            try:
                result = train_step(run, step)
            except RolloutFailed as failed:
                # Of this step nothing has happened yet.
                _save_now(saver, step, progress(step))
                raise TrainingStopped(
                    f"no rollouts for step {step}: {failed}\nThe last checkpoint is "
                    f"{saver.newest or 'none'}; the same command goes on from there."
                ) from failed
            num_skipped = 0 if result.update.applied else num_skipped + 1
            # Before the checkpoint: a kill between the two loses no line that is not cut back.
            metrics = step_metrics(step, result, run.view_builder.tokenizer, runtime)
            reporter.report(metrics, blocked_seconds=saver.blocked_seconds())
            if num_skipped >= config.training.max_skipped_steps:
                raise TrainingStopped(_why_stopped(result, step, num_skipped, saver.newest))
            try:
                saver.after_step(step + 1, progress(step + 1))
            except SaveFailed as failed:
                raise _cannot_save(saver, failed) from failed
        _save_now(saver, run.num_steps, progress(run.num_steps))


def _save_now(saver: Saver, num_done: int, progress: Counters) -> None:
    try:
        saver.save_now(num_done, progress)
    except SaveFailed as failed:
        raise _cannot_save(saver, failed) from failed


def _cannot_save(saver: Saver, failed: SaveFailed) -> TrainingStopped:
    return TrainingStopped(
        f"could not save: {failed}\nThe last checkpoint is {saver.newest or 'none'}; the same "
        "command goes on from there."
    )


def _why_stopped(result: StepResult, step: int, num_skipped: int, last: Path | None) -> str:
    loss = float(result.sums["loss"].sum())
    return (
        f"{num_skipped} steps in a row, up to step {step}, had no finite loss and gradient "
        f"(loss {loss}, gradient norm {result.update.grad_norm}); no update was applied for them. "
        f"The last checkpoint is {last or 'none'}. A lower optimizer.lr or a residual_clip often "
        "helps; the limit is training.max_skipped_steps."
    )


class Reporter:
    """Metrics to files and progress to the screen, on rank 0; elsewhere it does nothing."""

    def __init__(self, run: Run, first_step: int):
        self._run = run
        self._first_step = first_step
        self._is_here = run.runtime.rank == 0
        self._console = Console(file=sys.stdout, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.fields[what]}"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            # Where nobody watches, a line a step says more than a bar.
            disable=not (self._is_here and self._console.is_terminal),
        )

    def __enter__(self) -> "Reporter":
        if self._is_here:
            config = self._run.config
            config.output_dir.mkdir(parents=True, exist_ok=True)
            (config.output_dir / "config.yaml").write_text(dump_config(config))
            dtype = self._run.runtime.dtype(config.model.dtype)
            keep_companions(HFSource(config.model.path), config.output_dir / HF_FOLDER, dtype)
            self._log = MetricsLog(config, first_step=self._first_step)
            self._console.print(_headline(self._run, self._first_step))
            self._task = self._progress.add_task(
                "", total=self._run.num_steps, completed=self._first_step, what="step"
            )
            if isinstance(self._run.engine, VllmEngine):
                self._rollouts = self._progress.add_task("", total=None, what="rollout")
                self._run.engine.on_response = self._show_rollouts
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._is_here:
            self._log.close()

    def say(self, text: str) -> None:
        """A line that is no step's."""
        if self._is_here:
            self._console.print(text, markup=False)

    def report(self, metrics: Metrics, *, blocked_seconds: float) -> None:
        """Write one step's metrics, with the time that saves have taken from it."""
        if not self._is_here:
            return
        metrics["seconds/checkpoint"] = blocked_seconds
        self._log.write(metrics)
        line = _step_line(metrics)
        self._progress.update(self._task, advance=1, description=line)
        if self._progress.disable:
            self._console.print(f"step {metrics['step'] + 1}/{self._run.num_steps}  {line}")

    def _show_rollouts(self, num_done: int, num_all: int) -> None:
        self._progress.update(self._rollouts, completed=num_done, total=num_all)


def _headline(run: Run, first_step: int) -> str:
    config, runtime = run.config, run.runtime
    dtype = str(runtime.dtype(config.model.dtype)).removeprefix("torch.")
    layout = describe(config.parallel, runtime.dp_size)
    rows = f"{len(run.dataset)} rows"
    if run.dataset.num_bad_rows:
        rows += f" ({run.dataset.num_bad_rows} left out, first: {run.dataset.bad_rows[0]})"
    start = f"resuming at step {first_step}" if first_step else "starting"
    return (
        f"{start}: {config.objective.name}, {config.model.path} in {dtype} on "
        f"{runtime.device.type}, {layout}\n"
        f"{rows}, {run.num_steps} steps of {config.training.global_batch_size} responses, "
        f"{config.objective.reduction}, templates {run.view_builder.template_hash}; "
        f"writing to {config.output_dir}"
    )


def _step_line(metrics: Metrics) -> str:
    parts = [f"loss {metrics['loss']:.4f}", f"grad norm {metrics['grad_norm']:.3f}"]
    if "kl_full_student" in metrics:
        parts.append(f"KL(f||s) {metrics['kl_full_student']:.4f}")
        parts.append(f"hindsight {metrics['hindsight_token_rate']:.1%}")
    parts.append(f"length {metrics['response_length_mean']:.0f}")
    parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
    if metrics["step_skipped"]:
        parts.append("SKIPPED: not finite")
    return "  ".join(parts)
