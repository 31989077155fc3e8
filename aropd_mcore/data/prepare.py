"""Conversion of published data sets to JSONL rows.

A record is kept only if its question, trace and answer are complete and belong to one exchange.
The formats are in `formats.py`.
"""

import heapq
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aropd_mcore.config import ViewsConfig, source_name
from aropd_mcore.data.dataset import parse_row
from aropd_mcore.data.formats import CONVERTERS, USED_KEYS, Exchange, convert
from aropd_mcore.data.records import DataError, read_records, shown
from aropd_mcore.data.templates import partial_trace
from aropd_mcore.types import Row

_CARRIED_KEYS = ("system", "sample_weight", "id", "teacher", "domain")
"""Keys that are copied into the row unchanged, in every format."""

_PARTIAL_RATIO: float = ViewsConfig.model_fields["partial_ratio"].default

_NO_REASONING = "have no reasoning: usable for evaluation, poor for training"
_IN_DOUBT = "are in doubt: the answer is not the one that the trace marks last"
_WHOLE = f"show the teacher the whole trace in both views (partial_ratio {_PARTIAL_RATIO})"
_REPEATED = "repeat the prompt and trace of an earlier row"


@dataclass
class PrepareReport:
    """Numbers of rows that `prepare` kept and dropped, with reasons."""

    output: Path
    num_usable: int = 0
    """Number of usable records. Larger than the number of rows written if num_rows limits these."""
    kept: Counter[str] = field(default_factory=Counter)
    """Number of rows written, by format."""
    noted: Counter[str] = field(default_factory=Counter)
    """Number of rows written that should be inspected, by reason. A row may count several times."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of records left out, by reason."""
    examples: dict[str, DataError] = field(default_factory=dict)
    """First record of each reason in noted and dropped, with its origin and the value found."""

    @property
    def num_without_reasoning(self) -> int:
        """Number of rows written with an empty reasoning."""
        return self.noted[_NO_REASONING]

    @property
    def num_in_doubt(self) -> int:
        """Number of rows written whose trace marks another answer than the row has."""
        return self.noted[_IN_DOUBT]

    @property
    def num_whole_partials(self) -> int:
        """Number of rows written whose partial trace is the whole trace."""
        return self.noted[_WHOLE]

    @property
    def num_repeated(self) -> int:
        """Number of rows written that repeat the prompt and trace of an earlier row."""
        return self.noted[_REPEATED]

    def count(self, reasons: Counter[str], example: DataError) -> None:
        """Count a record under its reason in `noted` or `dropped`."""
        reasons[example.problem] += 1
        self.examples.setdefault(example.problem, example)

    def __str__(self) -> str:
        formats = ", ".join(f"{count} {name}" for name, count in self.kept.most_common())
        rest = self.num_usable - self.kept.total()
        chosen = f", drawn from {self.num_usable} usable ones" if rest else ""
        return "\n".join(
            [
                f"{self.output}: kept {self.kept.total()} rows ({formats}){chosen}",
                *(f"  {self._line(f'{n} of them', why)}" for why, n in self.noted.most_common()),
                f"dropped {self.dropped.total()}",
                *(f"  {self._line(f'{n}:', why)}" for why, n in self.dropped.most_common()),
            ]
        )

    def _line(self, count: str, reason: str) -> str:
        example = self.examples[reason]
        found = f": {example.found}" if example.found else ""
        return f"{count} {reason} (first at {example.origin}){found}"


def prepare(
    inputs: Sequence[Path],
    output: Path,
    *,
    format: str = "auto",
    num_rows: int | None = None,
    seed: int = 1234,
) -> PrepareReport:
    """Convert records to one JSONL file of rows.

    The output is complete or absent. It may be one of the inputs.

    Args:
        inputs: files, saved data sets and data sets of the hub; see records.read_records.
        format: a name from the table in formats.py, or "auto" to detect each record's format.
        num_rows: number of usable rows to draw at random without replacement. They are written in
            the order of the inputs. None: write all usable rows.
        seed: random seed of num_rows.

    Raises:
        DataError: an input is missing or unreadable, or there are no usable rows or fewer than
            num_rows. Nothing is written then.
        ValueError: the format is unknown, or the output's suffix is .parquet, .gz or .zst.
    """
    if format != "auto" and format not in CONVERTERS:
        raise ValueError(f"format {format!r}: expected one of auto, {', '.join(CONVERTERS)}")
    report = PrepareReport(output=Path(output))
    if report.output.suffix in (".parquet", ".gz", ".zst"):
        raise ValueError(f"output {output}: found {report.output.suffix}, expected a JSONL file")
    usable = _usable_rows(inputs, format, report)
    chosen = usable if num_rows is None else _draw(usable, num_rows, seed)
    write_atomically(report.output, _lines(chosen, report, inputs, num_rows or 1))
    return report


class _Usable(NamedTuple):
    """A row that can be written."""

    number: int
    format: str
    line: str
    notes: tuple[DataError, ...]


def _usable_rows(inputs: Iterable[Path], format: str, report: PrepareReport) -> Iterator[_Usable]:
    seen: set[int] = set()
    for path in inputs:
        for origin, record in read_records(path, USED_KEYS + _CARRIED_KEYS):
            try:
                if isinstance(record, DataError):
                    raise record
                name, exchange = convert(record, origin, format)
                row = _row(record, exchange, origin)
            except DataError as error:
                report.count(report.dropped, error)
                continue
            report.num_usable += 1
            notes = tuple(_notes(row, exchange, seen))
            yield _Usable(report.num_usable, name, _to_json(row), notes)


def _draw(rows: Iterator[_Usable], num_rows: int, seed: int) -> list[_Usable]:
    """Draw num_rows rows at random, with at most num_rows of them in memory."""
    generator = random.Random(seed)
    # The stream of random() is the same in every version of Python.
    draws = ((generator.random(), row) for row in rows)
    chosen = heapq.nsmallest(num_rows, draws, key=lambda draw: draw[0])
    return sorted(row for _, row in chosen)


def _lines(
    rows: Iterable[_Usable], report: PrepareReport, inputs: Sequence[Path], min_rows: int
) -> Iterator[str]:
    for row in rows:
        report.kept[row.format] += 1
        for note in row.notes:
            report.count(report.noted, note)
        yield row.line
    where = ", ".join(map(source_name, inputs))
    if not report.kept:
        raise DataError(where, "no record is usable, nothing is written", str(report))
    if report.kept.total() < min_rows:
        problem = f"expected at least {min_rows} usable rows, nothing is written; request fewer"
        raise DataError(where, problem, str(report))


def _row(record: dict[str, Any], exchange: Exchange, origin: str) -> Row:
    carried = {key: record[key] for key in _CARRIED_KEYS if key in record}
    oracle = {"reasoning": exchange.reasoning, "answer": exchange.answer}
    teacher = record.get("teacher")
    names = [teacher] if isinstance(teacher, str) and teacher else []
    return parse_row(carried | exchange.prompt | oracle, origin, names)


def _notes(row: Row, exchange: Exchange, seen: set[int]) -> Iterator[DataError]:
    """Yield the reasons to inspect a row. `seen` collects hashes of the rows."""
    reasoning = row.reasoning.strip()
    if not reasoning:
        yield DataError(row.origin, _NO_REASONING)
    elif partial_trace(reasoning, _PARTIAL_RATIO) == reasoning:
        yield DataError(row.origin, _WHOLE, shown(reasoning))
    if exchange.other_answer is not None:
        answers = f"answer {shown(row.answer)}, in the trace {shown(exchange.other_answer)}"
        yield DataError(row.origin, _IN_DOUBT, answers)
    key = hash((row.system, row.history, row.question, row.reasoning, row.answer))
    if key in seen:
        yield DataError(row.origin, _REPEATED)
    seen.add(key)


def _to_json(row: Row) -> str:
    fields: dict[str, Any] = {"id": row.id} if row.id else {}
    if row.history:
        turns = [("system", row.system)] if row.system is not None else []
        turns += [*row.history, ("user", row.question)]
        fields["messages"] = [{"role": role, "content": text} for role, text in turns]
    else:
        fields["question"] = row.question
    fields |= {"reasoning": row.reasoning, "answer": row.answer}
    if row.system is not None and not row.history:
        fields["system"] = row.system
    if row.sample_weight != 1.0:
        fields["sample_weight"] = row.sample_weight
    fields |= {key: getattr(row, key) for key in ("teacher", "domain") if getattr(row, key)}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write a file so that it is complete, or unchanged after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp creates files that only their owner can read.
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
