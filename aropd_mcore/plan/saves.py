"""Time of a save and of a resume, from the bytes of the checkpoint."""

from typing import NamedTuple

from aropd_mcore.plan.host_memory import checkpoint_bytes
from aropd_mcore.plan.rates import Rates
from aropd_mcore.plan.setup import Setup


class SaveTime(NamedTuple):
    """Seconds of a save and of a resume."""

    waits: float
    """Copying from GPU to host, while training waits."""
    writes: float
    """Writing in the background."""
    reads: float
    """Reading at a resume: once for the checksums, once for the tensors."""


def save_time(setup: Setup, rates: Rates) -> SaveTime:
    """Return the seconds, if every rank of a node has as much as the one with the most."""
    on_rank = checkpoint_bytes(setup)
    writes = on_rank * min(setup.gpus_per_node, setup.world_size) / rates.disk_bytes
    copied = on_rank / (rates.host_bytes * rates.host_efficiency)
    return SaveTime(copied, writes, 2 * writes)
