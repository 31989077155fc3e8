"""Reading rows from JSONL and Parquet, and the order of the rows in a run.

The order is a pure function of (seed, epoch, position). A resumed run needs only the number of
completed steps to find its position within an epoch.
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

from aropd_mcore.data.answer_marks import Unusable, answer_text
from aropd_mcore.data.chat import Prompt, read_turns, split_turns
from aropd_mcore.data.records import DataError, is_absent, read_records, shown, shown_keys
from aropd_mcore.types import Row

ROW_KEYS = ("question", "messages", "reasoning", "answer", "system", "sample_weight", "id")
"""Keys of a row. Other keys are ignored, since published data sets have many."""


def parse_row(record: dict[str, Any], origin: str) -> Row:
    """Read a row from a record.

        question       a string
        messages       instead of question: chat turns {role, content} that end with the question;
                       a system turn and earlier user and assistant turns may precede it
        reasoning      a string; may be empty if answer is not
        answer         a string or a finite number; may be empty if reasoning is not
        system         optional string
        sample_weight  optional number, at least 0; 1 if absent
        id             optional string or integer

    A null counts as absent, as in Parquet. A NaN, which pandas writes for a missing string, counts
    as absent too.

    Raises:
        DataError: a key is missing, or its value has a wrong type or is out of range.
    """
    system, history, question = _parse_prompt(record, origin)
    reasoning = _string(record, "reasoning", origin, required=True)
    answer = _answer(record, origin)
    if not (reasoning.strip() or answer.strip()):
        raise DataError(origin, "keys 'reasoning' and 'answer': both are empty")
    return Row(
        question=question,
        reasoning=reasoning,
        answer=answer,
        system=system,
        history=history,
        sample_weight=_weight(record, origin),
        id=_identifier(record, origin),
        origin=origin,
    )


def parse_question(record: dict[str, Any], origin: str) -> tuple[str, str | None]:
    """Read a record's `question` and optional `system`.

    Raises:
        DataError: `question` is missing or empty, or a value has a wrong type.
    """
    question = _string(record, "question", origin, required=True)
    if not question.strip():
        raise DataError(origin, "key 'question': expected a question", "only white space")
    has_system = not is_absent(record.get("system"))
    return question, _string(record, "system", origin) if has_system else None


def _parse_prompt(record: dict[str, Any], origin: str) -> Prompt:
    if is_absent(record.get("messages")):
        question, system = parse_question(record, origin)
        return Prompt(system, (), question)
    if not is_absent(record.get("question")):
        problem = "keys 'question' and 'messages': expected one of them; remove the other"
        raise DataError(origin, problem, shown_keys(record))
    turns = read_turns(record["messages"], origin)
    for _, text in turns:
        _check_unicode(text, "messages", origin)
    prompt = split_turns(turns, origin)
    if is_absent(record.get("system")):
        return prompt
    system = _string(record, "system", origin)
    if prompt.system not in (None, system):
        problem = "key 'system' and the system turn of 'messages' differ: remove one of them"
        raise DataError(origin, problem, f"{shown(system)} and {shown(prompt.system)}")
    return prompt._replace(system=system)


def _string(record: dict[str, Any], key: str, origin: str, *, required: bool = False) -> str:
    value = record.get(key)
    if required and is_absent(value):
        problem = f"key {key!r} is missing (`aropd prepare` converts other formats)"
        found = f"key {key!r} with value {value}" if key in record else shown_keys(record)
        raise DataError(origin, problem, found)
    if not isinstance(value, str):
        raise DataError(origin, f"key {key!r}: expected a string", shown(value))
    _check_unicode(value, key, origin)
    return value


def _check_unicode(text: str, key: str, origin: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which tokenizers cannot encode.
        problem = f"key {key!r}: expected valid Unicode"
        raise DataError(origin, problem, ascii(text[error.start])) from error


def _answer(record: dict[str, Any], origin: str) -> str:
    value = record.get("answer")
    if is_absent(value) or isinstance(value, str):
        return _string(record, "answer", origin, required=True)
    try:
        return answer_text(value)
    except Unusable as error:
        problem = "key 'answer': expected a string or a finite number"
        raise DataError(origin, problem, shown(value)) from error


def _weight(record: dict[str, Any], origin: str) -> float:
    value = record.get("sample_weight")
    if value is None:
        return 1.0
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # The comparison is also False for NaN and for integers beyond the range of float.
    if not is_number or not 0 <= value <= sys.float_info.max:
        problem = "key 'sample_weight': expected a finite number, at least 0"
        raise DataError(origin, problem, shown(value))
    return float(value)


def _identifier(record: dict[str, Any], origin: str) -> str:
    value = record.get("id")
    if is_absent(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas converts integers to floats if one is missing.
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _string(record, "id", origin)


class RowDataset(Sequence[Row]):
    """Rows in memory, in the order of files and lines. `row_at` returns them in a run's order."""

    def __init__(self, rows: Sequence[Row], bad_rows: Sequence[DataError] = ()) -> None:
        self._rows = tuple(rows)
        self.bad_rows = tuple(bad_rows)
        """Errors of the rows that were skipped."""

    @classmethod
    def load(
        cls, paths: Sequence[Path], *, on_bad_row: Literal["error", "skip"] = "error"
    ) -> "RowDataset":
        """Read the rows of JSONL and Parquet files.

        Raises:
            DataError: a file is missing or unreadable, a row is broken and on_bad_row is "error",
                or there is no usable row.
        """
        rows: list[Row] = []
        bad_rows: list[DataError] = []
        for path in paths:
            for origin, record in read_records(path, ROW_KEYS):
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
        """Return a hash of the rows' contents in their order, independent of file names."""
        digest = hashlib.sha256()
        for row in self._rows:
            fields = {**asdict(row), "origin": ""}
            if not row.history:
                del fields["history"]  # Runs that began before `history` existed can resume.
            digest.update(json.dumps(fields).encode() + b"\n")
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]

    def row_at(self, position: int, *, seed: int, shuffle: bool = True) -> Row:
        """Return the row at `position` of the run, which counts prompts from 0 over all epochs.

        Every epoch is a separate permutation, which depends only on (seed, epoch).
        """
        epoch, index = divmod(position, len(self))
        return self[_permutation(len(self), seed, epoch)[index] if shuffle else index]


@lru_cache(maxsize=2)  # A step may include rows of two epochs.
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    # Sort raw draws: numpy keeps the streams of its bit generators stable across releases, but not
    # the results of Generator.permutation.
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(epoch,))
    return np.argsort(np.random.PCG64(sequence).random_raw(length), kind="stable")


def step_positions(step: int, prompts_per_step: int, *, dp_rank: int, dp_size: int) -> range:
    """Return the run positions of a data-parallel rank's prompts in `step`, counted from 0.

    Ranks 0 to dp_size - 1 have consecutive ranges, so that the prompts of a step are the same for
    every dp_size.

    Raises:
        ValueError: prompts_per_step is not a multiple of dp_size.
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
