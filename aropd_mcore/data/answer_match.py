"""Whether a response states the gold answer, by its text alone; `aropd eval` grades."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_premature(
    tokenizer: "PreTrainedTokenizerBase", response_ids: Sequence[int], answer: str
) -> bool:
    """Whether the response's first half states the answer (METHOD section 7)."""
    return _states(tokenizer, response_ids[: len(response_ids) // 2], answer)


def ends_with_answer(
    tokenizer: "PreTrainedTokenizerBase", response_ids: Sequence[int], answer: str
) -> bool:
    """Whether the response's second half does."""
    return _states(tokenizer, response_ids[len(response_ids) // 2 :], answer)


def _states(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], answer: str) -> bool:
    """As a word of its own."""
    if not answer:
        return False
    text = str(tokenizer.decode(list(ids)))
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None
