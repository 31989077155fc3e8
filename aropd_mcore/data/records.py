"""Reading of JSONL and Parquet records, each with its place in the file."""

import gzip
import json
import reprlib
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Error: data cannot be used. The message is `origin: problem; found ...`.

    Args:
        origin: a file, or `file:line`.
        problem: description of the problem and of the expected value. It contains none of the row's
            values, so that equal problems of many rows can be counted together.
        found: the value that was found.
    """

    def __init__(self, origin: str, problem: str, found: str = "") -> None:
        super().__init__(origin, problem, found)
        self.origin, self.problem, self.found = origin, problem, found

    def __str__(self) -> str:
        return f"{self.origin}: {self.problem}" + (f"; found {self.found}" if self.found else "")


Records = Iterator[tuple[str, dict[str, Any] | DataError]]


def read_records(path: Path, columns: Sequence[str] | None = None) -> Records:
    """Yield `(origin, record)` for every line of a JSONL file or row of a Parquet file.

    A file that ends in `.parquet` is Parquet. Any other file is JSONL, packed by gzip if its name
    ends in `.gz`. Blank lines are skipped. Origins are `file:line`, or `file:row` for Parquet,
    counted from 1.

    A record that cannot be read is yielded as a DataError, so that the caller decides whether to
    stop. Examples are a line that is not a JSON object, a JSON object that gives one key two
    values, and a Parquet value that Python cannot hold.

    Args:
        columns: keys that the caller uses. None: all keys. Parquet columns of other names are not
            read, and their values are None.

    Raises:
        DataError: the file is missing or cannot be read, two needed columns have the same name, or
            the file is Parquet and pyarrow is not installed.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
            raise DataError(str(path), "expected a regular file", kind)
        yield from _read_parquet(path, columns) if path.suffix == ".parquet" else _read_jsonl(path)
    except FileNotFoundError as error:
        raise DataError(str(path), "no such file") from error
    except OSError as error:
        raise DataError(str(path), "the file cannot be read", _one_line(error)) from error


def is_absent(value: Any) -> bool:
    """Return whether a value counts as missing: null, or the NaN that pandas writes."""
    return value is None or (isinstance(value, float) and value != value)


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = self.maxlist = self.maxdict = self.maxtuple = 4
        self.maxstring = self.maxlong = self.maxother = 60


def shown(value: Any) -> str:
    """Return a value's type and a short form of the value on one line, for an error's `found`."""
    # Unlike repr, reprlib does not process all of a deep or long value.
    text = " ".join(_Shown().repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def shown_keys(keys: Iterable[object]) -> str:
    """Return a record's keys on one line, for an error's `found`."""
    names = [name if name.isprintable() else ascii(name) for name in map(str, keys)]
    rest = [f"{len(names) - 20} more"] if len(names) > 20 else []
    return "keys " + (", ".join([name[:60] for name in names[:20]] + rest) or "none")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# JSONL

_OTHER_CONTENT = {
    b"PAR1": "Parquet data; name the file *.parquet",
    b"\x1f\x8b": "gzip data; name the file *.gz",
    b"\x28\xb5\x2f\xfd": "zstd data; unpack the file",
    b"PK\x03\x04": "a zip archive; unpack the file",
    b"\xff\xfe": "UTF-16 text; convert the file to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert the file to UTF-8",
    b"[": "a JSON array; write its elements one per line, as with `jq -c '.[]'`",
}
"""First bytes of files that are not JSONL, and the description of each for the error."""


def _read_jsonl(path: Path) -> Records:
    is_packed = path.suffix == ".gz"
    is_first = True
    try:
        with gzip.open(path) if is_packed else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if is_first:
                    _check_first_line(path, line)
                is_first = False
                yield f"{path}:{number}", _parse_line(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(str(path), "not a readable gzip file", _one_line(error)) from error


def _check_first_line(path: Path, line: bytes) -> None:
    line = line.removeprefix(b"\xef\xbb\xbf").lstrip()
    content = next((text for start, text in _OTHER_CONTENT.items() if line.startswith(start)), None)
    if line.rstrip() == b"{":
        content = "a JSON object over several lines; rewrite the file with `jq -c .`"
    if content:
        raise DataError(str(path), "expected JSONL: one JSON object per line", content)


def _parse_line(line: bytes, origin: str) -> dict[str, Any] | DataError:
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return DataError(origin, "the line is not UTF-8", f"byte {line[error.start]:#04x}")
    except _RepeatedKey as error:
        problem = "the line gives one key two values: remove one of them"
        return DataError(origin, problem, f"key {shown(error.args[0])}")
    except RecursionError:
        return DataError(origin, "the line is not JSON", "too many levels of nesting")
    except ValueError as error:  # JSONDecodeError, or an integer of more than 4300 digits
        return DataError(origin, "the line is not JSON", _one_line(error))
    if not isinstance(record, dict):
        return DataError(origin, "expected one JSON object per line", type(record).__name__)
    return record


class _RepeatedKey(Exception):
    """Error: a JSON object has a key twice, with different values."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        for key, value in pairs:
            # Compare by repr, since 1 == 1.0 == True and NaN != NaN.
            if repr(value) != repr(record[key]):
                raise _RepeatedKey(key)
    return record


# Parquet


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Records:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            str(path), "Parquet needs pyarrow: pip install 'aropd-mcore[parquet]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            all_names = file.schema_arrow.names
            names = [name for name in all_names if columns is None or name in columns]
            repeated = [name for name, count in Counter(names).items() if count > 1]
            if repeated:
                problem = "expected columns of different names: rename or remove one"
                raise DataError(str(path), problem, f"two columns {shown(repeated[0])}")
            unread = dict.fromkeys(all_names)
            for batch in file.iter_batches(batch_size=1024, columns=names):
                # For the column name "a", pyarrow also reads a column named "a.b".
                for record in _as_records(batch.select(names)):
                    number += 1
                    origin = f"{path}:{number}"
                    if isinstance(record, DataError):
                        record.origin = origin
                        yield origin, record
                    else:
                        yield origin, unread | record
    except DataError:
        raise
    # Damaged files raise more than ArrowException: UnicodeDecodeError, OverflowError, OSError.
    except Exception as error:
        raise DataError(str(path), "not a readable Parquet file", _one_line(error)) from error


def _as_records(batch: Any) -> list[dict[str, Any] | DataError]:
    """Return the rows of a pyarrow RecordBatch. The DataErrors have no origin yet."""
    try:
        return batch.to_pylist()
    except Exception:
        return [_as_record(batch, index) for index in range(batch.num_rows)]


def _as_record(batch: Any, index: int) -> dict[str, Any] | DataError:
    record = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            record[name] = column[index].as_py()
        # pyarrow does not document the exceptions. Known ones are OverflowError (dates beyond year
        # 9999), ValueError (nanoseconds), ArrowInvalid (time zones) and UnicodeDecodeError.
        except Exception as error:
            problem = f"column {name!r}: expected a value that Python can hold"
            return DataError("", problem, f"{column.type}: {_one_line(error)}")
    return record
