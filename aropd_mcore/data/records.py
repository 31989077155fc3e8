"""Reading of records from files and data sets, each with its place. JSONL is read here, tables in
`tables.py`."""

import gzip
import hashlib
import json
import reprlib
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aropd_mcore.config import hub_name

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj


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
    """Yield `(origin, record)` for every record of a source.

        *.parquet              rows of a Parquet file
        any other file         lines of JSONL, packed by gzip (*.gz) or zstd (*.zst) or not at all
        a folder               rows of a data set that `Dataset.save_to_disk` wrote
        hf://NAMESPACE/NAME    rows of a data set of the Hugging Face hub (config.HUB_SYNTAX)

    Blank lines are skipped. Origins are `source:line` or `source:row`, counted from 1.

    A record that cannot be read is yielded as a DataError, so that the caller decides whether to
    stop. Examples are a line that is not a JSON object, a JSON object that gives one key two
    values, and a Parquet value that Python cannot hold.

    Args:
        columns: keys that the caller uses. None: all keys. Columns of other names are not read from
            tables, and their values are None.

    Raises:
        ConfigError: a path that begins with hf:// is no name of a data set.
        DataError: the source is missing or cannot be read, needs a package that is not installed,
            has two needed columns of the same name, or has several splits.
    """
    path = Path(path)
    if hub_name(path) is None:
        yield from _read_local(path, columns)
    else:
        from aropd_mcore.data.tables import read_hub

        yield from read_hub(path, columns)


def _read_local(path: Path, columns: Sequence[str] | None) -> Records:
    from aropd_mcore.data.tables import read_parquet, read_saved

    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            yield from read_saved(path, columns)
        elif not stat.S_ISREG(mode):
            raise DataError(str(path), "expected a regular file", "a pipe, socket or device")
        else:
            yield from read_parquet(path, columns) if path.suffix == ".parquet" else _jsonl(path)
    except FileNotFoundError as error:
        raise DataError(str(path), "no such file") from error
    except OSError as error:
        raise DataError(str(path), "the file cannot be read", one_line(error)) from error


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or of the records of a folder or hub data set.

    Raises:
        DataError: see read_records.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for _, record in read_records(path):
        digest.update(json.dumps(record, default=str).encode() + b"\n")
    return digest.hexdigest()


def is_absent(value: Any) -> bool:
    """Return whether a value counts as missing: null, or the NaN that pandas writes."""
    return value is None or (isinstance(value, float) and value != value)


def missing_package(origin: str, source: str, package: str, extra: str) -> DataError:
    """Return the error of a source that needs an optional package."""
    return DataError(origin, f"{source} needs {package}: pip install 'aropd-mcore[{extra}]'")


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


def one_line(error: Exception) -> str:
    """Return an error's text on one line, for an error's `found`."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# JSONL

_OTHER_CONTENT = {
    b"PAR1": "Parquet data; name the file *.parquet",
    b"\x1f\x8b": "gzip data; name the file *.gz",
    b"\x28\xb5\x2f\xfd": "zstd data; name the file *.zst",
    b"PK\x03\x04": "a zip archive; unpack the file",
    b"\xff\xfe": "UTF-16 text; convert the file to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert the file to UTF-8",
    b"[": "a JSON array; write its elements one per line, as with `jq -c '.[]'`",
}
"""First bytes of files that are not JSONL, and the description of each for the error."""


def _jsonl(path: Path) -> Records:
    is_first = True
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        if is_first:
            _check_first_line(path, line)
        is_first = False
        yield f"{path}:{number}", _parse_line(line, f"{path}:{number}")


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zstd_lines(path)
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(str(path), "not a readable gzip file", one_line(error)) from error


def _zstd_lines(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise missing_package(str(path), "a .zst file", "zstandard", "zstd") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # `zstd --long=31` writes it
    rest = b""
    try:
        with path.open("rb") as file:
            for data in _zstd_chunks(file, decompressor.decompressobj):
                *lines, rest = (rest + data).split(b"\n")
                yield from lines
    except (EOFError, zstandard.ZstdError) as error:
        raise DataError(str(path), "not a readable zstd file", one_line(error)) from error
    yield rest


def _zstd_chunks(
    file: IO[bytes], new_frame: "Callable[[], ZstdDecompressionObj]"
) -> Iterator[bytes]:
    """Yield the unpacked data of a file of zstd frames.

    zstandard's own stream_reader accepts a file that is cut off within a frame.

    Raises:
        EOFError: the file is cut off.
    """
    frame = None
    while packed := file.read(1 << 16):
        while packed:
            frame = frame or new_frame()
            yield frame.decompress(packed)
            if not frame.eof:
                break
            packed, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the file ends within a frame")


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
        return DataError(origin, "the line is not JSON", one_line(error))
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
