"""Resume, step, log, save, stop."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aropd_mcore.config import Config
from aropd_mcore.config_file import dump_config
from aropd_mcore.convert.convert import keep_companions
from aropd_mcore.convert.source import HF_FOLDER, HFSource
from aropd_mcore.mcore import checkpoint
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.plan.layout import describe
from aropd_mcore.rollout.engine import RolloutFailed
from aropd_mcore.rollout.vllm import VllmEngine
from aropd_mcore.trainer.build import build_run
from aropd_mcore.trainer.metrics import Metrics, MetricsLog, step_metrics
from aropd_mcore.trainer.step import Run, StepResult, train_step


class TrainingStopped(RuntimeError):
    """The run cannot usefully go on; the message says why and where the last checkpoint is."""


def train(config: Config, runtime: Runtime) -> None:
    """Train until num_steps, from the newest checkpoint under config.output_dir if there is one.

    Writes to output_dir: config.yaml (resolved), metrics.jsonl, checkpoints/, and hf/ with the
    model's config and tokenizer, which an export needs.

    Raises:
        TrainingStopped: too many steps in a row had a non-finite loss or gradient; or there is
            nobody left who could sample: the steps so far are saved first.
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
    folder = config.output_dir / "checkpoints"
    num_skipped, first_step = 0, 0
    newest = checkpoint.newest(folder)
    if newest is not None:
        progress = checkpoint.load(newest, run.student, run.teacher, runtime)
        first_step, num_skipped = progress["step"], progress["num_skipped_in_a_row"]
    num_saved = first_step

    def save(num_done: int) -> None:
        nonlocal num_saved
        with reporter.saving():
            checkpoint.save(
                folder,
                num_done,
                run.student,
                run.teacher,
                {"step": num_done, "num_skipped_in_a_row": num_skipped},
                runtime,
                keep_last=config.checkpoint.keep_last,
            )
        num_saved = num_done

    with Reporter(run, first_step) as reporter:
        if run.engine:
            run.engine.sync(weight_version=first_step)
        for step in range(first_step, run.num_steps):
            try:
                result = train_step(run, step)
            except RolloutFailed as failed:
                # Of this step nothing has happened yet.
                if num_saved < step:
                    save(step)
                last = checkpoint.newest(folder)
                raise TrainingStopped(
                    f"no rollouts for step {step}: {failed}\nThe last checkpoint is "
                    f"{last or 'none'}; the same command goes on from there."
                ) from failed
            num_skipped = 0 if result.update.applied else num_skipped + 1
            # Before the checkpoint: a kill between the two loses no line that is not cut back.
            reporter.report(step_metrics(step, result, run.view_builder.tokenizer, runtime))
            if num_skipped >= config.training.max_skipped_steps:
                raise TrainingStopped(_why_stopped(result, step, num_skipped, folder))
            num_done = step + 1
            if num_done == run.num_steps or num_done % config.checkpoint.save_every_steps == 0:
                save(num_done)


def _why_stopped(result: StepResult, step: int, num_skipped: int, folder: Path) -> str:
    loss = float(result.sums["loss"].sum())
    last = checkpoint.newest(folder)
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
        self._save_seconds: float | None = None
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

    def report(self, metrics: Metrics) -> None:
        """Write one step's metrics, with the time of the save before it."""
        if not self._is_here:
            return
        if self._save_seconds is not None:
            metrics["seconds/checkpoint"], self._save_seconds = self._save_seconds, None
        self._log.write(metrics)
        line = _step_line(metrics)
        self._progress.update(self._task, advance=1, description=line)
        if self._progress.disable:
            self._console.print(f"step {metrics['step'] + 1}/{self._run.num_steps}  {line}")

    def _show_rollouts(self, num_done: int, num_all: int) -> None:
        self._progress.update(self._rollouts, completed=num_done, total=num_all)

    @contextmanager
    def saving(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._save_seconds = time.perf_counter() - started


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
