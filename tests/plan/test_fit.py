"""Remedies that work, layouts in their order, and the command's words."""

import json
from pathlib import Path

import pytest

from aropd_mcore.cli import main
from aropd_mcore.config import load_config
from aropd_mcore.plan.fit import job_of, remedies, sweep
from tests.conftest import REPO

CLUSTERS = REPO / "examples" / "clusters"
GPUS = {
    "qwen2.5-7b-8xh100.yaml": 8,
    "qwen3-32b-32xh100.yaml": 32,
    "llama3.1-70b-64xh100.yaml": 64,
    "qwen3-235b-a22b-256xh100.yaml": 256,
}


@pytest.mark.parametrize("name", GPUS)
def test_clusters_fit_and_start(name: str, monkeypatch: pytest.MonkeyPatch, capsys):
    """In 80 GB, with 5 GB to spare for fragments; and what `train` checks passes."""
    monkeypatch.chdir(REPO)
    path = str(CLUSTERS / name)
    assert {p.name for p in CLUSTERS.glob("*.yaml")} == set(GPUS)
    assert main(["plan", path, "--gpus", str(GPUS[name]), "--memory", "75"]) == 0
    assert "\nfits into 75 GB" in capsys.readouterr().out
    assert main(["train", path, "--dry-run", "--nproc-per-node", str(GPUS[name])]) == 0


@pytest.mark.parametrize(
    "override, expected",
    [
        ("parallel.tensor=2", {"parallel.tensor=4", "parallel.pipeline=2", "--gpus 16"}),
        (
            "training.micro_batch_size=16",
            {"training.recompute=full", "training.micro_batch_size=8", "parallel.context=2"},
        ),
    ],
)
def test_remedies_make_it_fit(override: str, expected: set[str], monkeypatch, capsys):
    """Each, given to the command as it is said."""
    monkeypatch.chdir(REPO)
    path = str(CLUSTERS / "qwen2.5-7b-8xh100.yaml")
    room = ["--memory", "70"]
    job = job_of(load_config(Path(path), [override]), 8, gpus_per_node=8, memory_bytes=70e9)
    found = [remedy.change for remedy in remedies(job)]
    assert main(["plan", path, override, *room]) == 0
    printed = capsys.readouterr().out
    assert "\ndoes not fit into 70 GB" in printed
    assert expected & set(found), found
    for change in found:
        assert change in printed
        assert main(["plan", path, override, *room, *_arguments(change)]) == 0
        assert "\nfits into 70 GB" in capsys.readouterr().out, change


def _arguments(change: str) -> list[str]:
    return change.split() if change.startswith("--") else [change]


def test_sweep_is_sorted_and_fits(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(REPO)
    path = CLUSTERS / "qwen2.5-7b-8xh100.yaml"
    job = job_of(load_config(path), 8, gpus_per_node=8, memory_bytes=80e9)
    found = sweep(job)
    times = [estimate.time.total for estimate in found]
    assert times == sorted(times)
    assert all(estimate.setup.world_size == 8 for estimate in found)
    assert max(estimate.memory.peak for estimate in found) <= 80e9
    layouts = {(e.setup.tensor, e.setup.pipeline, e.setup.context, e.setup.data) for e in found}
    assert (4, 1, 1, 2) in layouts and (8, 1, 1, 1) not in layouts  # 4 key/value heads
    assert main(["plan", str(path), "--sweep"]) == 0
    assert f"{len(found)} layouts fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["parallel.tensor=8"], "tensor-parallel size 8 does not divide the model's 4 key/value"),
        (["--gpus", "6"], "6 processes are not a multiple of parallel.tensor 4"),
        (["parallel.tensr=8"], "did you mean 'tensor'?"),
        (["model.path=nowhere"], "nowhere/config.json: cannot be read"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    assert main(["plan", str(CLUSTERS / "qwen2.5-7b-8xh100.yaml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("aropd: error: ")


def test_packing_is_planned_by_its_budget(monkeypatch: pytest.MonkeyPatch):
    """A microbatch of 4,500 tokens holds two sequences of 2,048."""
    monkeypatch.chdir(REPO)
    path = CLUSTERS / "qwen2.5-7b-8xh100.yaml"
    packed = ["training.packing=true", "training.max_tokens_per_microbatch=4500"]
    job = job_of(load_config(path, packed), 8, gpus_per_node=8, memory_bytes=80e9)
    setup = job.estimate().setup
    assert (setup.num_microbatches, setup.microbatch_tokens) == (8, 4500)


def test_it_needs_neither_megatron_nor_a_process_group(monkeypatch: pytest.MonkeyPatch):
    import subprocess
    import sys

    code = (
        "import json, sys; from aropd_mcore.cli import main; "
        "code = main(['plan', 'examples/clusters/qwen2.5-7b-8xh100.yaml']); "
        "print(json.dumps([code, any(m.split('.')[0] == 'megatron' for m in sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, False], done.stderr
