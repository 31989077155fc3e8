"""Schedule of a run's checkpoints: when to save, how to react to a failed save, how to resume."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aropd_mcore.convert.manifest import newest, read_manifest
from aropd_mcore.mcore.checkpoint import directory, state
from aropd_mcore.mcore.checkpoint.directory import SaveFailed
from aropd_mcore.mcore.checkpoint.state import Saving
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.trainer.resume_policy import check_changes
from aropd_mcore.trainer.step import Run

Counters = Mapping[str, Any]
"""State of the run other than tensors: plain values, the same on every rank. The position in the
data is a function of the run's seed and `step` (data/dataset.py)."""


class Saver:
    """Saves a run on the schedule of config.checkpoint, in the background if asynchronous.

    Every rank must call every method at the same steps. Only `newest` is local.
    """

    def __init__(self, run: Run):
        """
        Raises:
            CheckpointError: config.output_dir cannot be written to. Raised on every rank.
        """
        self.notify: Callable[[str], None] = lambda text: None
        """Called with a message for the user, on every rank."""
        self.before_saving: Sequence[Callable[[], None]] = ()
        """Called at the start of a save, on rank 0 only. An OSError counts as a failed save."""
        self.seconds: float | None = None
        """Duration of the longest save in this process, in seconds, from its start until its
        checkpoint exists. Training steps in between are not counted. None before the first save."""
        self._run = run
        self._settings = run.config.checkpoint
        self._folder = run.config.output_dir / "checkpoints"
        self._pending: Saving | None = None
        self._num_saved = 0
        """Number of steps in the newest checkpoint."""
        self._best: int | None = None
        """Number of steps of the checkpoint that is to be the best one."""
        self._blocked = 0.0
        directory.prepare(self._folder)
        self._last_time = time.monotonic()

    @property
    def newest(self) -> Path | None:
        """Folder of the newest complete checkpoint. None: there is none."""
        return newest(self._folder)

    def resume(self) -> tuple[Counters | None, list[str]]:
        """Load the newest complete checkpoint into the run.

        Returns:
            The saved progress, or None if there is no checkpoint.
            Messages for the user about checkpoints that were set aside and settings that changed.
        Raises:
            CheckpointError: there are checkpoints, but no complete one.
            ConfigError: the checkpoint belongs to another run: a changed setting is refused.
        """
        path, notes = directory.find(self._folder)
        progress = None
        if path is not None:
            run = self._run
            notes += check_changes(read_manifest(path), run.about, self._settings.allow_changes)
            progress = state.load(path, run.student, run.teacher, run.runtime)
            self._num_saved = progress["step"]
        self._run.source.steps_saved(self._num_saved)
        return progress, notes

    def after_step(self, num_done: int, progress: Counters) -> None:
        """Complete the pending save if it is written, and start a new save if one is due.

        Raises:
            SaveFailed: a save failed, and checkpoint.on_failure is `stop`.
        """
        with self._blocking():
            if self._pending is not None and self._pending.is_written():
                self._attempt(self._commit)
            if self._is_due(num_done):
                self._start(num_done, progress)

    def keep_as_best(self, num_done: int, progress: Counters) -> None:
        """Make the checkpoint of this step the best one, and save it if that was not started.

        Raises:
            SaveFailed: as after_step.
        """
        with self._blocking():
            self._best = num_done
            if self._num_saved == num_done:
                self._mark_best()
            elif self._pending is None or self._pending.step != num_done:
                self._start(num_done, progress)

    def save_now(self, num_done: int, progress: Counters) -> None:
        """Wait until a checkpoint of this step exists. Save it if no save of this step was started.

        Raises:
            SaveFailed: the save failed. This ignores checkpoint.on_failure.
        """
        with self._blocking():
            try:
                self._commit()
            except SaveFailed as failed:  # the save below is the retry
                self.notify(f"could not save: {failed}")
            if self._num_saved < num_done:
                self._begin(num_done, progress)
                self._commit()

    def blocked_seconds(self) -> float:
        """Return the seconds for which saves have blocked training since the last call."""
        seconds, self._blocked = self._blocked, 0.0
        return seconds

    def _is_due(self, num_done: int) -> bool:
        every, minutes = self._settings.save_every_steps, self._settings.save_every_minutes
        if every is not None and num_done % every == 0:
            return True
        if minutes is None:
            return False
        is_late = time.monotonic() - self._last_time >= 60 * minutes
        (decision,) = self._run.runtime.numbers_of_rank0(is_late)
        return bool(decision)

    def _start(self, num_done: int, progress: Counters) -> None:
        """Start a save under checkpoint.on_failure, and complete it if it is synchronous."""
        self._attempt(self._commit)  # of the previous save, if it is still running
        self._attempt(lambda: self._begin(num_done, progress))
        if not self._settings.asynchronous:
            self._attempt(self._commit)

    def _begin(self, num_done: int, progress: Counters) -> None:
        self._last_time = time.monotonic()
        run_on_rank0(self._prepare)
        run = self._run
        self._pending = Saving(
            self._folder,
            num_done,
            run.student,
            run.teacher,
            progress,
            run.runtime,
            about=run.about,
        )

    def _prepare(self) -> None:
        try:
            for call in self.before_saving:
                call()
        except OSError as error:
            raise SaveFailed(f"{error.filename}: {error.strerror}") from error

    def _commit(self) -> None:
        """Wait for the pending save, if there is one, and make it the newest checkpoint."""
        if self._pending is None:
            return
        saving, self._pending = self._pending, None
        self.seconds = max(self.seconds or 0.0, saving.commit())
        self._num_saved = saving.step
        if self._num_saved == self._best:
            self._mark_best()
        if self._run.runtime.rank == 0:
            settings = self._settings
            directory.prune(
                self._folder, keep_last=settings.keep_last, keep_every=settings.keep_every
            )
        self._run.source.steps_saved(self._num_saved)

    def _mark_best(self) -> None:
        run_on_rank0(lambda: directory.mark_best(self._folder, self._num_saved))

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except SaveFailed as failed:
            if self._settings.on_failure == "stop":
                raise
            self.notify(f"could not save, training continues: {failed}")

    @contextmanager
    def _blocking(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._blocked += time.perf_counter() - started
