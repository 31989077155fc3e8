"""Check of a tokenizer's vocabulary against the model, and a hash of a tokenizer's behaviour."""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from aropd_mcore.config import ConfigError
from aropd_mcore.data.special_tokens import plain_ids, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (
    "The quick brown fox, 3.14159 and 1234567890; it's \\frac{1}{2} = 50% (or -0.5)!\n\n"
    "  two spaces\tand a tab \r\n\n\n def f(x): return x**2\n    pass   "
    " Straße, naïve cafe\u0301, ﬁ, Ünïcödé Привет мир, Γειά σου, שלום עולם, مرحبا بالعالم, नमस्ते, "
    "สวัสดีชาวโลก, 你好，世界。１２３, こんにちは, 안녕하세요, 👩‍👩‍👧 🇩🇪 𝔸 "
    "\u200b\u00a0\ufeff\ue000\U0010fffd end"
)
"""Text with scripts, digits, white space and composed characters that tokenizers encode
differently."""
_NUM_SHOWN = 3


def probe_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Encode a fixed text. The ids include the unknown token if the tokenizer needs it."""
    return plain_ids(tokenizer, _PROBE)


def check_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", vocab_size: int, written: Iterable[int]
) -> None:
    """Check that a tokenizer's texts contain only ids that the model has.

    Args:
        vocab_size: size of the model's vocabulary. Its ids are 0 to vocab_size - 1.
        written: ids that templates write or that end a response. Other special tokens are never
            used and may be outside the vocabulary.
    Raises:
        ConfigError: an id is outside the vocabulary. The message names the first such tokens.
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
        f"{tokenizer.name_or_path}: the tokenizer has tokens outside the model's vocabulary: found "
        f"{shown}{more}, expected ids from 0 to {vocab_size - 1} (vocab_size {vocab_size} in "
        "config.json); use the tokenizer that the model was trained with, or add rows to the "
        "model's embeddings"
    )


def check_same_tokens(
    student: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase", setting: str
) -> None:
    """Check that two tokenizers give every token the same id, and have the same special tokens.

    Args:
        setting: setting with the teacher's folder, for error messages.
    Raises:
        ConfigError: a token differs. The message names the one with the lowest id, with both ids.
    """
    for what, read in (
        ("token", lambda tokenizer: tokenizer.get_vocab()),
        ("special token", special_tokens),
    ):
        of_student, of_teacher = read(student), read(teacher)
        differences = [
            (id, name) for name, id in (of_student.items() ^ of_teacher.items()) if id is not None
        ]
        if differences:
            _, name = min(differences)
            ids = [ids.get(name, "none") for ids in (of_student, of_teacher)]
            raise ConfigError(
                f"{setting}: found another vocabulary: {what} {name!r} has id {ids[0]} in the "
                f"student's {student.name_or_path}, and id {ids[1]} in the teacher's "
                f"{teacher.name_or_path}; expected the same tokens with the same ids, since the "
                "loss compares the probabilities of tokens; use a teacher with the student's "
                "tokenizer"
            )


def largest_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the largest id of a tokenizer's tokens."""
    return max(tokenizer.get_vocab().values())


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase", end_id: int) -> str:
    """Return a hash (16 hex digits) of a tokenizer's behaviour, independent of its storage.

    The hash covers the vocabulary, the ids of a probe text and of texts with special tokens' names,
    and the tokens that end a response.
    """
    names = sorted(special_tokens(tokenizer))
    texts = [_PROBE, *(f"a{name}b {name} c" for name in names)]
    return short_hash(
        [
            sorted(tokenizer.get_vocab().items()),
            [plain_ids(tokenizer, text) for text in texts],
            [end_id, tokenizer.eos_token_id],
        ]
    )


def short_hash(content: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of JSON-like content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
