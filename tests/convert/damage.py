"""Shared functions that damage a checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from aropd_mcore.convert.hf_io import SINGLE

NORM = "model.norm.weight"
Break = Callable[[Path], Any]
"""A function that damages a folder."""


def cut(name: str, size: int) -> Break:
    """Return a function that keeps `size` bytes of a file, or for size < 0 drops the last -size."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return change


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Break:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)

    return rewrite


class Evil:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)
