"""Reading of rows, and the order of the rows in a run.

The order is a pure function of (seed, epoch, position). A resumed run needs only the number of
completed steps to find its position within an epoch.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aropd_mcore.config import WeightedSource, source_name
from aropd_mcore.data.answer_marks import Unusable, answer_text
from aropd_mcore.data.chat import Prompt, read_turns, split_turns
from aropd_mcore.data.records import DataError, is_absent, read_records, shown, shown_keys
from aropd_mcore.types import Row

ROW_KEYS = (
    *("question", "messages", "reasoning", "answer", "system", "sample_weight", "id"),
    *("teacher", "domain"),
)
"""Keys of a row. Other keys are ignored, since published data sets have many."""


def parse_row(record: dict[str, Any], origin: str, teachers: Sequence[str] = ()) -> Row:
    """Read a row from a record.

        question       a string
        messages       instead of question: chat turns {role, content} that end with the question;
                       a system turn and earlier user and assistant turns may precede it
        reasoning      a string; may be empty if answer is not
        answer         a string or a finite number; may be empty if reasoning is not
        system         optional string
        sample_weight  optional number, at least 0; 1 if absent
        id             optional string or integer
        teacher        one of `teachers`; optional if there is one, ignored if there is none
        domain         optional string; values of other types are ignored

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
        teacher=_teacher(record, origin, teachers),
        domain=domain_of(record),
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


def _teacher(record: dict[str, Any], origin: str, teachers: Sequence[str]) -> str:
    if not teachers:
        return ""
    value: Any = record.get("teacher")
    names = ", ".join(teachers)
    if is_absent(value):
        if len(teachers) == 1:
            return teachers[0]
        problem = f"key 'teacher' is missing: expected one of the configuration's teachers, {names}"
        raise DataError(origin, problem, shown_keys(record))
    if value not in teachers:
        problem = (
            f"key 'teacher': expected one of the configuration's teachers, {names}; change the "
            "row, or add its teacher to the section teachers"
        )
        raise DataError(origin, problem, shown(value))
    return value


def domain_of(record: Mapping[str, Any]) -> str:
    """Return a record's `domain`, or an empty string unless it is a string.

    Published data sets have this key with other meanings, so no value is an error.
    """
    value = record.get("domain")
    return value if isinstance(value, str) else ""


@dataclass(frozen=True)
class SourceRows:
    """Rows of one source, which are consecutive in the data set."""

    name: str
    num_rows: int
    weight: float = 1.0

    @property
    def num_drawn(self) -> int:
        """Number of rows that each epoch draws from the source."""
        return round(self.weight * self.num_rows)


class RowDataset(Sequence[Row]):
    """Rows in memory, in the order of sources and lines. `row_at` returns them in a run's order."""

    def __init__(
        self,
        rows: Sequence[Row],
        bad_rows: Sequence[DataError] = (),
        sources: Sequence[SourceRows] = (),
    ) -> None:
        """
        Args:
            sources: sources of the rows, in the order of the rows. Empty: one source of weight 1.
        """
        self._rows = tuple(rows)
        self.bad_rows = tuple(bad_rows)
        """Errors of the rows that were skipped."""
        self.sources = tuple(sources) or (SourceRows("", len(self._rows)),)
        self.epoch_length = sum(source.num_drawn for source in self.sources)
        """Number of rows that each epoch draws."""

    @classmethod
    def load(
        cls,
        sources: Sequence[Path | WeightedSource],
        *,
        on_bad_row: Literal["error", "skip"] = "error",
        teachers: Sequence[str] = (),
    ) -> "RowDataset":
        """Read the rows of data.train or of other sources; see records.read_records.

        Args:
            teachers: names that a row's `teacher` may have (Config.row_teachers).
        Raises:
            DataError: a source is missing or unreadable, a row is broken and on_bad_row is "error",
                or there is no usable row.
        """
        rows: list[Row] = []
        bad_rows: list[DataError] = []
        read: list[SourceRows] = []
        for source in sources:
            is_plain = isinstance(source, Path)
            path, weight = (source, 1.0) if is_plain else (source.path, source.weight)
            num_before = len(rows)
            for origin, record in read_records(path, ROW_KEYS):
                try:
                    if isinstance(record, DataError):
                        raise record
                    rows.append(parse_row(record, origin, teachers))
                except DataError as error:
                    if on_bad_row == "error":
                        raise
                    bad_rows.append(error)
            read.append(SourceRows(source_name(path), len(rows) - num_before, weight))
        if not rows:
            where = ", ".join(source.name for source in read)
            found = f"{len(bad_rows)} broken rows, first {bad_rows[0]}" if bad_rows else "no rows"
            raise DataError(where, "expected at least one usable row", found)
        return cls(rows, bad_rows, read)

    def without(self, errors: Mapping[int, DataError]) -> "RowDataset":
        """Return the data set without some rows.

        Args:
            errors: error of each of these rows by its index. They are added to bad_rows.
        """
        numbers = np.repeat(range(len(self.sources)), [s.num_rows for s in self.sources])
        num_left_out = Counter(int(numbers[index]) for index in errors)
        return RowDataset(
            [row for index, row in enumerate(self._rows) if index not in errors],
            [*self.bad_rows, *(errors[index] for index in sorted(errors))],
            [
                replace(source, num_rows=source.num_rows - num_left_out[number])
                for number, source in enumerate(self.sources)
            ],
        )

    @property
    def num_bad_rows(self) -> int:
        return len(self.bad_rows)

    @property
    def has_weights(self) -> bool:
        """Whether the weight of a source differs from 1."""
        return any(source.weight != 1 for source in self.sources)

    def fingerprint(self) -> str:
        """Return a hash of the rows' contents in their order, independent of file names.

        It includes the weights of the sources if one of them differs from 1. It does not include
        the domains, which only metrics read.
        """
        digest = hashlib.sha256()
        for row in self._rows:
            fields = {**asdict(row), "origin": ""}
            del fields["domain"]
            for name in ("history", "teacher"):  # Runs that began before these existed can resume.
                if not fields[name]:
                    del fields[name]
            digest.update(json.dumps(fields).encode() + b"\n")
        if self.has_weights:
            weights = [[source.num_rows, source.weight] for source in self.sources]
            digest.update(json.dumps(weights).encode())
        return digest.hexdigest()[:16]

    @property
    def domains(self) -> list[str]:
        """Domains of the rows, sorted."""
        return sorted({row.domain for row in self._rows} - {""})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]

    def row_at(self, position: int, *, seed: int, shuffle: bool = True) -> Row:
        """Return the row at `position` of the run, which counts prompts from 0 over all epochs.

        Every epoch has epoch_length positions and a separate order, which depends only on the
        sources, the seed and the epoch.
        """
        epoch, place = divmod(position, self.epoch_length)
        return self[int(_epoch_order(self.sources, seed, epoch, shuffle)[place])]


@lru_cache(maxsize=2)  # A step may include rows of two epochs.
def _epoch_order(
    sources: tuple[SourceRows, ...], seed: int, epoch: int, shuffle: bool
) -> np.ndarray:
    """Return the indices of an epoch's rows in the order of the epoch."""
    parts, start = [], 0
    for number, source in enumerate(sources):
        parts.append(start + _drawn(source, seed, epoch, number if shuffle else None))
        start += source.num_rows
    indices = np.concatenate(parts)
    return indices[_permutation(len(indices), seed, epoch)] if shuffle else indices


def _drawn(source: SourceRows, seed: int, epoch: int, number: int | None) -> np.ndarray:
    """Return the rows that an epoch draws from a source, counted from 0 within the source.

    A source is an endless sequence of passes over its rows, each a separate permutation. Each epoch
    takes the next `num_drawn` entries. All rows are therefore drawn equally often, up to one.

    Args:
        number: number of the source, which makes its permutations differ from those of others.
            None: the order of the rows.
    """
    entries = np.arange(epoch * source.num_drawn, (epoch + 1) * source.num_drawn)
    if not len(entries):
        return entries
    passes, places = np.divmod(entries, source.num_rows)
    # In whole passes, the order of the epoch makes this order unimportant.
    if number is None or source.num_drawn % source.num_rows == 0:
        return places
    for one in range(passes[0], passes[-1] + 1):
        is_in_pass = passes == one
        order = _permutation(source.num_rows, seed, number, one)
        places[is_in_pass] = order[places[is_in_pass]]
    return places


def _permutation(length: int, seed: int, *stream: int) -> np.ndarray:
    # Sort raw draws: numpy keeps the streams of its bit generators stable across releases, but not
    # the results of Generator.permutation.
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=stream)
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
