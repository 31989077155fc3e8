"""The two spans of a response: its thinking and its answer.

The thinking span extends from the start of the response to the end of its first thought, with the
closing tag. The answer span is the rest. A response without a thought is one answer.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from aropd_mcore.config import LossSpan
from aropd_mcore.data.thoughts import find_thought, opened_thought
from aropd_mcore.types import Rollout, Views

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_TAG = 64
"""Number of tokens that contain a tag, even if each is one byte."""


class Thinking(NamedTuple):
    """Thinking span of a response, as numbers of tokens from the response's start."""

    start: int
    """Number of tokens up to the end of the opening tag. 0 if the prompt has the tag."""
    end: int
    """Number of tokens up to the end of the closing tag, which is the length of the span. The
    response's length if its thought has no end, and 0 if there is no thought."""


NO_THINKING = Thinking(0, 0)


def prompt_opening(tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int]) -> str:
    """Return the opening tag of a thought at the end of a prompt, or an empty string.

    The response continues that thought.
    """
    return opened_thought(str(tokenizer.decode(list(prompt_ids[-_LONGEST_TAG:]))))


def find_thinking(
    tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> Thinking:
    """Find the thinking span of a response.

    Tags are found in the decoded text, since a tag may consist of several tokens. A token that
    contains the end of a tag belongs to the tag.
    """
    opening = prompt_opening(tokenizer, prompt_ids)

    def text_of(num_tokens: int) -> str:
        return opening + str(tokenizer.decode(list(response_ids[:num_tokens])))

    thought = find_thought(text_of(len(response_ids)))
    if thought is None:
        return NO_THINKING

    def num_tokens_until(position: int) -> int:
        sizes = range(len(response_ids))
        return bisect_left(sizes, position, key=lambda size: len(text_of(size)))

    start, end = thought
    return Thinking(
        num_tokens_until(start), len(response_ids) if end is None else num_tokens_until(end)
    )


def thinking_spans(
    tokenizer: "PreTrainedTokenizerBase", views: Sequence[Views], rollouts: Sequence[Rollout]
) -> list[Thinking]:
    """Find the thinking span of each rollout, which responds to the student view of its row."""
    return [
        find_thinking(tokenizer, v.student_ids, rollout.response_ids)
        for v, rollout in zip(views, rollouts, strict=True)
    ]


def loss_range(length: int, thinking: Thinking, span: LossSpan, num_skipped: int) -> range:
    """Return the positions of a response's loss tokens.

    Args:
        length: number of tokens of the response.
        span: objective.loss_span.
        num_skipped: objective.skip_response_tokens. They count from the start of the span, and in
            the thinking span from the end of the opening tag.
    """
    first, end = {
        "both": (0, length),
        "thinking": thinking,
        "answer": (thinking.end, length),
    }[span]
    return range(min(first + num_skipped, end), end)
