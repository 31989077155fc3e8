"""A JSONL file that is written whole, by as many calls as it takes."""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from aropd_mcore.locks import try_lock


def partial_folder(path: Path) -> Path:
    """Where lines gather on their way to `path`; goes when they are there."""
    return path.with_name(f"{path.name}.partial")


def other_value(begun: dict[str, Any], spec: dict[str, Any]) -> str:
    """The first difference of a job from the one that was begun, in words; nothing if none."""
    for key, value in spec.items():
        if begun.get(key) != value:
            return f"{key} was {begun.get(key)!r}, and is {value!r} now"
    return ""


class LinesFile:
    """Lines on their way to `path`; they take its name when the last one is written.

        out.jsonl.partial/job.json       what the lines depend on
        out.jsonl.partial/lines.jsonl    those that there are

    The next call for the same path and the same job goes on behind them.
    """

    def __init__(self, path: Path, spec: dict[str, Any], *, lines_at_once: int = 1):
        """
        Args:
            job: what the lines depend on, as JSON holds it.
            lines_at_once: only so many are kept or dropped together.
        Raises:
            ValueError: `path` exists, another process is writing it, or what is there is of another
                job.
        """
        self.path = path
        self.folder = partial_folder(path)
        self._refuse_existing()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / "lines.jsonl").open("a+b")
        try:
            if not try_lock(self._file.fileno()):  # until the file is closed
                raise ValueError(f"{path}: another process is writing it")
            self._refuse_existing()  # the other process may have ended just before the lock
            self._check_job(spec)
            self.num_lines = self._keep_whole(lines_at_once)
            """That were there."""
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "LinesFile":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Add a line a record."""
        # ASCII: a record may hold half of a surrogate pair, which UTF-8 cannot say.
        self._file.write("".join(json.dumps(record) + "\n" for record in records).encode("ascii"))
        self._file.flush()

    def finish(self) -> None:
        """Give the file its name."""
        os.fsync(self._file.fileno())
        os.rename(self.folder / "lines.jsonl", self.path)
        shutil.rmtree(self.folder)

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise ValueError(f"{self.path}: exists already; remove it, or name another file")

    def _keep_whole(self, lines_at_once: int) -> int:
        """Drop what an interrupted write has left; how many lines stay."""
        self._file.seek(0)
        num_lines = end = position = 0
        for line in self._file:
            position += len(line)
            if line.endswith(b"\n"):
                num_lines += 1
                if num_lines % lines_at_once == 0:
                    end = position
        self._file.truncate(end)
        return num_lines - num_lines % lines_at_once

    def _check_job(self, spec: dict[str, Any]) -> None:
        path, begun = self.folder / "job.json", {}
        with suppress(OSError, ValueError):
            begun = json.loads(path.read_text())
        problem = other_value(begun, spec)
        if problem and self._file.seek(0, os.SEEK_END) > 0:
            raise ValueError(
                f"{self.folder}: holds lines of another job: {problem}; remove the folder, or name "
                "another file"
            )
        path.write_text(json.dumps(spec, indent=2) + "\n")
