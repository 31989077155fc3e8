"""A JSONL file that appears when it is complete, and whose writing can be resumed."""

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
    """Return the folder that holds the lines of `path` until the file is complete."""
    return path.with_name(f"{path.name}.partial")


def other_value(begun: dict[str, Any], spec: dict[str, Any]) -> str:
    """Describe the first difference between a job and the one that was begun; empty if none."""
    for key, value in spec.items():
        if begun.get(key) != value:
            return f"{key} was {begun.get(key)!r} and is now {value!r}"
    return ""


class LinesFile:
    """Writer of a JSONL file that takes its name when the last line is written.

        out.jsonl.partial/job.json       everything that the lines depend on
        out.jsonl.partial/lines.jsonl    the lines so far

    The next writer of the same path and the same job continues after these lines.
    """

    def __init__(self, path: Path, spec: dict[str, Any], *, lines_at_once: int = 1):
        """
        Args:
            spec: everything that the lines depend on, as JSON values.
            lines_at_once: number of lines that belong together: an incomplete group is dropped.
        Raises:
            ValueError: `path` exists, another process is writing it, or the lines so far belong to
                another job.
        """
        self.path = path
        self.folder = partial_folder(path)
        self._refuse_existing()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / "lines.jsonl").open("a+b")
        try:
            if not try_lock(self._file.fileno()):  # until the file is closed
                raise ValueError(f"{path}: another process is writing this file; wait for its end")
            self._refuse_existing()  # the other process may have ended just before the lock
            self._check_job(spec)
            self.num_lines = self._keep_whole(lines_at_once)
            """Number of lines that earlier calls have written."""
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
        """Add one line per record."""
        # ASCII: a record may hold half of a surrogate pair, which UTF-8 cannot encode.
        self._file.write("".join(json.dumps(record) + "\n" for record in records).encode("ascii"))
        self._file.flush()

    def finish(self) -> None:
        """Give the file its name."""
        os.fsync(self._file.fileno())
        os.rename(self.folder / "lines.jsonl", self.path)
        shutil.rmtree(self.folder)

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise ValueError(f"{self.path}: exists already; remove it or name another file")

    def _keep_whole(self, lines_at_once: int) -> int:
        """Drop the rest of an interrupted write; return the number of lines that stay."""
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
                f"{self.folder}: holds lines of another job: {problem}; remove the folder or name "
                "another file"
            )
        path.write_text(json.dumps(spec, indent=2) + "\n")
