"""Write a tiny Qwen2 with random weights and a character tokenizer as an HF folder."""

import argparse
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, END, USER, ASSISTANT = "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=128)
    args = parser.parse_args()
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(args.out)
    random_model(tokenizer, args.seed, args.hidden_size).save_pretrained(args.out)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte, and the template's special tokens.

    ASCII text has one token per character. The tokenizer is a byte-level BPE without merges,
    because transformers 5 reads any tokenizer next to a Qwen2 config.json as a byte-level BPE and
    ignores the class in tokenizer_config.json.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: id for id, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, END, USER, ASSISTANT)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def random_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, hidden_size: int
) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Chosen for sequences of 80 tokens and a width of 128. With Qwen2's 1,000,000 and 0.02,
        # the model needs several times as many steps to learn to look up a digit.
        rope_theta=100.0,  # pyright: ignore[reportCallIssue] # one of the rope parameters
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


if __name__ == "__main__":
    main()
