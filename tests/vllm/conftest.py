"""Tests here serve models with a real vLLM, which has an environment of its own."""

import os

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and not os.environ.get("AROPD_VLLM_PYTHON"):
        pytest.skip("AROPD_VLLM_PYTHON names no Python that has vLLM: run `make test-vllm`")
