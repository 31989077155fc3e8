"""Whether a response states the gold answer, by its text only. `aropd eval` does the grading."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_premature(
    tokenizer: "PreTrainedTokenizerBase", response_ids: Sequence[int], answer: str
) -> bool:
    """Return whether the response's first half states the answer (METHOD section 7)."""
    return _states(tokenizer, response_ids[: len(response_ids) // 2], answer)


def ends_with_answer(
    tokenizer: "PreTrainedTokenizerBase", response_ids: Sequence[int], answer: str
) -> bool:
    """Return whether the response's second half states the answer."""
    return _states(tokenizer, response_ids[len(response_ids) // 2 :], answer)


def _states(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], answer: str) -> bool:
    """Return whether the decoded ids contain the answer as a separate word."""
    if not answer:
        return False
    text = str(tokenizer.decode(list(ids)))
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None
