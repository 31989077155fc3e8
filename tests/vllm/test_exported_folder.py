"""vLLM serves a model that was imported to Megatron and exported again."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import REPO
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_tokenizer import VOCAB_SIZE, save_tiny_tokenizer
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
