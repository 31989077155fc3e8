"""`aropd launch` with a fake sbatch, which records its arguments and environment."""

import sys
from pathlib import Path

import pytest

from aropd_mcore import cli
from tests.conftest import REPO
from tests.support.tiny_runs import write_run


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """File that the fake sbatch writes: one argument per line, then the scripts' variables."""
    folder, record = tmp_path / "bin", tmp_path / "record"
    folder.mkdir()
    program = folder / "sbatch"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" "$AROPD_HOME" "$VENV" "$RANKS_PER_NODE" "$VLLM_NODES" '
        f"> '{record}'\n"
    )
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    for name in ("AROPD_HOME", "VENV", "CONTAINER_IMAGE", "RANKS_PER_NODE", "VLLM_NODES"):
        monkeypatch.delenv(name, raising=False)
    return record


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "a run", parallel={"tensor": 2}, training={"global_batch_size": 24})


def test_launch_passes_options_and_variables_to_sbatch(run, sbatch, capsys):
    words = ["launch", str(run), "optimizer.lr=1e-5", "--nodes", "3", "--gpus-per-node", "4"]
    words += ["--preset", "sdft"]
    assert cli.main([*words, "--", "--partition=a b", "--exclude=n7"]) == 0
    expected = ["--job-name=aropd-out", "--nodes=3", "--gpus-per-node=4", "--partition=a b"]
    expected += ["--exclude=n7", f"{REPO}/slurm/train.sbatch", str(run), "--preset", "sdft"]
    expected += ["optimizer.lr=1e-5"]
    expected += [str(REPO), sys.prefix, "4", ""]
    assert sbatch.read_text().splitlines() == expected
    printed = capsys.readouterr().out
    assert "# preset sdft: objective.residual_scale: 0.8 -> 1.0" in printed
    assert "# 12 ranks: TP 2" in printed and "'--partition=a b'" in printed

    # One of three nodes runs servers, so eight ranks train.
    assert cli.main([*words, "--vllm-nodes", "1"]) == 0
    lines = sbatch.read_text().splitlines()
    assert f"{REPO}/slurm/serve_and_train.sbatch" in lines and lines[-1] == "1"
    assert "# 8 ranks: TP 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.num_stepz=3"], "did you mean 'num_steps'?"),
        (["parallel.tensor=3"], "parallel.tensor 3: expected a divisor of"),
        (["--nodes", "2", "--vllm-nodes", "2"], "--vllm-nodes 2: expected 0 to 1 of 2 nodes"),
    ],
)
def test_launch_with_an_invalid_config_submits_nothing(run, sbatch, capsys, words, message):
    assert cli.main(["launch", str(run), *words]) == 2
    assert message in capsys.readouterr().err
    assert not sbatch.exists()


def test_launch_dry_run_prints_command_and_script_and_submits_nothing(run, sbatch, capsys):
    assert cli.main(["launch", str(run), "--dry-run", "--", "--time=60"]) == 0
    printed = capsys.readouterr().out
    assert f"sbatch --job-name=aropd-out --nodes=1 --gpus-per-node=8 --time=60 {REPO}" in printed
    assert printed.rstrip().endswith((REPO / "slurm/train.sbatch").read_text().rstrip())
    assert not sbatch.exists()


def test_launch_without_sbatch_on_path_exits_with_2(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", str(run)]) == 2
    assert "sbatch is not on PATH" in capsys.readouterr().err
