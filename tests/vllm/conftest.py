"""Tests with a real vLLM, which is installed in a separate environment."""

import os

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and not os.environ.get("AROPD_VLLM_PYTHON"):
        pytest.skip("needs AROPD_VLLM_PYTHON, a Python interpreter with vLLM: run `make test-vllm`")
