"""Rates of one GPU and its links, at the fast and the slow end of the plan's constants."""

from dataclasses import dataclass, fields

from aropd_mcore.plan.constants import constants
from aropd_mcore.plan.devices import PEAK_BF16_FLOPS


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak rates of one GPU per second, and the constants of constants.yaml with the same names.

    The peaks are those of an NVIDIA H100 SXM by its data sheet: dense bf16 and FP8, HBM3, NVLink 4
    (900 GB/s both ways), InfiniBand NDR with 400 Gbit/s per GPU, PCIe 5 x16 to the host.
    """

    bf16_flops: float = PEAK_BF16_FLOPS["H100"]
    fp8_flops: float = 1979e12
    memory_bytes: float = 3.35e12
    nvlink_bytes: float = 450e9
    """Bytes per second in each direction."""
    network_bytes: float = 50e9
    host_bytes: float = 64e9
    matmul_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    nvlink_efficiency: float
    network_efficiency: float
    host_efficiency: float
    disk_bytes: float
    launch_seconds: float
    captured_launch_seconds: float
    router_launch_seconds: float
    expert_launch_seconds: float
    collective_seconds: float
    sync_call_seconds: float
    sync_write_bytes: float
    sync_read_bytes: float


def _rates(*, fast: bool) -> Rates:
    """Return the rates at one end. Constants in seconds are fast when they are low."""
    values = {}
    for field in fields(Rates):
        if constant := constants().get(field.name):
            is_high = fast != field.name.endswith("_seconds")
            values[field.name] = (constant.high if is_high else constant.low).number
    return Rates(**values)


FASTEST = _rates(fast=True)
SLOWEST = _rates(fast=False)
