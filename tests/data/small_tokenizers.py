"""Small tokenizers of every kind, with chosen names for their special tokens.

Two tokenizers of one kind differ only in these names: the name of a special token in one tokenizer
is plain text in the other.
"""

import string
from collections.abc import Sequence

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

NAMES = ("<s>", "</s>", "<|im_start|>", "[INST]")
"""Special tokens of the tests' templates: BOS, the end of a turn, and two more."""
OTHER_NAMES = ("<bos-x>", "<end-x>", "<start-x>", "<inst-x>")
"""Names of the same tokens in the tokenizer to compare with."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}START {{ m['role'] }}\n{{ m['content'] | trim }} END\n"
    "{% endfor %}{% if add_generation_prompt %}START assistant\n{% endif %}INST"
)
_CHARACTERS = sorted({*string.printable, *"éß中Ω▁"})
_MERGES = [("t", "h"), ("th", "e"), ("a", "n"), ("<", "s"), ("e", "n"), ("|", ">"), ("1", "2")]


def byte_level(names: Sequence[str]) -> Tokenizer:
    """Build a tokenizer like Qwen2's: special tokens outside the vocabulary, NFC, and an added
    token that is not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in _MERGES)]
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\s+|\w+|[^\s\w]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def whole_words(names: Sequence[str]) -> Tokenizer:
    """Build a tokenizer like Llama 3's: words of the vocabulary, including the special tokens, are
    not split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*names, *alphabet, *("".join(pair) for pair in _MERGES)]
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return tokenizer


def sentencepiece(names: Sequence[str], *, legacy: bool = True) -> Tokenizer:
    """Build a tokenizer like Llama 2's: a space before the text, bytes for unknown characters, and
    special tokens that strip."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", *names, *bytes_, *_CHARACTERS, *("".join(pair) for pair in _MERGES)]
    vocab = {token: id for id, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocab, merges=_MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    flags = [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}]
    for name, flag in zip(names, flags, strict=True):
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False, **flag)])
    return tokenizer


def metaspace(names: Sequence[str]) -> Tokenizer:
    """Build a tokenizer like newer conversions of Llama 2."""
    return sentencepiece(names, legacy=False)


def normalized(names: Sequence[str]) -> Tokenizer:
    """Build a tokenizer that lowercases the text before it searches for special tokens."""
    vocab = {character: id for id, character in enumerate(["<unk>", *_CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=True) for n in names])
    return tokenizer


def unigram(names: Sequence[str]) -> Tokenizer:
    """Build a tokenizer like sentencepiece's unigram models: special tokens are the likeliest
    pieces."""
    pieces = [("<unk>", 0.0), *((name, 0.0) for name in names), ("the", -3.0), ("▁a", -4.0)]
    pieces += [(character, -8.0) for character in _CHARACTERS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return tokenizer


def words(names: Sequence[str]) -> Tokenizer:
    """Build a tokenizer of words between spaces, whose vocabulary includes the special tokens."""
    listed = ["[UNK]", *names, "the", "user", "assistant", "system", "a", "START"]
    vocab = {word: id for id, word in enumerate(listed)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return tokenizer


KINDS = {
    kind.__name__: kind
    for kind in (byte_level, whole_words, sentencepiece, metaspace, normalized, unigram, words)
}
LOSSLESS = ("byte_level", "whole_words")
"""Kinds whose decoder returns every text unchanged (byte_level: after NFC)."""


def small_tokenizer(kind: str, names: Sequence[str] = NAMES) -> PreTrainedTokenizerFast:
    """Build a tokenizer with the chat template TEMPLATE and with `names` as special tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](names),
        bos_token=names[0],
        eos_token=names[1],
        clean_up_tokenization_spaces=False,
    )
    template = TEMPLATE.replace("END", names[1]).replace("START", names[2])
    tokenizer.chat_template = template.replace("INST", names[3])
    return tokenizer
