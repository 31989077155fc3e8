"""A tiny Qwen2 with random weights and a character tokenizer, as a HF folder."""

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
    """A token a byte, and so one a character of ASCII text, and the template's special tokens.

    It is a byte-level BPE without merges, since that is what transformers 5 takes any tokenizer
    beside a Qwen2 config.json for, whatever tokenizer_config.json says.
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
        # For sequences of 80 tokens rather than 32,768, and for a width of 128: with Qwen2's own
        # 1,000,000 and 0.02, learning to look up a digit takes several times as many steps.
        rope_theta=100.0,  # pyright: ignore[reportCallIssue] # among the rope's parameters
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


if __name__ == "__main__":
    main()
