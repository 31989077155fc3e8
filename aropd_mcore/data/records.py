"""Records of JSONL and Parquet files, each with the place it came from."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Data that cannot be used: `origin: problem; found ...`.

    Args:
        origin: a file, or `file:line`.
        problem: what is wrong and what is expected, free of the row's own values, so that equal
            problems of many rows can be counted together.
        found: what stood there instead.
    """

    def __init__(self, origin: str, problem: str, found: str = "") -> None:
        super().__init__(origin, problem, found)
        self.origin, self.problem, self.found = origin, problem, found

    def __str__(self) -> str:
        return f"{self.origin}: {self.problem}" + (f"; found {self.found}" if self.found else "")


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Yield `(origin, record)` for every line of a JSONL file or row of a Parquet file.

    A file that ends in `.parquet` is Parquet, any other is JSONL, packed by gzip where it ends in
    `.gz`; blank lines are passed over.
    Origins are `file:line`, or `file:row` for Parquet, counted from 1. A line that is no JSON
    object comes as a DataError in the record's place, so that the caller decides whether it stops.

    Raises:
        DataError: the file is missing or cannot be read, or it is Parquet and pyarrow is absent.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(str(path), "no such file")
    yield from _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    is_packed = path.suffix == ".gz"
    with gzip.open(path) if is_packed else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse_line(line, f"{path}:{number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(str(path), "not a readable gzip file", str(error)) from error


def _parse_line(line: bytes, origin: str) -> dict[str, Any] | DataError:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return DataError(origin, "the line is not UTF-8", f"byte {line[error.start]:#04x}")
    except (json.JSONDecodeError, RecursionError) as error:
        return DataError(origin, "the line is not JSON", str(error))
    if not isinstance(record, dict):
        return DataError(origin, "expected one JSON object a line", type(record).__name__)
    return record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            str(path), "Parquet needs pyarrow: pip install 'aropd-mcore[parquet]'"
        ) from error
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except pa.ArrowException as error:
        raise DataError(str(path), "not a readable Parquet file", str(error)) from error
