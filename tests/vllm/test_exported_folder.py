"""vLLM serves a model that was imported to Megatron and exported again, and an exported adapter."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import REPO
from tests.support.ranks import run_ranks
from tests.support.tiny_adapters import write_adapter
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_runs import write_model, write_run
from tests.support.tiny_tokenizer import VOCAB_SIZE, save_tiny_tokenizer
from tests.support.training import train_on_ranks
from tests.vllm.server import complete, serve

pytestmark = pytest.mark.vllm

NUM_NEW_TOKENS = 24
TEXTS = [
    "7 + 5 = ",
    "?",
    "Natalia sold clips to 48 of her friends",
    "<|im_start|>user\nHi<|im_end|>\n",
]


def test_vllm_tokens_of_the_export_equal_transformers_tokens_of_the_original(tmp_path: Path):
    original, checkpoint, exported = (tmp_path / name for name in ("hf", "mcore", "exported"))
    # The smallest head size of vLLM's attention on CPU is 32. With this seed, each greedy token's
    # logit is larger than all others by 0.02, a hundred times the error of fp32. So rounding does
    # not change tokens.
    save_tiny_model(
        "qwen2", original, seed=3, vocab_size=VOCAB_SIZE, hidden_size=256, num_attention_heads=8
    )
    save_tiny_tokenizer(original)
    aropd("convert", "import", original, checkpoint)
    aropd("convert", "export", checkpoint, exported)

    prompts, expected = greedy_in_transformers(original)
    with serve(exported, tmp_path / "server.log") as address:
        assert complete(address, prompts, NUM_NEW_TOKENS) == expected
        # The exported tokenizer gives the same ids: the same prompts, as texts.
        assert complete(address, TEXTS, NUM_NEW_TOKENS) == expected


def test_vllm_tokens_of_an_exported_adapter_equal_those_of_the_merged_export(tmp_path: Path):
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    run = write_run(
        tmp_path,
        parallel={"tensor": 2, "pipeline": 2},
        adapter={"rank": 4, "alpha": 8, "targets": targets, "path": str(tmp_path / "start")},
        optimizer={"lr": 3e-3},
        training={"num_steps": 2, "global_batch_size": 4, "micro_batch_size": 2},
    )
    base = write_model(tmp_path / "model", hidden_size=256, num_attention_heads=8)
    write_adapter(tmp_path / "start", base, targets=targets)
    run_ranks(train_on_ranks, 4, run, [])
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    aropd("convert", "export", tmp_path / "out", adapter)
    aropd("convert", "export", tmp_path / "out", merged, "--merged")

    prompts, expected = greedy_in_transformers(merged)
    arguments = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"trained={adapter}"]
    with serve(base, tmp_path / "server.log", arguments) as address:
        assert complete(address, prompts, NUM_NEW_TOKENS, "trained") == expected
        assert complete(address, prompts, NUM_NEW_TOKENS) != expected, "the base model"


def aropd(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aropd_mcore.cli", *map(str, arguments)],
        env=os.environ
        | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def greedy_in_transformers(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of TEXTS, and the greedy tokens after each."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    following = []
    for prompt in prompts:
        tokens = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=NUM_NEW_TOKENS,
            eos_token_id=-1,
        )
        following.append(tokens[0, len(prompt) :].tolist())
    return prompts, following
