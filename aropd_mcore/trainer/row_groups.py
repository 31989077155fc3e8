"""Groups of rows that metrics are reported for: the rows of one teacher, or of one domain."""

from collections import Counter
from collections.abc import Iterator

from aropd_mcore.config import Config
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.types import Row

MAX_DOMAINS = 32
"""Largest number of domains with metrics. Published data sets may have a domain per row."""


def groups_of(row: Row) -> list[str]:
    """Return the names of a row's groups: `teacher/NAME` and `domain/NAME`."""
    names = {"teacher": row.teacher, "domain": row.domain}
    return [f"{kind}/{name}" for kind, name in names.items() if name]


def metric_groups(config: Config, dataset: RowDataset) -> list[str]:
    """Return the names of all groups that a run reports metrics for."""
    domains = dataset.domains
    if len(domains) > MAX_DOMAINS:
        domains = []
    return [f"teacher/{name}" for name in config.row_teachers] + [f"domain/{d}" for d in domains]


def describe_groups(config: Config, dataset: RowDataset) -> Iterator[str]:
    """Yield notes for the user about the rows of each teacher and about the domains."""
    if config.row_teachers:
        num_rows = Counter(row.teacher for row in dataset)
        parts = [f"{name} {num_rows[name]}" for name in config.row_teachers]
        yield f"rows by teacher: {', '.join(parts)}"
    num_domains = len(dataset.domains)
    if num_domains > MAX_DOMAINS:
        yield (
            f"no metrics by domain: the rows have {num_domains} domains, expected at most "
            f"{MAX_DOMAINS}"
        )
