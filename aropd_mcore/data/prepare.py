"""Published data sets -> our rows: `question`, `reasoning`, `answer`, as JSONL.

name      a record has                       reasoning and answer come from
rows      question, reasoning, answer        themselves
gsm8k     question, answer                   the text before and after the last line's `####`
numina    problem, solution and/or answer    solution; `answer`, or the last `\\boxed{}`
tags      a question and a response          <reasoning>...</reasoning><answer>...</answer>
messages  messages (role, content)           the last assistant turn, by any of those markers
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aropd_mcore.data.answer_marks import (
    Solution,
    Unusable,
    answer_text,
    split_boxed,
    split_hashes,
    split_tags,
)
from aropd_mcore.data.dataset import parse_row
from aropd_mcore.data.records import DataError, read_records
from aropd_mcore.types import Row

Record = dict[str, Any]

_QUESTION_KEYS = ("question", "problem", "prompt", "instruction")
_RESPONSE_KEYS = ("response", "completion", "output", "answer", "solution")
_KEPT_KEYS = ("system", "sample_weight", "id")


@dataclass
class PrepareReport:
    """What `prepare` kept, dropped and why."""

    output: Path
    kept: Counter[str] = field(default_factory=Counter)
    """Rows written, by format."""
    num_without_reasoning: int = 0
    """Rows written with an empty reasoning: fit for evaluation, poor for training."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """For each reason the first place it was met, as `file:line`."""

    def __str__(self) -> str:
        formats = ", ".join(f"{count} {name}" for name, count in self.kept.most_common())
        lines = [f"{self.output}: kept {self.kept.total()} rows ({formats})"]
        if self.num_without_reasoning:
            lines.append(f"  {self.num_without_reasoning} of them have no reasoning")
        lines.append(f"dropped {self.dropped.total()}")
        for reason, count in self.dropped.most_common():
            lines.append(f"  {count}: {reason} (first at {self.examples[reason]})")
        return "\n".join(lines)


def prepare(inputs: Sequence[Path], output: Path, *, format: str = "auto") -> PrepareReport:
    """Convert JSONL and Parquet files into one JSONL file of our rows.

    `format` is a name of the table above, or "auto" to choose for each record by its keys. The
    output appears whole or not at all; it may be one of the inputs.

    Raises:
        DataError: an input is missing or unreadable, or no record could be kept (then nothing is
            written).
        ValueError: an unknown format.
    """
    if format != "auto" and format not in _CONVERTERS:
        raise ValueError(f"format {format!r}: expected auto, {', '.join(_CONVERTERS)}")
    report = PrepareReport(output=Path(output))
    write_atomically(report.output, _converted_lines(inputs, format, report))
    return report


def _converted_lines(inputs: Iterable[Path], format: str, report: PrepareReport) -> Iterator[str]:
    for path in inputs:
        for origin, record in read_records(path):
            try:
                if isinstance(record, DataError):
                    raise record
                name = _detect(record) if format == "auto" else format
                row = _convert(record, name, origin)
            except (DataError, Unusable) as error:
                reason = error.problem if isinstance(error, DataError) else str(error)
                report.dropped[reason] += 1
                report.examples.setdefault(reason, origin)
                continue
            report.kept[name] += 1
            report.num_without_reasoning += not row.reasoning.strip()
            yield _to_json(row)
    if not report.kept:
        where = ", ".join(map(str, inputs))
        raise DataError(where, "no row could be kept, nothing is written", str(report))


def _convert(record: Record, name: str, origin: str) -> Row:
    kept = {key: record[key] for key in _KEPT_KEYS if record.get(key) is not None}
    return parse_row(kept | _CONVERTERS[name](record), origin)


def _to_json(row: Row) -> str:
    fields: Record = {}
    if row.id:
        fields["id"] = row.id
    fields |= {"question": row.question, "reasoning": row.reasoning, "answer": row.answer}
    if row.system is not None:
        fields["system"] = row.system
    if row.sample_weight != 1.0:
        fields["sample_weight"] = row.sample_weight
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _detect(record: Record) -> str:
    keys = {key for key, value in record.items() if value is not None}
    if {"question", "reasoning", "answer"} <= keys:
        return "rows"
    if "problem" in keys and keys & {"solution", "answer"}:
        return "numina"
    if "messages" in keys:
        return "messages"
    if "question" in keys and "####" in str(record.get("answer")):
        return "gsm8k"
    if keys & set(_QUESTION_KEYS) and keys & set(_RESPONSE_KEYS):
        return "tags"
    raise Unusable(f"no known format for the keys {', '.join(sorted(keys)) or '(none)'}")


def _from_rows(record: Record) -> Record:
    return {key: record.get(key) for key in ("question", "reasoning", "answer")}


def _from_gsm8k(record: Record) -> Record:
    solution = split_hashes(_text(record, "answer"))
    return _row(_text(record, "question"), solution, "no line '#### answer' at the end of 'answer'")


def _from_numina(record: Record) -> Record:
    question = _text(record, "problem")
    reasoning = "" if record.get("solution") is None else _text(record, "solution").strip()
    if record.get("answer") is not None:
        return _row(question, (reasoning, answer_text(record["answer"])), "")
    return _row(question, split_boxed(reasoning), "no 'answer', and no \\boxed{} in 'solution'")


def _from_tags(record: Record) -> Record:
    question = _text(record, _first_key(record, _QUESTION_KEYS))
    key = _first_key(record, _RESPONSE_KEYS)
    return _row(question, split_tags(_text(record, key)), f"no <answer>...</answer> in {key!r}")


def _from_messages(record: Record) -> Record:
    turns = record.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable("'messages' is not a list of objects with 'role' and 'content'")
    roles = [turn.get("role") for turn in turns]
    if "user" not in roles:
        raise Unusable("'messages' has no user turn")
    last_user = len(roles) - 1 - roles[::-1].index("user")
    if "assistant" not in roles[last_user:]:
        raise Unusable("'messages' has no assistant turn after the last user turn")
    text = _text(turns[roles.index("assistant", last_user)], "content")
    solution = split_tags(text) or split_hashes(text) or split_boxed(text)
    question = _text(turns[last_user], "content")
    row = _row(question, solution, "the assistant turn has no <answer>, '####' or \\boxed{}")
    if "system" in roles:
        row["system"] = _text(turns[roles.index("system")], "content")
    return row


_CONVERTERS: dict[str, Callable[[Record], Record]] = {
    "rows": _from_rows,
    "gsm8k": _from_gsm8k,
    "numina": _from_numina,
    "tags": _from_tags,
    "messages": _from_messages,
}


def _row(question: str, solution: Solution | None, reason: str) -> Record:
    if solution is None:
        raise Unusable(reason)
    reasoning, answer = solution
    return {"question": question.strip(), "reasoning": reasoning, "answer": answer}


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise Unusable(f"{key!r} is {'missing' if value is None else 'not a string'}")
    return value


def _first_key(record: Record, keys: Sequence[str]) -> str:
    for key in keys:
        if record.get(key) is not None:
            return key
    raise Unusable(f"none of the keys {', '.join(keys)}")


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """The file appears whole, or stays what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read.
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
