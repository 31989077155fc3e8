"""Reading of tables: Parquet files, and data sets through the package `datasets`."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aropd_mcore.config import hub_name
from aropd_mcore.data.records import DataError, Records, missing_package, one_line, shown

_BATCH_ROWS = 1024


def read_parquet(path: Path, columns: Sequence[str] | None) -> Records:
    """Read a Parquet file as records.read_records does."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package(str(path), "Parquet", "pyarrow", "parquet") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = _chosen(str(path), file.schema_arrow.names, columns)
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=names)
            # For the column name "a", pyarrow also reads a column named "a.b".
            selected = (batch.select(names) for batch in batches)
            yield from _records(str(path), selected, file.schema_arrow.names)
    except DataError:
        raise
    # Damaged files raise more than ArrowException: UnicodeDecodeError, OverflowError, OSError.
    except Exception as error:
        raise DataError(str(path), "not a readable Parquet file", one_line(error)) from error


def read_saved(folder: Path, columns: Sequence[str] | None) -> Records:
    """Read a folder that `Dataset.save_to_disk` wrote as records.read_records does."""
    origin = str(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        named = ", ".join(f"{folder}/{split}" for split in splits)
        raise DataError(origin, "expected one split: name its folder", f"splits {named or 'none'}")
    if not (folder / "state.json").is_file():
        problem = "expected a file, or a folder that `Dataset.save_to_disk` wrote"
        raise DataError(origin, problem, "a directory without state.json")
    datasets = _import_datasets(origin, "a saved data set")
    try:
        # `load_from_disk` fails if no row was saved: there are no files then.
        if json.loads((folder / "state.json").read_bytes())["_data_files"]:
            yield from _data_set_records(origin, datasets.load_from_disk(origin), columns)
    except DataError:
        raise
    except Exception as error:  # OSError, ArrowInvalid, JSONDecodeError, KeyError and others
        raise DataError(origin, "not a readable saved data set", one_line(error)) from error


def read_hub(source: Path, columns: Sequence[str] | None) -> Records:
    """Read a split of a data set of the Hugging Face hub as records.read_records does.

    The package `datasets` keeps it in its cache, and reads it from there if the hub cannot be
    reached or HF_HUB_OFFLINE is set.
    """
    name = hub_name(source)
    assert name is not None
    origin = str(name)
    datasets = _import_datasets(origin, "a data set of the hub")
    try:
        data_set = datasets.load_dataset(
            name.repository, name.subset, split=name.split, revision=name.revision
        )
        yield from _data_set_records(origin, data_set, columns)
    except DataError:
        raise
    except ConnectionError as error:
        problem = (
            "the hub cannot be reached, and the cache does not have the data set: run once with a "
            "network and the same HF_HOME, or name files"
        )
        raise DataError(origin, problem, one_line(error)) from error
    # An unknown name, subset, split or revision, and files that are no table. Among the types are
    # ValueError, FileNotFoundError and those of pyarrow, httpx and huggingface_hub.
    except Exception as error:
        raise DataError(origin, "the data set cannot be loaded", one_line(error)) from error


def _import_datasets(origin: str, source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_package(origin, source, "datasets", "datasets") from error
    return datasets


def _data_set_records(origin: str, data_set: Any, columns: Sequence[str] | None) -> Records:
    """Yield the records of a `datasets.Dataset`, in its own order."""
    names = _chosen(origin, data_set.column_names, columns)
    # Without any column, the tables would have no rows.
    read = names or data_set.column_names[:1]
    tables = data_set.with_format("arrow", columns=read).iter(_BATCH_ROWS)
    yield from _records(origin, tables, data_set.column_names)


def _chosen(origin: str, names: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """Return the names of the columns to read."""
    chosen = [name for name in names if columns is None or name in columns]
    repeated = [name for name, count in Counter(chosen).items() if count > 1]
    if repeated:
        problem = "expected columns of different names: rename or remove one"
        raise DataError(origin, problem, f"two columns {shown(repeated[0])}")
    return chosen


def _records(origin: str, tables: Iterable[Any], names: Sequence[str]) -> Records:
    """Yield the rows of pyarrow tables or batches. `names` are all columns of the source."""
    unread, number = dict.fromkeys(names), 0
    for table in tables:
        for record in _as_records(table):
            number += 1
            place = f"{origin}:{number}"
            if isinstance(record, DataError):
                record.origin = place
                yield place, record
            else:
                yield place, unread | record


def _as_records(batch: Any) -> list[dict[str, Any] | DataError]:
    """Return the rows of a pyarrow table or batch. The DataErrors have no origin yet."""
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
            return DataError("", problem, f"{column.type}: {one_line(error)}")
    return record
