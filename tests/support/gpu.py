"""Condition of the tests in tests/gpu."""

import os

import pytest
import torch

IS_DRY = os.environ.get("AROPD_DRY_GPU_TESTS") == "1"
"""Whether `tools/gpu_check.py --dry-run` runs the tests on the CPU, as far as they can."""


def require_gpu(*, by_dry_run: bool = False) -> None:
    """Skip the test without a GPU.

    Args:
        by_dry_run: whether a dry run skips it, too, because it needs a GPU's libraries.
    """
    if not torch.cuda.is_available() and (by_dry_run or not IS_DRY):
        pytest.skip("no GPU")
