"""Peak arithmetic of GPUs."""

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
}
"""Part of a device's name, as CUDA reports it -> dense bf16 FLOP/s of NVIDIA's data sheet."""


def peak_bf16_flops(device_name: str) -> float | None:
    """Look up dense bf16 FLOP/s of one GPU; None for a device that is not in the table.

    A MIG instance has a share of its GPU's units, which its name does not state in FLOP/s: None.

    Args:
        device_name: as `torch.cuda.get_device_name()` returns it.
    """
    words = f" {device_name} ".replace("-", " ")
    if " MIG " in words:
        return None
    names = [name for name in PEAK_BF16_FLOPS if f" {name} " in words]
    return PEAK_BF16_FLOPS[max(names, key=len)] if names else None
