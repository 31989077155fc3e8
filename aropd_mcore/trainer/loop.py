"""Training loop: resume, step, log, save, stop."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from aropd_mcore.config import Config
from aropd_mcore.config_file import dump_config
from aropd_mcore.convert.import_export import keep_companions
from aropd_mcore.convert.source import HF_FOLDER, HFSource
from aropd_mcore.data.prepare import write_atomically
from aropd_mcore.heartbeat import beat
from aropd_mcore.locks import RunLock
from aropd_mcore.mcore.checkpoint.directory import SaveFailed
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.plan.layout import describe
from aropd_mcore.rollout.engine import RolloutFailed
from aropd_mcore.trainer.build import build_run
from aropd_mcore.trainer.checkpointing import Counters, Saver
from aropd_mcore.trainer.guards import Verdict
from aropd_mcore.trainer.metrics import Metrics, MetricsLog, step_metrics
from aropd_mcore.trainer.preflight import describe_rows
from aropd_mcore.trainer.samples import SampleLog
from aropd_mcore.trainer.step import Run, train_step
from aropd_mcore.trainer.stop import StoppedEarly, Stops, StopWanted
from aropd_mcore.trainer.timing import time_metrics
from aropd_mcore.trainer.validation import Validator
from aropd_mcore.trainer.validation import describe as describe_validation


class TrainingStopped(RuntimeError):
    """A restart of the run would stop again. The message states why, and the last checkpoint."""


def train(config: Config, runtime: Runtime, stops: Stops | None = None) -> None:
    """Train to the last step, starting from the newest checkpoint in config.output_dir, if any.

    Writes to output_dir: config.yaml (resolved), metrics.jsonl, samples.jsonl (logging.samples),
    checkpoints/, hf/ (the model's config and tokenizer, for exports) and .lock (locks.py).

    Args:
        stops: signals and time limit that stop the run. None: no early stop.
    Raises:
        TrainingStopped: too many updates in a row were skipped, a guard stopped the run, no engine
            can sample, or the time limit leaves no room for one step. The completed steps are saved
            first. Also raised if no checkpoint can be written.
        StoppedEarly: a signal arrived or the time limit is near. The completed steps are saved.
        CheckpointError, ConfigError: the run cannot resume from the existing checkpoints.
        InUse: another run is writing to output_dir.
    Collectives: every rank of the job must call it.
    """
    with _locked(config.output_dir):
        run = build_run(config, runtime, stops)
        try:
            _train(run)
        finally:
            if run.engine:
                run.engine.close()


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    """Hold the lock of output_dir, on rank 0 only, from before the first write to the run's end.

    Raises:
        InUse: another run holds the lock. Raised on every rank.
    Collectives: one broadcast. Every rank must call it.
    """
    locks: list[RunLock] = []
    run_on_rank0(lambda: locks.append(RunLock(output_dir)))
    try:
        yield
    finally:
        for lock in locks:
            lock.close()


def _train(run: Run) -> None:
    runtime = run.runtime
    saver = Saver(run)
    resumed, notes = saver.resume()
    first_step, weight_version = 0, 0
    if resumed is not None:
        first_step, weight_version = resumed["step"], resumed["weight_version"]
        run.guards.load_state(resumed["guards"])

    def progress(num_done: int) -> dict[str, Any]:
        return {
            "step": num_done,
            "guards": run.guards.state(),
            "weight_version": run.source.weight_version,
        }

    with (
        Reporter(run, first_step) as reporter,
        closing(
            SampleLog(run, first_step, send=reporter.send_samples, notify=reporter.notify)
        ) as samples,
        closing(Validator(run, first_step, samples)) as validator,
    ):
        saver.notify = reporter.notify
        saver.before_saving = reporter.sync, samples.sync, validator.sync
        for note in (*run.notes, *notes):
            reporter.notify(note)
        run.source.weights_changed(weight_version)
        step = first_step
        while True:
            try:
                run.stops.longest_save = saver.seconds
                if step < run.num_steps:
                    run.stops.check(runtime, before_step=True)
                _validate(validator, step, run.num_steps, reporter)
                if validator.is_best(step):
                    saver.keep_as_best(step, progress(step))
                if step == run.num_steps or validator.is_exhausted():
                    break
                started = time.perf_counter()
                with run.stops.timing_step():
                    result = train_step(run, step, on_progress=reporter.show_rollouts)
            except (RolloutFailed, StopWanted) as reason:
                # This step has changed nothing yet.
                _save_now(saver, step, progress(step))
                raise _stop_error(reason, step, first_step, saver) from reason
            except SaveFailed as failed:
                raise _cannot_save(saver, failed) from failed
            beat("metrics")
            # Metrics are written before the checkpoint. After a kill in between, the resumed run
            # removes their line and repeats the step.
            metrics = step_metrics(step, result, run.view_builder.tokenizer, runtime)
            for hook in (*run.hooks, samples):
                metrics |= hook.after_step(run, step, result, metrics)
            metrics |= validator.metrics(step)
            validation = validator.seconds_before(step)
            metrics |= time_metrics(
                {**validation, **result.seconds},
                elapsed=time.perf_counter() - started + sum(validation.values()),
                saving=saver.blocked_seconds(),
                num_response_tokens=metrics["num_response_tokens"],
            )
            reporter.report(metrics)
            reporter.warn(step, result.verdict)
            if result.verdict.stop:
                _save_now(saver, step + 1, progress(step + 1))
                raise TrainingStopped(
                    f"step {step}: {result.verdict.stop}. {_last_checkpoint(saver)}."
                )
            try:
                beat("checkpoint")
                saver.after_step(step + 1, progress(step + 1))
            except SaveFailed as failed:
                raise _cannot_save(saver, failed) from failed
            step += 1
        _save_now(saver, step, progress(step))
        if step < run.num_steps:
            reporter.notify(
                f"ended after {step} of {run.num_steps} steps: {run.config.validation.stop_after} "
                "validations in a row without a new highest accuracy (validation.stop_after)"
            )


def _validate(validator: Validator, num_updates: int, num_steps: int, reporter: "Reporter") -> None:
    """Validate the weights after `num_updates` updates, if that is due."""
    if not validator.is_due(num_updates):
        return
    result = validator.validate(num_updates)
    reporter.report_validation(
        num_updates,
        describe_validation(result),
        validator.metrics(num_updates),
        is_last=num_updates == num_steps or validator.is_exhausted(),
    )
    for warning in validator.warnings(result):
        reporter.notify(f"WARNING: {warning}")


def _stop_error(
    reason: RolloutFailed | StopWanted, step: int, first_step: int, saver: Saver
) -> TrainingStopped | StoppedEarly:
    """Build the error of a run that stops before `step`. The earlier steps are saved."""
    if isinstance(reason, RolloutFailed):
        return TrainingStopped(f"no rollouts for step {step}: {reason}\n{_next_action(saver)}")
    if reason.is_time_limit and step == first_step:
        return TrainingStopped(
            "the time limit leaves no room for one step and a save: raise limits.stop_before or "
            f"Slurm's --time. {_last_checkpoint(saver)}."
        )
    return StoppedEarly(f"{reason} before step {step}. {_next_action(saver)}")


def _last_checkpoint(saver: Saver) -> str:
    newest = saver.newest
    return f"The last checkpoint is {newest}" if newest else "No checkpoint has been saved"


def _next_action(saver: Saver) -> str:
    goal = "resume" if saver.newest else "start"
    return f"{_last_checkpoint(saver)}; rerun the command to {goal}."


def _save_now(saver: Saver, num_done: int, progress: Counters) -> None:
    beat("checkpoint")
    try:
        saver.save_now(num_done, progress)
    except SaveFailed as failed:
        raise _cannot_save(saver, failed) from failed


def _cannot_save(saver: Saver, failed: SaveFailed) -> TrainingStopped:
    return TrainingStopped(f"could not save: {failed}\n{_next_action(saver)}")


class Reporter:
    """Writer of metrics and progress, on rank 0 only. On other ranks it does nothing."""

    def __init__(self, run: Run, first_step: int):
        self._run = run
        self._first_step = first_step
        self._is_rank0 = run.runtime.rank == 0
        self._console = Console(file=sys.stdout, soft_wrap=True)
        self._rollouts: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.fields[unit]}"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            # In a log file, one line per step replaces the bar.
            disable=not (self._is_rank0 and self._console.is_terminal),
        )

    def __enter__(self) -> "Reporter":
        if self._is_rank0:
            config = self._run.config
            config.output_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(config.output_dir / "config.yaml", [dump_config(config)])
            dtype = self._run.runtime.dtype(config.model.dtype)
            keep_companions(HFSource(config.model.path), config.output_dir / HF_FOLDER, dtype)
            self._log = MetricsLog(config, first_step=self._first_step)
            self._console.print(_headline(self._run, self._first_step))
            self._task = self._progress.add_task(
                "", total=self._run.num_steps, completed=self._first_step, unit="step"
            )
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._is_rank0:
            self._log.close()

    def sync(self) -> None:
        """Write all metrics so far to the disk. On rank 0 only; see MetricsLog.sync."""
        self._log.sync()

    def notify(self, text: str) -> None:
        """Print a message that belongs to no step."""
        if self._is_rank0:
            self._console.print(text, markup=False)

    def warn(self, step: int, verdict: Verdict) -> None:
        """Print the findings of the guards, if there are any."""
        if verdict.findings:
            consequence = "" if verdict.apply else "; its update is skipped"
            self.notify(f"WARNING: step {step}: {'; '.join(verdict.findings)}{consequence}")

    def report(self, metrics: Metrics) -> None:
        """Write the metrics of one step."""
        if not self._is_rank0:
            return
        self._log.write(metrics)
        line = _step_line(metrics)
        self._progress.update(self._task, advance=1, description=line)
        if self._progress.disable:
            self._console.print(f"step {metrics['step'] + 1}/{self._run.num_steps}  {line}")

    def report_validation(
        self, num_updates: int, line: str, metrics: Metrics, *, is_last: bool
    ) -> None:
        """Print a validation. The last one, which belongs to no step, is sent to the loggers."""
        self.notify(line)
        if self._is_rank0 and is_last:
            self._log.send(metrics, num_updates)

    def send_samples(self, samples: Sequence[Mapping[str, Any]], step: int, table: str) -> None:
        """Send samples to the loggers. On rank 0 only; see MetricsLog.send_samples."""
        self._log.send_samples(samples, step, table)

    def show_rollouts(self, num_done: int, num_all: int) -> None:
        """Show how many responses of a step are complete (rollout.engine.Progress)."""
        if self._rollouts is None:
            self._rollouts = self._progress.add_task("", total=None, unit="rollout")
        self._progress.update(self._rollouts, completed=num_done, total=num_all)


def _headline(run: Run, first_step: int) -> str:
    config, runtime = run.config, run.runtime
    dtype = str(runtime.dtype(config.model.dtype)).removeprefix("torch.")
    layout = describe(config.parallel, runtime.dp_size)
    start = f"resuming at step {first_step}" if first_step else "starting"
    steps = f"{run.num_steps} steps of {config.training.global_batch_size} responses"
    return (
        f"{start}: {config.objective.name}, {config.model.path} in {dtype} on "
        f"{runtime.device.type}, {layout}\n"
        f"{describe_rows(run.dataset)}, {steps}, "
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
        parts.append("SKIPPED")
    return "  ".join(parts)
