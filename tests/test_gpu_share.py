"""Split of a machine's GPUs between ranks and vLLM servers, with an injected number of GPUs."""

from pathlib import Path

import pytest
import torch

from aropd_mcore import cli
from aropd_mcore.cli import ranks
from aropd_mcore.config import ConfigError
from aropd_mcore.config_file import load_config
from aropd_mcore.plan.gpu_share import server_memory_share
from aropd_mcore.plan.memory import worst_stage
from aropd_mcore.plan.setup import build_setup
from tests.support.tiny_runs import write_run


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run of TP 2 with two servers, on a machine with eight GPUs."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "RANKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o700)
    path = write_run(
        tmp_path,
        parallel={"tensor": 2},
        training={"global_batch_size": 24, "micro_batch_size": 2},
        rollout={
            "engine": "vllm",
            "vllm": {"servers": 2, "devices": ["6", "7"], "python": str(python)},
        },
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    return path


def test_dry_run_puts_ranks_on_the_gpus_that_servers_leave(run, capsys):
    assert cli.main(["train", str(run), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "# 6 processes: TP 2" in printed
    assert "# the ranks use GPUs 0, 1, 2, 3, 4, 5; vLLM servers use the others" in printed


def test_dry_run_with_colocated_servers_puts_ranks_on_all_gpus(run, capsys):
    assert cli.main(["train", str(run), "rollout.vllm.placement=colocated", "--dry-run"]) == 0
    assert "# 8 processes: TP 2" in capsys.readouterr().out


def test_colocated_servers_get_the_memory_that_training_leaves(run):
    config = load_config(run, ["rollout.vllm.placement=colocated"])
    parts = worst_stage(build_setup(config, 2)).state
    state = sum(parts.values()) - parts["gradients"]
    memory = round(10e9 + state)
    assert server_memory_share(config, 2, memory) == pytest.approx(7e9 / memory)
    with pytest.raises(ConfigError, match=r"training keeps .* at least 10% for a server"):
        server_memory_share(config, 2, round(3.3e9 + state))


def test_train_starts_its_ranks_on_the_gpus_that_servers_leave(run, monkeypatch):
    started = []

    def start_ranks(count, arguments, *, gpus):
        started.append((count, gpus))
        return 0

    monkeypatch.setattr(ranks, "start_ranks", start_ranks)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3,2,1,0")
    assert cli.main(["train", str(run)]) == 0
    assert cli.main(["train", str(run), "--nproc-per-node", "2"]) == 0
    # One rank is not this process, which CUDA may have shown all GPUs already.
    assert cli.main(["train", str(run), "--nproc-per-node", "1", "parallel.tensor=1"]) == 0
    assert cli.main(["train", str(run), 'rollout.vllm.devices=["8", "9"]']) == 0
    expected = [(6, ["5", "4", "3", "2", "1", "0"]), (2, ["5", "4"]), (1, ["5"]), (8, None)]
    assert started == expected


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # Six GPUs are three data-parallel ranks, which do not divide the batch.
        (
            ["training.global_batch_size=16"],
            [
                "3 data-parallel ranks",
                "rollout.vllm.devices leaves 6 GPUs to training. 4 + 4 of 8 GPUs would fit",
                """rollout.vllm.servers=4 'rollout.vllm.devices=["4", "5", "6", "7"]'""",
                "--nproc-per-node 4",
            ],
        ),
        (
            ["training.global_batch_size=16", 'rollout.vllm.devices=["4,5", "6,7"]'],
            None,  # 4 + 4
        ),
        (["--nproc-per-node", "8"], ["--nproc-per-node 8: expected at most 6"]),
        (
            ["rollout.vllm.devices=['0,1,2,3', '4,5,6,7']"],
            ["the servers use all 8 GPUs of this machine"],
        ),
    ],
)
def test_split_that_does_not_fit_is_refused_with_one_that_would(run, capsys, words, parts):
    code = cli.main(["train", str(run), "--dry-run", *words])
    printed = capsys.readouterr()
    assert code == (0 if parts is None else 2), printed.err
    for part in parts or ():
        assert part in printed.err


def test_suggested_split_fits(run, capsys):
    words = ["training.global_batch_size=16", "rollout.vllm.servers=4", "--nproc-per-node", "4"]
    words.append('rollout.vllm.devices=["4", "5", "6", "7"]')
    assert cli.main(["train", str(run), "--dry-run", *words]) == 0
    assert "# 4 processes: TP 2" in capsys.readouterr().out


def test_rank_on_a_servers_gpu_is_refused_on_the_first_machine_only(run, capsys, monkeypatch):
    """Ranks of torchrun or srun choose their GPU by LOCAL_RANK."""

    def code_of(rank: int, local_rank: int) -> int:
        variables = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 12}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        return cli.main(["train", str(run), "--dry-run"])

    assert code_of(5, 5) == 0 and code_of(11, 3) == 0
    assert code_of(6, 6) == 2
    assert "rank 6 would train on GPU 6, which a server uses" in capsys.readouterr().err


def test_launch_refuses_ranks_on_the_servers_gpus(run, capsys, monkeypatch):
    words = ["launch", str(run), "--dry-run"]
    assert cli.main(words) == 2
    assert "rank 6 would train on GPU 6, which a server uses; set RANKS_PER_NODE" in (
        capsys.readouterr().err
    )
    monkeypatch.setenv("RANKS_PER_NODE", "6")
    assert cli.main(words) == 0
    monkeypatch.delenv("RANKS_PER_NODE")
    assert cli.main([*words, "--nodes=3", "--vllm-nodes=2", "training.global_batch_size=16"]) == 0
