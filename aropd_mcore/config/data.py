"""Section `data`: the sources of training rows."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PlainSerializer, WrapValidator

from aropd_mcore.config.section import ConfigError, Section, by_type


def split_task(text: str) -> tuple[str, str | None, str]:
    """Split NAME=FILE or NAME:FORMAT=FILE into name, format (None without a colon) and file."""
    name, _, path = text.partition("=")
    name, colon, format = name.partition(":")
    return name, format if colon else None, path


HUB_SYNTAX = "hf://NAMESPACE/NAME[@REVISION][/SUBSET][/SPLIT]"
_HUB_NAME = re.compile(r"hf:/+([^/@]+/[^/@]+)(?:@([^/]+))?(?:/([^/]+)(?=/))?(?:/([^/]+))?")


class HubName(NamedTuple):
    """Name of a data set of the Hugging Face hub, parsed by `hub_name`."""

    repository: str
    revision: str | None
    """Branch, tag or commit. None: the default branch."""
    subset: str | None
    """Name of a configuration of the data set. None: its default."""
    split: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        parts = filter(None, (self.repository + revision, self.subset, self.split))
        return f"hf://{'/'.join(parts)}"


def hub_name(path: Path) -> HubName | None:
    """Parse a path of the form HUB_SYNTAX. The split is `train` unless the path states one.

    Returns:
        None if the path names a local file or folder: it does not begin with `hf:/`.
    Raises:
        ConfigError: the path begins with `hf:/` and has another form.
    """
    text = path.as_posix()  # Path turns hf:// into hf:/
    if not text.startswith("hf:/"):
        return None
    parts = _HUB_NAME.fullmatch(text)
    if parts is None:
        raise ConfigError(f"{source_name(path)}: expected {HUB_SYNTAX}")
    repository, revision, subset, split = parts.groups()
    return HubName(repository, revision, subset, split or "train")


def source_name(path: Path) -> str:
    """Return the text that a path was parsed from, with `hf://` for a data set of the hub."""
    return re.sub("^hf:/+", "hf://", str(path))


def _check_source(value: Any, handler: Any) -> Path:
    path = handler(value)
    hub_name(path)
    return path


Source = Annotated[
    Path, WrapValidator(_check_source), PlainSerializer(source_name, when_used="json")
]
"""File, saved data set or data set of the hub that has records."""


class WeightedSource(Section):
    """Source of training rows with a weight."""

    path: Source
    """Source of the rows."""
    weight: Annotated[float, Field(gt=0, le=1000)]
    """Number of times that an epoch draws each row on average. The order of an epoch is in
    memory."""


def _plain_source(source: Path | WeightedSource) -> Any:
    return source_name(source) if isinstance(source, Path) else source.model_dump(mode="json")


TrainingSource = Annotated[
    Path | WeightedSource,
    by_type(dict | WeightedSource, WeightedSource, Source),
    # Pydantic would serialize all members of the union as the first one.
    PlainSerializer(_plain_source, when_used="json"),
]


class DataConfig(Section):
    """Training rows."""

    train: list[TrainingSource] = Field(min_length=1)
    """Sources of rows with `question`, `reasoning` and `answer`: JSONL files (also .gz and .zst),
    Parquet files, folders of `Dataset.save_to_disk`, and data sets of the Hugging Face hub
    (`hf://NAMESPACE/NAME[@REVISION][/SUBSET][/SPLIT]`). An entry may be {path: SOURCE, weight: W}.
    Then each epoch draws W times the number of the source's rows from it, rounded. Without a
    weight, each epoch has each row once."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Action on an invalid row. `error`: stop and report its file and line. `skip`: leave it out
    and count it."""
    shuffle: bool = True
    """Order of the rows. true: a permutation drawn from (seed, epoch). false: as in the
    sources."""

    @property
    def paths(self) -> list[Path]:
        """Sources of `train` without their weights."""
        return [source if isinstance(source, Path) else source.path for source in self.train]
