"""Fixtures that every part of the suite may use."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's own functions are made for its interpreter, or not, when it is first imported, and
    # Megatron imports it: it has to be decided before any test.
    os.environ["TRITON_INTERPRET"] = "1"

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets and the Qwen2 tokenizer: $AROPD_DATA, or ../shared/data."""
    folder = Path(os.environ.get("AROPD_DATA") or REPO.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set AROPD_DATA to the folder of data sets")
    return folder
