"""A tokenizer's vocabulary: whether the model has it, and a hash of what the tokenizer does."""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from aropd_mcore.config import ConfigError
from aropd_mcore.data.special_tokens import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (
    "The quick brown fox, 3.14159 and 1234567890; it's \\frac{1}{2} = 50% (or -0.5)!\n\n"
    "  two spaces\tand a tab \r\n\n\n def f(x): return x**2\n    pass   "
    " Straße, naïve cafe\u0301, ﬁ, Ünïcödé Привет мир, Γειά σου, שלום עולם, مرحبا بالعالم, नमस्ते, "
    "สวัสดีชาวโลก, 你好，世界。１２３, こんにちは, 안녕하세요, 👩‍👩‍👧 🇩🇪 𝔸 "
    "\u200b\u00a0\ufeff\ue000\U0010fffd end"
)
"""Scripts, digits, white space and composed characters on which tokenizers differ."""
_NUM_SHOWN = 3


def probe_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids of a fixed text, with the unknown token where the tokenizer has to use it."""
    return tokenizer.encode(_PROBE, add_special_tokens=False)


def check_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", vocab_size: int, written: Iterable[int]
) -> None:
    """Refuse a tokenizer whose texts can contain ids that the model does not have.

    Args:
        vocab_size: Of the model; its ids are 0 to vocab_size - 1.
        written: Ids that the templates and the end of a response write. Other special tokens are
            never used and may lie outside the vocabulary.
    Raises:
        ConfigError: Names the first such tokens with their ids.
    """
    used = {*written, *probe_ids(tokenizer)}
    never_used = set(special_tokens(tokenizer).values()) - used
    names = {id: name for name, id in tokenizer.get_vocab().items()}
    outside = sorted(id for id in used | names.keys() - never_used if not 0 <= id < vocab_size)
    if not outside:
        return
    shown = ", ".join(f"{names.get(id, '?')!r} {id}" for id in outside[:_NUM_SHOWN])
    more = f" and {len(outside) - _NUM_SHOWN} more" if len(outside) > _NUM_SHOWN else ""
    raise ConfigError(
        f"{tokenizer.name_or_path}: the tokenizer has tokens beyond the model's vocabulary: found "
        f"{shown}{more}, expected ids from 0 to {vocab_size - 1} (vocab_size {vocab_size} in "
        "config.json); use the tokenizer that the model was trained with, or add rows to the "
        "model's embeddings"
    )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase", end_id: int) -> str:
    """16 hex digits that change with what the tokenizer does, not with how or where it is stored.

    The hash covers the vocabulary, the ids of a probe text with the special tokens' names in it,
    and the tokens that end a response.
    """
    names = sorted(special_tokens(tokenizer))
    texts = [_PROBE, *(f"a{name}b {name} c" for name in names)]
    return short_hash(
        [
            sorted(tokenizer.get_vocab().items()),
            [tokenizer.encode(text, add_special_tokens=False) for text in texts],
            [end_id, tokenizer.eos_token_id],
        ]
    )


def short_hash(content: Any) -> str:
    """16 hex digits of the SHA-256 of JSON-like content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
