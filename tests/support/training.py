"""Helpers that start training runs and read their output."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aropd_mcore.convert.manifest import newest

NOT_REPEATABLE = ("seconds/", "tokens_per_second", "rollout_tokens_per_second")
"""Prefixes of metrics that depend on the machine."""
LAYOUT_DEPENDENT = ("padding_fraction",)
"""Metrics that depend on the layout, because layouts form and pad microbatches differently."""


def train_on_ranks(path: Path, overrides: list[str]) -> None:
    """Train on this rank of a run_ranks world."""
    from aropd_mcore.config_file import load_config
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.loop import train

    config = load_config(path, overrides)
    train(config, start_runtime(config))


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "aropd_mcore.cli", "train", str(path), *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def read_lines(out: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a run's metrics.jsonl."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def repeatable(
    lines: list[dict[str, Any]], excluded: tuple[str, ...] = NOT_REPEATABLE
) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(excluded)}
        for line in lines
    ]


def saved_steps(out: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("iter_")) for p in out.glob("checkpoints/iter_*"))


def read_checkpoints(outs: list[Path]) -> list[dict[str, Any]]:
    """Read the newest checkpoint of each run: name -> whole tensor or value. Runs on a rank."""
    from megatron.core import dist_checkpointing

    checkpoints = []
    for out in outs:
        path = newest(out / "checkpoints")
        assert path is not None
        checkpoints.append(flattened(dist_checkpointing.load_plain_tensors(str(path))))
    return checkpoints


def assert_same_checkpoint(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the tensors and values of two results of read_checkpoints bitwise."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, name


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= (
            flattened(value, f"{prefix}{name}/")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat


def assert_same_in_any_layout(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    excluded = NOT_REPEATABLE + LAYOUT_DEPENDENT
    for line, other in zip(
        repeatable(lines, excluded), repeatable(expected, excluded), strict=True
    ):
        assert line == pytest.approx(other, rel=1e-4)
