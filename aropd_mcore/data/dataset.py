"""JSONL / Parquet -> Row, and the order in which a run sees the rows.

The order is a pure function of (seed, epoch, position): a run that goes on needs the number of
steps it has done, and nothing else, to find its place in the middle of an epoch.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aropd_mcore.data.records import DataError, read_records
from aropd_mcore.types import Row


def parse_row(record: dict[str, Any], origin: str) -> Row:
    """The record's `question`, `reasoning`, `answer` and optional `system`, `sample_weight`, `id`.

    Other keys are ignored: published datasets carry many. A null counts as absent, which is how
    Parquet says it. Reasoning or answer may be empty, but not both.

    Raises:
        DataError: a key is missing, has the wrong type, or a value out of range; it names origin,
            key, what was found and what is expected.
    """
    question, system = parse_question(record, origin)
    reasoning, answer = (
        _string(record, key, origin, required=True) for key in ("reasoning", "answer")
    )
    if not (reasoning.strip() or answer.strip()):
        raise DataError(origin, "keys 'reasoning' and 'answer': both are empty")
    return Row(
        question=question,
        reasoning=reasoning,
        answer=answer,
        system=system,
        sample_weight=_weight(record, origin),
        id=_identifier(record, origin),
        origin=origin,
    )


def parse_question(record: dict[str, Any], origin: str) -> tuple[str, str | None]:
    """The record's `question` and optional `system`: what the student sees of a row.

    Raises:
        DataError: as parse_row.
    """
    question = _string(record, "question", origin, required=True)
    if not question.strip():
        raise DataError(origin, "key 'question': expected a question", "only white space")
    system = record.get("system")
    return question, None if system is None else _string(record, "system", origin)


def _string(record: dict[str, Any], key: str, origin: str, *, required: bool = False) -> str:
    value = record.get(key)
    if value is None and required:
        problem = f"key {key!r} is missing (`aropd prepare` converts other formats)"
        raise DataError(origin, problem, "keys " + (", ".join(map(str, record)) or "none"))
    if not isinstance(value, str):
        raise DataError(origin, f"key {key!r}: expected a string", shown(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; tokenizers cannot take it.
        problem = f"key {key!r}: expected valid Unicode"
        raise DataError(origin, problem, ascii(value[error.start])) from error
    return value


def _weight(record: dict[str, Any], origin: str) -> float:
    value = record.get("sample_weight")
    if value is None:
        return 1.0
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # False for NaN too, and for integers that no float holds.
    if not is_number or not 0 <= value <= sys.float_info.max:
        problem = "key 'sample_weight': expected a finite number, at least 0"
        raise DataError(origin, problem, shown(value))
    return float(value)


def _identifier(record: dict[str, Any], origin: str) -> str:
    value = record.get("id")
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _string(record, "id", origin)


def shown(value: Any) -> str:
    """A value's type and the beginning of it, for an error's `found`."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


class RowDataset(Sequence[Row]):
    """Rows in memory, in the order of files and lines; `row_at` gives them in a run's order."""

    def __init__(self, rows: Sequence[Row], bad_rows: Sequence[DataError] = ()) -> None:
        self._rows = tuple(rows)
        self.bad_rows = tuple(bad_rows)
        """What was wrong with each row that was skipped."""

    @classmethod
    def load(
        cls, paths: Sequence[Path], *, on_bad_row: Literal["error", "skip"] = "error"
    ) -> "RowDataset":
        """Read the rows of JSONL and Parquet files.

        Raises:
            DataError: a file is missing or unreadable; a row is broken and on_bad_row is "error";
                no usable row is left.
        """
        rows: list[Row] = []
        bad_rows: list[DataError] = []
        for path in paths:
            for origin, record in read_records(path):
                try:
                    if isinstance(record, DataError):
                        raise record
                    rows.append(parse_row(record, origin))
                except DataError as error:
                    if on_bad_row == "error":
                        raise
                    bad_rows.append(error)
        if not rows:
            where = ", ".join(map(str, paths))
            found = f"{len(bad_rows)} broken rows, first {bad_rows[0]}" if bad_rows else "no rows"
            raise DataError(where, "expected at least one usable row", found)
        return cls(rows, bad_rows)

    @property
    def num_bad_rows(self) -> int:
        return len(self.bad_rows)

    def fingerprint(self) -> str:
        """Of what the rows say, in their order, wherever their files are."""
        digest = hashlib.sha256()
        for row in self._rows:
            content = {**asdict(row), "origin": ""}
            if not row.history:  # as checkpoints hashed rows before rows had earlier turns
                del content["history"]
            digest.update(json.dumps(content).encode() + b"\n")
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]

    def row_at(self, position: int, *, seed: int, shuffle: bool = True) -> Row:
        """The row at `position` of the run, which counts prompts from 0 through all epochs.

        Every epoch is a permutation of its own, a function of (seed, epoch) alone.
        """
        epoch, index = divmod(position, len(self))
        return self[_permutation(len(self), seed, epoch)[index] if shuffle else index]


@lru_cache(maxsize=2)  # A step may lie across the border of two epochs.
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting raw draws, since numpy keeps the streams of its bit generators from one release to
    # the next, but not what Generator.permutation makes of them.
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(epoch,))
    return np.argsort(np.random.PCG64(sequence).random_raw(length), kind="stable")


def step_positions(step: int, prompts_per_step: int, *, dp_rank: int, dp_size: int) -> range:
    """The run positions of this data-parallel rank's prompts in `step`, counted from 0.

    The shares of ranks 0 to dp_size - 1 follow one another, so that the prompts of a step are the
    same for every dp_size.

    Raises:
        ValueError: prompts_per_step does not divide by dp_size.
    """
    share, rest = divmod(prompts_per_step, dp_size)
    if rest:
        raise ValueError(
            f"prompts_per_step {prompts_per_step} is not a multiple of the data-parallel size "
            f"{dp_size}; choose a multiple, such as {share * dp_size or dp_size} or "
            f"{(share + 1) * dp_size}"
        )
    start = step * prompts_per_step + dp_rank * share
    return range(start, start + share)
