"""Fixtures: checkpoints to damage, and the `aropd convert` commands in this process."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aropd_mcore.cli import main
from tests.support.tiny_models import save_tiny_model

Convert = Callable[..., str]


@pytest.fixture
def convert(capsys) -> Convert:
    """Run an `aropd convert` command that must succeed. Returns its output."""

    def run(*arguments: Any) -> str:
        status = main(["convert", *map(str, arguments)])
        printed = capsys.readouterr()
        assert status == 0, printed.out + printed.err
        return printed.out

    return run


@pytest.fixture
def refused(capsys, tmp_path: Path) -> Convert:
    """Run an `aropd convert` command that must fail with an error of one line, writing nothing."""

    def run(*arguments: Any, because: str) -> str:
        before = everything_in(tmp_path)
        status = main(["convert", *map(str, arguments)])
        error = capsys.readouterr().err
        assert status == 2 and error.startswith("aropd: error: "), error
        assert error.count("\n") == 1 and error.endswith("\n")
        assert because in error
        assert everything_in(tmp_path) == before
        return error

    return run


def everything_in(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return every path under a folder, including hidden ones, with file size and time stamp."""
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    empty = {path: (0, 0) for path in folder.rglob("*") if path.is_dir()}
    return empty | {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Path:
    """Create `hf`, a tiny Qwen2 in one file; `shards`, in several files; `mcore`, imported."""
    folder = tmp_path_factory.mktemp("originals")
    for name, size in (("hf", "5GB"), ("shards", "100KB")):
        save_tiny_model(
            "qwen2",
            folder / name,
            num_hidden_layers=2,
            dtype=torch.bfloat16,
            max_shard_size=size,
        )
    assert main(["convert", "import", str(folder / "hf"), str(folder / "mcore")]) == 0
    return folder


def _copy(name: str):
    @pytest.fixture(name=name)
    def copy(originals: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(originals / name, tmp_path / name))

    return copy


hf, shards, mcore = _copy("hf"), _copy("shards"), _copy("mcore")
