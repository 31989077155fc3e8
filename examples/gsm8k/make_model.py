"""Write a small random Qwen2 model as an HF folder, to try a run with real data on any machine.

The vocabulary has Qwen2's real size, so the real tokenizer fits, and every width that depends on
the vocabulary equals that of a large run. The rest is small: a step takes seconds on a CPU.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

VOCAB_SIZE = 151_936
"""Number of rows of Qwen2's embedding: 151,646 tokens, and padding rows that no token uses."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokenizer", required=True, type=Path, help="HF folder with a Qwen2 tokenizer to copy"
    )
    parser.add_argument("--out", required=True, type=Path, help="HF folder to write")
    parser.add_argument(
        "--untied", action="store_true", help="do not tie the output head to the embedding"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights (default: %(default)s)"
    )
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(str(args.tokenizer), local_files_only=True)
    if len(tokenizer) > VOCAB_SIZE:
        parser.error(
            f"{args.tokenizer}: found {len(tokenizer)} tokens, expected up to {VOCAB_SIZE}, the "
            "size of Qwen2's vocabulary"
        )
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=not args.untied,
        # Ten times the usual value. Otherwise the distributions of a random model of this width are
        # so close to uniform that the views would hardly differ.
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(args.out)
    for name in TOKENIZER_FILES:
        if (args.tokenizer / name).is_file():
            shutil.copyfile(args.tokenizer / name, args.out / name)
    print(f"{args.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
