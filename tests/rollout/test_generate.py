"""`aropd generate`: every kind of checkpoint, every layout, and interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from aropd_mcore import cli
from aropd_mcore.config_file import load_config
from aropd_mcore.data.tokenizer import eos_token_ids, load_tokenizer
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.mcore import runtime
from aropd_mcore.rollout.engine import RolloutFailed, rollout_seed
from aropd_mcore.rollout.generate import generate, start_generation_runtime
from aropd_mcore.rollout.generation_spec import build_generation_spec
from aropd_mcore.rollout.lines_file import LinesFile
from aropd_mcore.trainer import build
from aropd_mcore.trainer.loop import train
from aropd_mcore.types import Row
from tests.conftest import REPO
from tests.support.fake_vllm import FakeVllm, response_to
from tests.support.ranks import run_ranks, shutdown_pool
from tests.support.tiny_runs import EOS_IDS, write_model, write_run

SAMPLING = {"max_response_tokens": 16, "rollouts_per_prompt": 2}
KEY = "a key"
FEW = SAMPLING | {"batch_size": 1}
"""Eight responses to four prompts between two writes of a replica."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """run.yaml, rows.jsonl, model; out: a run of two steps; student, teacher: its exports."""
    folder = tmp_path_factory.mktemp("generate")
    path = write_run(folder, training={"num_steps": 2, "global_batch_size": 4})
    write_model(folder / "model", initializer_range=0.1)
    write_model(folder / "moe", "qwen3_moe")
    run_ranks(train_here, 2, path)
    for role in ("student", "teacher"):
        arguments = ["convert", "export", str(folder / "out"), str(folder / role)]
        assert cli.main([*arguments, "--weights", role]) == 0
    return folder


def train_here(path: Path) -> None:
    config = load_config(path, ["parallel.pipeline=2", "optimizer.lr=0.02"])
    train(config, build.start_runtime(config))


Call = dict[str, Any]


def generate_all(calls: list[Call]) -> list[str]:
    """Return the error of each call, or an empty text, on every rank."""
    errors = []
    for call in calls:
        job = build_generation_spec(**{"rollout": SAMPLING, "parallel": {}} | call)
        here = start_generation_runtime(job)
        try:
            generate(job, here)
            errors.append("")
        except (ValueError, RolloutFailed) as error:
            errors.append(str(error))
        runtime.stop()
    return errors


def lines_of(path: Path) -> list[dict[str, Any]]:
    assert not path.with_name(path.name + ".partial").exists()
    return [json.loads(line) for line in path.read_text().splitlines()]


def on_one_rank(folder: Path, out: Path, **call: Any) -> list[dict[str, Any]]:
    call = {"checkpoint": folder / "out", "prompts": folder / "rows.jsonl", "output": out} | call
    assert run_ranks(generate_all, 1, [call]) == [[""]]
    return lines_of(out)


def test_greedy_responses_of_an_hf_folder_equal_transformers(folder, tmp_path):
    rows = [{"id": 3, "question": "2 + 2?", "level": [1, {"x": None}]}, {"question": "ü中?"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = on_one_rank(
        folder,
        tmp_path / "out.jsonl",
        checkpoint=folder / "model",
        prompts=prompts,
        rollout={"temperature": 0, "max_response_tokens": 40},
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for row, line in zip(rows, lines, strict=True):
        system = "Solve the problem. Think step by step between <reasoning> and </reasoning>, then "
        system += "give only the final answer between <answer> and </answer>."
        turns = [
            {"role": "system", "content": system},
            {"role": "user", "content": row["question"]},
        ]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        whole = model.generate(
            **ids, do_sample=False, max_new_tokens=40, eos_token_id=EOS_IDS, pad_token_id=0
        )
        expected = whole[0, ids["input_ids"].size(1) :].tolist()
        assert line == row | {
            "sample": 0,
            "text": tokenizer.decode(expected, skip_special_tokens=True),
            "response_ids": expected,
            "finish_reason": "stop" if expected[-1] in EOS_IDS else "length",
        }


def test_student_and_teacher_of_a_run_respond_as_their_exports(folder, tmp_path):
    responses = {}
    for role in ("student", "teacher"):
        here = on_one_rank(folder, tmp_path / role, role=role)  # the views are those of config.yaml
        export = on_one_rank(
            folder,
            tmp_path / f"{role}-export",
            checkpoint=folder / role,
            config=folder / "run.yaml",
        )
        assert {line.pop("weight_version") for line in here} == {2}
        assert here == export and len(here) == 2 * 24
        responses[role] = here
    ids = {role: [line["response_ids"] for line in responses[role]] for role in responses}
    assert ids["student"] != ids["teacher"]
    # Samples of a prompt differ, and some end before the limit.
    assert ids["student"][::2] != ids["student"][1::2]
    assert {line["finish_reason"] for line in responses["student"]} == {"stop", "length"}


@pytest.mark.rest
def test_generate_on_every_layout_writes_the_same_file(folder, tmp_path):
    def calls(name: str, **sizes: int) -> list[Call]:
        """A call in pieces with the run's student, and one with a model with experts."""
        files = {"prompts": folder / "rows.jsonl", "config": folder / "run.yaml"}
        dense = {k: v for k, v in sizes.items() if "expert" not in k}
        return [
            {"checkpoint": folder / "out", "output": tmp_path / name, "rollout": FEW}
            | {**files, "parallel": dense},
            {"checkpoint": folder / "moe", "output": tmp_path / f"{name}-moe"}
            | {**files, "parallel": sizes, "with_logprobs": True},
        ]

    run_ranks(generate_all, 1, calls("one"))
    layouts: dict[str, dict[str, int]] = {
        "replicas": {},
        "tensor": {"tensor": 2},
        "pipeline": {"pipeline": 2},
        "expert": {"expert": 2},
    }
    on_two = [call for name, sizes in layouts.items() for call in calls(name, **sizes)]
    assert run_ranks(generate_all, 2, on_two) == [[""] * len(on_two)] * 2
    for name in layouts:
        assert (tmp_path / name).read_bytes() == (tmp_path / "one").read_bytes()
        lines, expected = (lines_of(tmp_path / f"{n}-moe") for n in (name, "one"))
        for line, other in zip(lines, expected, strict=True):
            logprobs = line.pop("logprobs"), other.pop("logprobs")
            assert len(logprobs[0]) == len(line["response_ids"])
            assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
            assert line == other


def test_bad_prompt_is_an_error_on_every_rank_before_sampling(folder, tmp_path):
    rows = [{"question": "fits"}] * 40 + [{"question": "Z" * 500}]
    prompts = tmp_path / "long.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    call = {"checkpoint": folder / "model", "prompts": prompts, "output": out}
    first, second = run_ranks(generate_all, 2, [call])
    assert (
        first[0].startswith(f"{prompts}:41: the student view's prompt is over") and second == first
    )
    assert not out.exists() and not out.with_name("out.jsonl.partial").exists()
    # The run's views cut it, and its line reports that.
    lines = on_one_rank(
        folder, out, checkpoint=folder / "model", prompts=prompts, config=folder / "run.yaml"
    )
    assert [line.get("num_cut_tokens", 0) > 0 for line in lines] == [False] * 80 + [True] * 2


@pytest.mark.rest
def test_vllm_servers_sample_with_the_checkpoints_weights(folder, tmp_path, monkeypatch):
    """Only servers whose probe agrees with the model sample."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    shutdown_pool()  # its processes do not have the key
    fake = FakeVllm(key=KEY)
    config = yaml.safe_load((folder / "run.yaml").read_text())
    vllm = {"urls": [fake.url], "start_timeout": 1.0, "retries": 0, "weights_dir": str(tmp_path)}
    config["rollout"]["vllm"] = vllm
    (tmp_path / "vllm.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out.jsonl"
    call = {"checkpoint": folder / "out", "role": "teacher", "prompts": folder / "rows.jsonl"}
    call |= {"output": out, "config": tmp_path / "vllm.yaml", "rollout": FEW | {"engine": "vllm"}}
    assert run_ranks(generate_all, 2, [call]) == [[""], [""]]  # two replicas, in pieces

    tokenizer = load_tokenizer(folder / "model")
    builder = ViewBuilder(tokenizer, load_config(folder / "run.yaml").views)
    ends = eos_token_ids(folder / "model", tokenizer)
    for number, line in enumerate(lines_of(out)):
        position, sample = divmod(number, 2)
        prompt = builder.prompt(Row(line["question"], "z", "a"), "student").ids
        ids = response_to(prompt, rollout_seed(1234, position, sample), 16, ends)
        assert (line["response_ids"], line["sample"], line["weight_version"]) == (ids, sample, 2)
        assert line["finish_reason"] == ("stop" if ids[-1] in ends else "length")
    assert [path.name for path in fake.loaded] == ["step-0000002"]
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "vllm.yaml"}

    # Without a server, every rank raises, and the next call can resume.
    fake.die()
    call["output"] = tmp_path / "next.jsonl"
    errors = run_ranks(generate_all, 2, [call])
    assert errors[0] == errors[1] and fake.url in errors[0][0]
    assert (tmp_path / "next.jsonl.partial").exists() and not (tmp_path / "next.jsonl").exists()


def command(folder: Path, out: Path, *options: str) -> list[str]:
    files = ["--model", folder / "out", "--prompts", folder / "rows.jsonl", "--out", out]
    return ["generate", *map(str, files), "--max-response-tokens", "16", "--samples", "2", *options]


def process(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "aropd_mcore.cli", *arguments],
        env=os.environ
        | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.rest
def test_killed_call_resumes_after_its_last_whole_group(folder, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    on_one_rank(folder, whole, rollout=FEW)
    partial = tmp_path / "out.jsonl.partial" / "lines.jsonl"
    arguments = command(folder, out, "--batch-size", "1")
    with process(arguments) as killed:
        while killed.poll() is None and not (partial.exists() and partial.stat().st_size):
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and not out.exists()

    # As an interrupted write leaves it: one sample of a prompt, and half a line.
    kept = partial.read_bytes()
    next_line = whole.read_bytes()[len(kept) :].splitlines(keepends=True)
    assert kept and len(next_line) > 1 and kept.count(b"\n") % 2 == 0
    partial.write_bytes(kept + next_line[0] + next_line[1][:9])

    call = {"checkpoint": folder / "out", "prompts": folder / "rows.jsonl", "output": out}
    [[error]] = run_ranks(generate_all, 1, [{**call, "rollout": {**FEW, "temperature": 0.5}}])
    assert error.endswith(
        "out.jsonl.partial: holds lines of another job: temperature was 1.0 and is now 0.5; "
        "remove the folder or name another file"
    )
    with process(arguments) as again:
        printed, progress = again.communicate(timeout=300)
    assert again.returncode == 0, progress
    num_done = kept.count(b"\n") // 2
    assert f"resuming at prompt {num_done + 1}: " in progress
    assert "prompts 24/24" in progress and printed == f"{folder / 'rows.jsonl'} -> {out}\n"
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.parent.exists()


def test_second_writer_of_a_file_is_refused(tmp_path):
    with LinesFile(tmp_path / "out.jsonl", {"seed": 1}) as first:
        with pytest.raises(ValueError, match=r"out\.jsonl: another process is writing this file"):
            LinesFile(tmp_path / "out.jsonl", {"seed": 1})
        first.write([{"half of a pair": "\ud800"}])
        first.finish()
    with pytest.raises(ValueError, match=r"out\.jsonl: exists already"):
        LinesFile(tmp_path / "out.jsonl", {"seed": 1})


@pytest.mark.rest
def test_generate_command_starts_the_ranks_of_a_layout(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    with process(command(folder, out, "--tensor", "2")) as job:
        _, progress = job.communicate(timeout=300)
    assert job.returncode == 0, progress
    assert "TP 2 x PP 1 x DP 1" in progress
    assert lines_of(out) == on_one_rank(folder, tmp_path / "one.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "nowhere"], "nowhere: no such file or folder; expected"),
        (["--model", "nowhere"], "nowhere: not a checkpoint"),
        (["--model", "{folder}/model", "--weights", "teacher"], "holds one model and no"),
        (["--out", "{folder}/run.yaml"], "run.yaml: exists already; remove it or choose"),
        (["--temperature", "-1"], "aropd generate: temperature: Input should be greater than or"),
        (["--max-response-tokens", "512"], "512 leaves no room for a prompt: the model has 512"),
        (["--kv-cache-tokens", "9"], "leaves no room for a prompt: the model has 512 positions, k"),
        (["--tensor", "3"], "parallel.tensor 3: expected a divisor of"),
        (["--expert", "2"], "parallel.expert 2: expected 1 for a dense model"),
        (["--tensor", "2", "--nproc-per-node", "3"], "3 processes: expected a multiple of 2"),
    ],
)
def test_bad_option_is_refused_before_anything_starts(folder, tmp_path, capsys, options, message):
    options = [option.format(folder=folder) for option in options]
    assert cli.main(command(folder, tmp_path / "out.jsonl", *options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("aropd: error: ") and message in error
    assert list(tmp_path.iterdir()) == []
