"""A tokenizer of 259 tokens (bytes and three special tokens) that needs no download."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 259
THINKING_TEMPLATE = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
TAGS = ("<think>", *(f"</{word}>" for word in ("think", "Think", "tHink", "thInk", "THINK")))
"""Tokens of a tokenizer that thinks. There are many closing tags, so that a random model closes its
thoughts at different lengths."""


def save_tiny_tokenizer(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, thinks: bool = False
) -> PreTrainedTokenizerFast:
    """Save a byte-level tokenizer with a ChatML template and EOS `<|im_end|>` into `folder`.

    Encoding and decoding restores any text.

    Args:
        chat_template: None for a tokenizer without chat template.
        thinks: add TAGS, which are no special tokens, as in Qwen3.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: id for id, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    )
    if thinks:
        backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(folder))
    return tokenizer
