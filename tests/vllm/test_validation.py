"""Validation of a run whose responses come from a real vLLM server, compared with the same run
without it."""

import json
import os
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_rows, write_run
from tests.support.training import read_lines, repeatable, train_on_ranks

pytestmark = pytest.mark.vllm


def train(path: Path, overrides: list[str]) -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    train_on_ranks(path, overrides)


@pytest.mark.timeout(900)
def test_validation_on_a_real_server_changes_no_step(tmp_path):
    vllm = {
        "python": os.environ["AROPD_VLLM_PYTHON"],
        # A prompt that the validation has left in the cache would change how training's prompts are
        # computed, and so their last bits.
        "arguments": ["--enforce-eager", "--no-enable-prefix-caching"],
        "start_timeout": 300.0,
    }
    path = write_run(
        tmp_path,
        training={"num_steps": 3, "global_batch_size": 4, "micro_batch_size": 1},
        rollout={"engine": "vllm", "max_response_tokens": 16, "vllm": vllm},
    )
    # The smallest head size of vLLM's attention on CPU is 32.
    write_model(tmp_path / "model", hidden_size=256, num_attention_heads=8)
    write_rows(tmp_path / "heldout.jsonl")
    validation = [
        f"validation.rows=[{tmp_path / 'heldout.jsonl'}]",
        "validation.teacher_views=[full]",
        "validation.every_steps=1",
        "validation.limit=6",
        "logging.samples=2",
    ]
    plain, out = tmp_path / "plain", tmp_path / "validated"
    run_ranks(train, 2, path, [f"output_dir={plain}"], timeout=400)
    run_ranks(train, 2, path, [f"output_dir={out}", *validation], timeout=400)
    lines = repeatable(read_lines(out))
    for line, expected in zip(lines, repeatable(read_lines(plain)), strict=True):
        assert {k: v for k, v in line.items() if not k.startswith("validation/")} == expected
    results = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [result["num_updates"] for result in results] == [0, 1, 2, 3]
    for result in results:
        assert list(result["tasks"]) == ["rows", "rows_full"]
        assert result["tasks"]["rows"]["num_problems"] == 6
        assert result["tasks"]["rows"]["loss"] > 0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["task"] for s in samples if s["step"] == 1].count("train") == 2
