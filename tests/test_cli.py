"""The `aropd` command: output, errors and exit codes."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aropd_mcore import cli
from tests.conftest import REPO
from tests.support.tiny_runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """YAML file of a run of two steps with every logger."""
    return write_run(
        tmp_path_factory.mktemp("cli"),
        training={"num_steps": 2, "global_batch_size": 4, "micro_batch_size": 2},
        logging={"tensorboard": True, "wandb": "offline"},
    )


@pytest.fixture(scope="module")
def trained(run) -> Path:
    """output_dir of the run, trained by the command in a separate process."""
    done = subprocess.run(
        [sys.executable, "-m", "aropd_mcore.cli", "train", str(run), "rollout.top_k=50"],
        env=os.environ
        | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    return run.parent / "out"


def test_train_writes_metrics_config_checkpoint_and_logs(run, trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert "top_k: 50" in (trained / "config.yaml").read_text()
    assert (trained / "checkpoints" / "iter_0000002" / ".metadata").is_file()
    assert (trained / "hf" / "tokenizer.json").is_file()
    [events] = (trained / "tensorboard").iterdir()
    assert b"kl_full_student" in events.read_bytes()
    assert list((trained / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_export_gives_a_folder_that_transformers_loads(run, trained, weights, capsys):
    out = run.parent / f"{weights}-hf"
    command = [sys.executable, "-m", "aropd_mcore.cli", "convert", "export", str(trained), str(out)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, "--weights", weights], env=environment, check=True, timeout=300)

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    start = load_file(run.parent / "model" / "model.safetensors")
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == start.keys()
    # The student moved by about lr per step, the moving average by a tenth of that.
    distance = max(float((exported[name] - start[name]).abs().max()) for name in start)
    assert (5e-4 < distance < 5e-3) if weights == "student" else (2e-5 < distance < 5e-4)
    assert cli.main(command[3:]) == 2
    assert "exists already" in capsys.readouterr().err


def test_dry_run_prints_the_config_and_the_layout_and_starts_nothing(run, capsys, tmp_path):
    out = tmp_path / "out"
    arguments = ["train", str(run), "--dry-run", "parallel.tensor=2", f"output_dir={out}"]
    assert cli.main([*arguments, "--nproc-per-node", "4", "--stop-before", "1-02:30:00"]) == 0
    printed = capsys.readouterr().out
    assert "residual_scale: 0.8" in printed and "TP 2 x PP 1 x DP 2" in printed
    assert "stop_before: 1-02:30:00" in printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.lrr=1"], "optimizer.lrr: unknown key; did you mean 'lr'"),
        (["model.path=nowhere"], "nowhere/config.json: cannot be read"),
        (["parallel.tensor=3"], "parallel.tensor 3: expected a divisor of"),
        (["parallel.tensor=2", "--nproc-per-node", "3"], "3 processes: expected a multiple of"),
        (["training.micro_batch_size=4", "--nproc-per-node", "2"], "2 data-parallel ranks x"),
        (["--stop-before", "90"], "limits.stop_before: found '90', expected a time such as 3h55m"),
    ],
)
def test_train_with_an_invalid_config_exits_with_2_and_one_error(run, capsys, arguments, message):
    assert cli.main(["train", str(run), "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aropd: error: ") and message in error
    assert "Traceback" not in error


def test_command_without_arguments_prints_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([])
    assert "examples:" in capsys.readouterr().out


def test_error_on_a_rank_other_than_0_names_the_rank(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("aropd: error on rank 3: ")


def test_serve_starts_the_server_that_a_run_would_start(tmp_path):
    """A fake interpreter prints its arguments in place of one that has vLLM."""
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "$@"\necho "$CUDA_VISIBLE_DEVICES $RANK"\n')
    interpreter.chmod(0o700)
    path = write_run(
        tmp_path,
        rollout={
            "max_response_tokens": 16,
            "vllm": {"python": str(interpreter), "devices": ["6,7"], "arguments": ["--some=flag"]},
        },
    )
    command = [sys.executable, "-m", "aropd_mcore.cli", "serve", str(path)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "VLLM_API_KEY": "a key", "RANK": "3"}
    start = partial(subprocess.run, env=environment, capture_output=True, text=True, timeout=60)

    done = start([*command, "rollout.vllm.port=8123"])
    assert done.returncode == 0, done.stderr
    headline, arguments, variables = done.stdout.splitlines()
    assert headline.endswith("at http://127.0.0.1:8123")
    assert "--max-model-len 144 --tokens-only --logprobs-mode raw_logprobs" in arguments
    assert "--host 127.0.0.1 --port 8123 --middleware aropd_guard.Guard" in arguments
    assert arguments.endswith("--worker-extension-cls aropd_worker.Extension --some=flag")
    assert variables == "6,7 "
    assert "a key" not in done.stdout

    done = start(command)
    assert done.returncode == 2 and "rollout.vllm.port 0: expected a port" in done.stderr


def test_show_views_prints_the_three_views_of_a_row(run, capsys):
    rows = run.parent / "rows.jsonl"
    assert cli.main(["show-views", str(rows), "--row", "3", "--config", str(run)]) == 0
    printed = capsys.readouterr().out
    for text in ("student view", "partial view", "full view", "3 + 9?", "tokens"):
        assert text in printed
    assert cli.main(["show-views", str(rows), "--row", "99", "--config", str(run)]) == 2
    assert "rows 0 to 23" in capsys.readouterr().err
    preset = ["show-views", str(rows), "--preset", "er_opd"]
    assert cli.main([*preset, "--config", str(run)]) == 0
    printed = capsys.readouterr().out
    (student, partial) = re.findall(r"(?:student|partial) view: (\d+) tokens", printed)
    assert student == partial  # the partial view of er_opd shows no part of the trace
    assert cli.main([*preset, "--model", str(run.parent)]) == 2
    assert "expected --config" in capsys.readouterr().err


def test_prepare_reports_the_kept_rows(tmp_path, capsys):
    source, out = tmp_path / "gsm.jsonl", tmp_path / "rows.jsonl"
    rows = [{"question": "1+1?", "answer": "one <<1+1=2>>more\n#### 2"}, {"question": "2+2?"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["prepare", str(source), "--out", str(out)]) == 0
    assert "kept 1 rows" in capsys.readouterr().out
    assert json.loads(out.read_text())["answer"] == "2"
    assert cli.main(["prepare", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "no such file" in capsys.readouterr().err
