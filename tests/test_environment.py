"""CUDA's variables and the limit of open files in ranks and in vLLM servers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.tiny_runs import write_run

NAMES = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
REPORT = """
import importlib.abc, json, os, resource, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch" and "RANK" in os.environ:
            values = [os.environ.get(name) for name in {names}]
            line = json.dumps([*values, *resource.getrlimit(resource.RLIMIT_NOFILE)])
            os.write(2, f"at-torch {{line}}\\n".encode())  # in a single write
        return None

sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize module, which reports a rank's environment when the rank imports torch."""


def environment(folder: Path, **more: str) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(REPORT.format(names=NAMES))
    own = {name: value for name, value in os.environ.items() if name not in NAMES}
    return own | {"PYTHONPATH": f"{folder}:{REPO}"} | more


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, ["1", "expandable_segments:True", None]),
        ({NAMES[0]: "8", NAMES[1]: "max_split_size_mb:64"}, ["8", "max_split_size_mb:64", None]),
        ({NAMES[2]: "max_split_size_mb:64"}, ["1", None, "max_split_size_mb:64"]),
    ],
)
def test_ranks_have_cudas_variables_and_all_files_before_torch(tmp_path, given, expected):
    """The launcher is Python code without these settings, as torchrun is."""
    path = write_run(tmp_path)
    code = (
        "import resource, sys\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))\n"
        "from aropd_mcore.local_launch import start_ranks\n"
        f"sys.exit(start_ranks(1, ['train', {str(path)!r}, '--dry-run']))\n"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, env=environment(tmp_path, **given), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("at-torch ")]
    *values, soft, hard = json.loads(lines[0].removeprefix("at-torch "))
    assert values == expected
    assert soft == hard


def test_server_does_not_inherit_cudas_variables(tmp_path):
    """`aropd serve` with a program that prints its environment in place of vLLM's interpreter."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec env\n")
    program.chmod(0o755)
    path = write_run(tmp_path, rollout={"engine": "vllm", "vllm": {"python": str(program)}})
    words = [sys.executable, "-m", "aropd_mcore.cli", "serve", str(path), "rollout.vllm.port=8000"]
    given = {NAMES[0]: "1", NAMES[1]: "expandable_segments:True", NAMES[2]: "max_split_size_mb:1"}
    done = subprocess.run(
        words, env=environment(tmp_path, **given), cwd=tmp_path, capture_output=True, text=True
    )
    names = [line.partition("=")[0] for line in done.stdout.splitlines()]
    assert "VLLM_API_KEY" in names, done.stderr
    assert not set(NAMES) & set(names)
