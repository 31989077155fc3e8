"""Fixtures that select the torch passes or the Triton kernels of the loss."""

import os

import pytest
import torch

from aropd_mcore.numerics import fused_linear, kl


@pytest.fixture
def by_kernels(monkeypatch) -> None:
    """Make the losses of CPU tensors use the Triton kernels, in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert torch.cuda.is_available(), "tests/conftest.py sets it"
        pytest.skip("Triton compiles for this machine's GPU: see the tests marked gpu")
    from aropd_mcore.numerics import kernels

    for module in (kl, fused_linear):
        monkeypatch.setattr(module, "passes_for", lambda views: kernels)


@pytest.fixture(params=["torch", "kernels"])
def either_passes(request) -> None:
    if request.param == "kernels":
        request.getfixturevalue("by_kernels")
