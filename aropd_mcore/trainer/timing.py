"""Where a step's time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timer:
    """Wall-clock seconds by phase; waits for the GPU at a phase's end."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
