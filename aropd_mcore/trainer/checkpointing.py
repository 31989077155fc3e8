"""When a run saves, what it says of it, and what it goes on from."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aropd_mcore.convert.manifest import newest, read_manifest
from aropd_mcore.mcore.checkpoint import directory, state
from aropd_mcore.mcore.checkpoint.directory import SaveFailed
from aropd_mcore.mcore.checkpoint.state import Saving
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.trainer.resume_policy import check_changes
from aropd_mcore.trainer.step import Run

Counters = Mapping[str, Any]
"""What a checkpoint says of its run beside tensors: plain values, the same on every rank. Its place
in the data is a function of `step`, by the run's seed (data/dataset.py)."""


class Saver:
    """Saves a run when the settings say so, and watches over a save in the background.

    Every rank must call every method but `newest`, and at the same steps.
    """

    def __init__(self, run: Run):
        """
        Raises:
            CheckpointError: nothing can be written to config.output_dir; on every rank alike.
        """
        self.say: Callable[[str], None] = lambda text: None
        """Called with what the user should know, on every rank alike."""
        self.before_saving: Callable[[], None] = lambda: None
        """Called when a save begins, on the first rank; an OSError is a save that failed."""
        self.seconds: float | None = None
        """The longest that a save has taken in this process, from its start until the checkpoint
        existed, without what training did meanwhile."""
        self._run = run
        self._settings = run.config.checkpoint
        self._folder = run.config.output_dir / "checkpoints"
        self._pending: Saving | None = None
        self._num_saved = 0
        """Steps that the newest checkpoint has seen."""
        self._blocked = 0.0
        directory.prepare(self._folder)
        self._last_time = time.monotonic()

    @property
    def newest(self) -> Path | None:
        """The last checkpoint that exists."""
        return newest(self._folder)

    def resume(self) -> tuple[Counters | None, list[str]]:
        """Load the newest whole checkpoint into the run.

        Returns:
            The progress that was saved, None if there is no checkpoint; and what to tell the user:
            checkpoints that were set aside, and settings that have changed.
        Raises:
            CheckpointError: there are checkpoints, and none is whole.
            ConfigError: it is of another run, by a change that is refused.
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
        """Save if it is time, and see whether the save before has come to its end.

        Raises:
            SaveFailed: a save went wrong, and checkpoint.on_failure is stop.
        """
        with self._blocking():
            if self._pending is not None and self._pending.is_written():
                self._attempt(self._commit)
            if self._is_due(num_done):
                self._attempt(self._commit)  # the one before, if it still goes on
                self._attempt(lambda: self._begin(num_done, progress))
                if not self._settings.asynchronous:
                    self._attempt(self._commit)

    def save_now(self, num_done: int, progress: Counters) -> None:
        """Wait until there is a checkpoint of this step, made now if there is none yet.

        Raises:
            SaveFailed: it could not be written, whatever checkpoint.on_failure says.
        """
        with self._blocking():
            try:
                self._commit()
            except SaveFailed as failed:  # there is another chance right now
                self.say(f"could not save: {failed}")
            if self._num_saved < num_done:
                self._begin(num_done, progress)
                self._commit()

    def blocked_seconds(self) -> float:
        """How long saves have kept training waiting since the last call."""
        seconds, self._blocked = self._blocked, 0.0
        return seconds

    def _is_due(self, num_done: int) -> bool:
        every, minutes = self._settings.save_every_steps, self._settings.save_every_minutes
        if every is not None and num_done % every == 0:
            return True
        if minutes is None:
            return False
        is_late = time.monotonic() - self._last_time >= 60 * minutes
        told = torch.tensor(int(is_late), device=self._run.runtime.device)
        dist.broadcast(told, src=0)
        return bool(told)

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
            self.before_saving()
        except OSError as error:
            raise SaveFailed(f"{error.filename}: {error.strerror}") from error

    def _commit(self) -> None:
        """Wait for the save under way, if there is one."""
        if self._pending is None:
            return
        saving, self._pending = self._pending, None
        self.seconds = max(self.seconds or 0.0, saving.commit())
        self._num_saved = saving.step
        if self._run.runtime.rank == 0:
            settings = self._settings
            directory.prune(
                self._folder, keep_last=settings.keep_last, keep_every=settings.keep_every
            )
        self._run.source.steps_saved(self._num_saved)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except SaveFailed as failed:
            if self._settings.on_failure == "stop":
                raise
            self.say(f"could not save, and goes on: {failed}")

    @contextmanager
    def _blocking(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._blocked += time.perf_counter() - started
