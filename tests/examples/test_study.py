"""examples/study: a tiny study by the driver, and its tables."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.rest

STUDY = REPO / "examples" / "study"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(REPO),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
TWO = ("partial_opd", "aropd_0.8")
TINY = {
    "training.num_steps": 2,
    "training.global_batch_size": 4,
    "training.micro_batch_size": 4,
    "rollout.max_response_tokens": 12,
}


@pytest.fixture
def call(monkeypatch, capsys):
    """Function that runs main() of a script of the study in this process and returns stdout."""
    monkeypatch.syspath_prepend(STUDY)
    monkeypatch.chdir(REPO)

    def call(name: str, *words: object) -> str:
        assert not importlib.import_module(name).main([*map(str, words)])
        return capsys.readouterr().out

    return call


def overrides(**more: object) -> list[str]:
    return [f"{key}={value}" for key, value in (TINY | more).items()]


def study(out: Path, *settings: str, fails: bool = False) -> str:
    """Run the driver in a subprocess. Returns its stdout, or its stderr if it should fail."""
    words = [
        *("--out", out, "--seeds", 3, "--methods", *TWO, "--sizes", 12, 24, 192),
        *("--pretraining-steps", 1, "--set", *settings),
    ]
    done = subprocess.run(
        [sys.executable, str(STUDY / "study.py"), *map(str, words)],
        cwd=REPO,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    assert "2 of 2 runs to do" in study(out, *overrides())
    return out


def run_folders(out: Path) -> dict[str, Path]:
    return {method: out / method / "seed-3" for method in TWO}


def test_study_rerun_repeats_no_run(out):
    def modification_times() -> list[int]:
        return [path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.is_file()]

    before = modification_times()
    assert "0 of 2 runs to do" in study(out, *overrides())
    assert modification_times() == before
    error = study(out, *overrides(**{"optimizer.lr": 1e-3}), fails=True)
    assert "result of a run with other settings" in error


def test_worker_second_run_equals_aropd_train(out, tmp_path):
    method = TWO[1]
    words = [
        *("train", STUDY / "study.yaml", *overrides(), "objective.residual_scale=0.8"),
        *(f"model.path={out / 'base'}", f"data.train=[{out / 'data' / 'train.jsonl'}]"),
        *("training.seed=3", f"output_dir={tmp_path / 'by-command'}"),
    ]
    command = [sys.executable, "-m", "aropd_mcore.cli", *map(str, words)]
    subprocess.run(command, cwd=REPO, env=ENVIRONMENT, check=True, capture_output=True)

    def read_values(folder: Path) -> list[tuple[float, ...]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        names = ("loss", "grad_norm", "kl_full_partial", "response_length_mean")
        return [tuple(line[name] for name in names) for line in lines]

    assert read_values(tmp_path / "by-command") == read_values(run_folders(out)[method])


def test_tables_equal_the_numbers_of_the_runs(call, out, tmp_path):
    results = tmp_path / "results.json"
    call("tables", "collect", "--runs", out, "--results", results)
    collected = json.loads(results.read_text())["runs"]
    for method, folder in run_folders(out).items():
        steps = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
        run = collected[method]["3"]
        for decoding in ("greedy", "sampled"):
            summary = json.loads((folder / f"eval-{decoding}" / "summary.json").read_text())
            task = summary["tasks"]["heldout"]
            assert run[f"{decoding}/right"] == pytest.approx(task["accuracy"], abs=1e-6)
            assert run[f"{decoding}/length"] == pytest.approx(task["mean_length"], abs=1e-6)
        hindsight = sum(step["hindsight_token_rate"] for step in steps) / len(steps)
        assert run["hindsight_token_rate"] == pytest.approx(hindsight)

    # Three seeds per method with chosen accuracies. The expected cells are computed by hand.
    edited = json.loads(results.read_text())
    for method, rights in (("aropd_0.8", (0.5, 0.6, 0.7)), ("partial_opd", (0.5, 0.4, 0.6))):
        runs = enumerate(rights)
        edited["runs"][method] = {
            str(seed): collected[method]["3"] | {"sampled/right": right} for seed, right in runs
        }
    results.write_text(json.dumps(edited))
    tables = {
        name: call("tables", name, "--results", results)
        for name in ("teacher", "main", "differences", "ablations")
    }
    # t = 4.303 for two degrees of freedom, s = 0.1, n = 3.
    assert "| AR-OPD, λ = 0.8 | 60.0 ± 24.8 |" in tables["main"]
    # The differences are 0, 0.2 and 0.1.
    assert "| Partial OPD | +10.0 ± 24.8 |" in tables["differences"]
    assert tables["teacher"].count("\n| ") == 4 and "SFT" not in tables["main"]
    call("tables", "figure", "--results", results)
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_readme_has_the_tables_of_results_json(call):
    readme = (STUDY / "README.md").read_text()
    names = re.findall(r"tables\.py (teacher|main|differences|ablations)", readme)
    assert len(names) == 4
    for name in names:
        assert call("tables", name).strip() in readme, name


def test_measure_samples_response_without_a_step_is_counted(monkeypatch, out, tmp_path):
    monkeypatch.syspath_prepend(STUDY)
    measure_samples = importlib.import_module("study").measure_samples
    rows = list(map(json.loads, (out / "data" / "heldout.jsonl").read_text().splitlines()))
    [whole, short] = ("a+1b+2c+3;3", "a+1c+3;3")
    lines = [
        {"task": "x", "verdict": "right", "length": 9, "response_ids": [1], "text": text}
        for text in (whole, short)
    ]
    assert len(rows[0]["reasoning"].split()) == 3
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "heldout.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "base").symlink_to(out / "base")
    assert [line["skips"] for line in measure_samples(tmp_path, tmp_path)["x"]] == [False, True]
