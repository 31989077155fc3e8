"""Fixtures of the whole test suite."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

from tests.support.tiers import starts_processes

if not torch.cuda.is_available():
    # Triton reads this variable at its first import, which Megatron triggers. So it is set before
    # any test.
    os.environ["TRITON_INTERPRET"] = "1"

REPO = Path(__file__).resolve().parent.parent

# `make test` repeats the same examples. `make test-rest` draws others from a printed seed.
settings.register_profile("fixed", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("seeded", deadline=None, max_examples=200, print_blob=True)
settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Each of two workers takes whole files. The longest comes first, so that both end together.
    items.sort(key=lambda item: item.path.name != "test_step.py")
    for item in items:
        if starts_processes(item):
            item.add_marker("processes")
        if is_hypothesis_test(getattr(item, "function", None)) or "seed" in item.fixturenames:
            item.add_marker("seeded")


@pytest.fixture(scope="session")
def seed(request) -> int:
    """Seed of a test's random examples: --hypothesis-seed, or 1."""
    return int(request.config.getoption("--hypothesis-seed") or 1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets and the Qwen2 tokenizer: $AROPD_DATA, or ../shared/data."""
    folder = Path(os.environ.get("AROPD_DATA") or REPO.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing; set AROPD_DATA to the folder of data sets")
    return folder
