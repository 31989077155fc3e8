"""examples/gsm8k: all commands of the README, with real rows and the real Qwen2 tokenizer."""

import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from operator import attrgetter
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aropd_mcore import cli
from aropd_mcore.config_file import load_config
from tests.conftest import REPO
from tests.support.ranks import run_ranks

EXAMPLE = REPO / "examples" / "gsm8k"
NUM_ROWS = 400
"""Number of training rows. Reading all 7,473 rows on every rank would dominate the time."""

# The metrics of METHOD section 7, with the one position bucket that short responses reach.
METRICS = {
    *("loss", "kl_target_student", "kl_full_student", "kl_partial_student", "kl_full_partial"),
    *("residual_uptake", "residual_capture_ratio", "clip_fraction", "topk_overlap"),
    *("entropy_student", "entropy_full", "entropy_partial"),
    *("hindsight_token_rate", "premature_answer_rate", "truncation_rate"),
    *(f"response_length_{name}" for name in ("mean", "p10", "p50", "p90")),
    *(f"kl_{name}/0-255" for name in ("target_student", "full_student", "partial_student")),
    *("kl_full_partial/0-255", "hindsight_token_rate/0-255", "lr", "grad_norm"),
    "tokens_per_second",
    *(f"seconds/{part}" for part in ("rollout", "teacher", "student", "optimizer", "sync")),
}

# The sizes of Qwen2.5-7B-Instruct's published config.json.
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
# METHOD section 6.
REFERENCE = {
    "objective.residual_scale": 0.8,
    "objective.residual_clip": 5.0,
    "objective.divergence": "kl_target_student",
    "objective.reduction": "sequence_mean",
    "objective.skip_response_tokens": 3,
    "views.partial_view": "prefix_with_answer",
    "views.partial_ratio": 0.5,
    "views.max_prompt_tokens": 1024,
    "views.on_long_prompt": "cut",
    "rollout.max_response_tokens": 1024,
    "rollout.rollouts_per_prompt": 1,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "prompts_per_step": 32,
    "optimizer.lr": 2e-5,
    "optimizer.schedule": "cosine",
    "optimizer.min_lr": 0.0,
    "optimizer.warmup_ratio": 0.1,
    "optimizer.clip_grad": 1.0,
    "model.dtype": "bf16",
    "training.num_epochs": 1,
    "teacher.kind": "ema",
    "teacher.ema_rate": 0.01,
}


def readme_commands(**variables: str) -> list[list[str]]:
    """Return all commands of the README, with the values of its shell variables."""
    blocks = re.findall(r"```sh\n(.*?)```", (EXAMPLE / "README.md").read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [
        shlex.split(Template(line).substitute(variables))
        for line in lines
        if line and not line.startswith(tuple(variables))
    ]


def run_in_process(command: list[str]) -> str:
    """Run a README command in this process. Returns its stdout."""
    program, *arguments = command
    output = StringIO()
    with redirect_stdout(output):
        if program == "python":
            with torch.random.fork_rng():
                runpy.run_path(arguments[0])["main"](arguments[1:])
        else:
            assert program == "aropd"
            assert cli.main(arguments) == 0
    return output.getvalue()


def run_subprocess(command: list[str]) -> str:
    """Run an `aropd` command in a subprocess without GPUs. Returns its stdout."""
    environment = os.environ | {
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "aropd_mcore.cli", *command[1:]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class ReadmeRun:
    """Folder and outputs of the commands in the README's first block."""

    folder: Path
    prepared: str
    shown: str
    planned: str
    trained: str


@pytest.fixture(scope="module")
def readme_run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory):
    commands = readme_commands(
        GSM8K=str(shared_data / "gsm8k"), QWEN=str(shared_data / "qwen2_tokenizer")
    )
    prepare, make_model, show_views, plan, train, export = commands[:6]
    folder = tmp_path_factory.mktemp("gsm8k")
    (folder / "examples").symlink_to(REPO / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepared = run_in_process(prepare)
        run_in_process(make_model)
        shown = run_in_process(show_views)
        planned = run_in_process(plan)
        with open("runs/gsm8k/train.jsonl") as rows, open("runs/gsm8k/first.jsonl", "w") as first:
            first.writelines(next(rows) for _ in range(NUM_ROWS))
        trained = run_subprocess([*train, "data.train=[runs/gsm8k/first.jsonl]"])
        run_subprocess(export)
        yield ReadmeRun(folder / "runs" / "gsm8k", prepared, shown, planned, trained)
    shutil.rmtree(folder)  # one checkpoint and three models


@pytest.mark.rest
def test_prepare_and_make_model(readme_run):
    assert "kept 7473 rows (7473 gsm8k)\ndropped 0" in readme_run.prepared
    assert (readme_run.folder / "train.jsonl").read_text().count("\n") == 7473
    assert re.findall(r"─ (\w+) view: ", readme_run.shown) == ["student", "partial", "full"]
    assert "How many clips did Natalia sell" in readme_run.shown
    assert "TP 2 x PP 2 x DP 1; 9,872,448 parameters" in readme_run.planned
    config = json.loads((readme_run.folder / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (151936, True)


@pytest.mark.rest
def test_train_three_steps(readme_run):
    assert "TP 2 x PP 2 x DP 1" in readme_run.trained
    counts = re.search(r"(\d+) rows \((\d+) left out", readme_run.trained)
    assert counts and int(counts[1]) + int(counts[2]) == NUM_ROWS
    for step in (1, 2, 3):
        assert f"step {step}/3  loss" in readme_run.trained
    run = readme_run.folder / "tiny"
    assert [path.name for path in (run / "checkpoints").glob("iter_*")] == ["iter_0000003"]
    steps = read_metrics(run)
    assert [metrics["step"] for metrics in steps] == [0, 1, 2]
    for metrics in steps:
        assert metrics.keys() >= METRICS
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["step_skipped"] == 0 and metrics["grad_norm"] > 0
        assert metrics["loss"] > 0 and metrics["kl_full_partial"] > 0
        # 4 responses of 24 tokens. The first three of each have no loss.
        assert (metrics["num_response_tokens"], metrics["num_loss_tokens"]) == (96, 84)
        assert metrics["response_length_mean"] == 24 and metrics["truncation_rate"] == 1
        assert 0 < metrics["entropy_student"] < math.log(151936)


@pytest.mark.rest
def test_export_loads_in_transformers_and_differs_from_the_start(readme_run):
    start = load_file(readme_run.folder / "model" / "model.safetensors")
    end = load_file(readme_run.folder / "tiny-hf" / "model.safetensors")
    assert end.keys() == start.keys() and "lm_head.weight" not in end
    for name, tensor in end.items():
        assert not torch.equal(tensor, start[name]), f"{name} is unchanged"

    folder = readme_run.folder / "tiny-hf"
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    prompt = tokenizer("Natalia sold clips to 48 of her friends", return_tensors="pt")
    with torch.no_grad():
        logits = model(**prompt).logits
        tokens = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert logits.shape[-1] == 151936 and logits.isfinite().all()
    assert tokens.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.rest
def test_train_one_process_equals_four(readme_run):
    """One process has one tied embedding. The two copies of the pipeline stages must stay equal."""
    folder = readme_run.folder
    overrides = {
        "output_dir": folder / "single",
        "model.path": folder / "model",
        "data.train": [str(folder / "first.jsonl")],
        "parallel.tensor": 1,
        "parallel.pipeline": 1,
    }
    run_ranks(train_and_export, 1, [f"{key}={value}" for key, value in overrides.items()])

    for one, other in zip(
        read_metrics(folder / "single"), read_metrics(folder / "tiny"), strict=True
    ):
        for name in ("loss", "grad_norm", "kl_full_student", "entropy_full", "topk_overlap"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
    start, single, sharded = (
        load_file(folder / name / "model.safetensors") for name in ("model", "single-hf", "tiny-hf")
    )
    for name in start:
        # Compared by norm: Adam magnifies the rounding of gradients that are nearly zero.
        change = (single[name] - start[name]).norm()
        assert (sharded[name] - single[name]).norm() < 1e-2 * change, name


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_and_export(overrides: list[str]) -> None:
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.loop import train

    config = load_config(EXAMPLE / "tiny.yaml", overrides)
    here = start_runtime(config)
    train(config, here)
    if here.rank == 0:
        exported = Path(f"{config.output_dir}-hf")
        assert cli.main(["convert", "export", str(config.output_dir), str(exported)]) == 0
    torch.distributed.barrier()


def test_qwen25_7b_dry_run_on_eight_gpus(tmp_path, monkeypatch, capsys):
    plan, train = readme_commands(GSM8K="", QWEN="")[6:]
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_7B))
    monkeypatch.chdir(REPO)
    output = StringIO()
    with redirect_stdout(output):  # prints the plan, then fails: the folder has no weights
        assert cli.main([*plan[1:], f"model.path={tmp_path}"]) == 2
    assert "holds no weights" in capsys.readouterr().err
    planned = output.getvalue()
    assert "# 8 processes: TP 4 x PP 1 x DP 2; 7,615,616,512 parameters" in planned
    assert "32 prompts, 32 responses, microbatches of up to 4116 tokens" in planned
    config = load_config(Path(train[-1]))
    assert {key: attrgetter(key)(config) for key in REFERENCE} == REFERENCE
