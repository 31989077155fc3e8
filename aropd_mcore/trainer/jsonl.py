"""JSONL files that a run writes line by line, and cuts back when it resumes."""

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

VALIDATIONS = "validation.jsonl"
"""Name of the file of validation results in a run's output_dir."""


class JsonlFile:
    """A file that grows by one JSON object per line. A full disk delays lines but loses none."""

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        """Bytes that a full disk did not accept. They are written again with the next line."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line. Numbers that are not finite become null, since JSON has none."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._unwritten += (json.dumps(finite) + "\n").encode()
        with suppress(OSError):
            self._write_out()

    def sync(self) -> None:
        """Wait until all lines are on the disk.

        Raises:
            OSError: the disk does not accept them.
        """
        try:
            self._write_out()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def close(self) -> None:
        with suppress(OSError):  # already reported by the failed save
            self._write_out()
        self._file.close()

    def _write_out(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


def read_until(path: Path, key: str, end: int) -> list[dict[str, Any]]:
    """Read the lines whose value of `key` is below `end`, and remove the other lines.

    Raises:
        ValueError: see keep_lines.
    """
    return keep_lines(path, key, lambda record: record[key] < end)


def keep_lines(
    path: Path, key: str, is_kept: Callable[[Mapping[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Read the lines that `is_kept` chooses by their value of `key`, and remove the other lines.

    A last line without its end, which a kill can leave, is removed too.

    Raises:
        ValueError: a line is invalid. The message names the file and the line.
        OSError: the disk does not accept the remaining lines. The file is unchanged.
    """
    if not path.exists():
        return []
    kept, records = [], []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            keep = is_kept(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: found {line.strip()[:60]!r}, expected an object with {key!r}; "
                "remove the line to resume"
            ) from error
        if keep:
            kept.append(line)
            records.append(record)
    temporary = path.with_suffix(".partial")
    try:
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return records
