"""Spans of a response: its thinking and its answer."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aropd_mcore.data.spans import Thinking, find_thinking, loss_range
from tests.support.tiny_tokenizer import save_tiny_tokenizer


def letters(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize(
    ("prompt", "response", "opening", "closing"),
    [
        ("Question", "<think>one two</think>three", "<think>", "<think>one two</think>"),
        # The prompt opens the thought, with a line feed after the tag.
        ("Question<think>\n", "one</think> two", "", "one</think>"),
        # An unfinished thought extends to the end.
        ("Question", "<think>one <think> two", "<think>", "<think>one <think> two"),
        ("Question<think>", "one", "", "one"),
        # Text before a thought belongs to the thinking span. A second thought is answer.
        ("Q", "Well <reasoning>a</reasoning>b<think>c</think>", "Well <reasoning>", None),
        # A closing tag without an opening one, after characters of several bytes.
        ("Q", "\u00e9\U0001f600\u5b57</think>\U0001f600", "", "\u00e9\U0001f600\u5b57</think>"),
        ("Q", "no thought, <b>bold</b>", "", ""),
        ("Q<think>a</think>", "answer", "", ""),
        ("Q", "", "", ""),
    ],
)
def test_find_thinking_returns_tokens_up_to_the_tags(
    tmp_path, thinks, prompt, response, opening, closing
):
    tokenizer = save_tiny_tokenizer(tmp_path, thinks=thinks)
    closing = "Well <reasoning>a</reasoning>" if closing is None else closing
    start, end = (len(letters(tokenizer, text)) for text in (opening, closing))
    found = find_thinking(tokenizer, letters(tokenizer, prompt), letters(tokenizer, response))
    assert found == Thinking(start, end)


def test_token_that_contains_the_end_of_a_tag_belongs_to_the_tag():
    pieces = ["<think", ">a", "b", "</", "think>\n", "c", "\U0001f600"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "c"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False
    )
    assert find_thinking(tokenizer, [5], [0, 1, 2, 6, 3, 4, 5]) == Thinking(2, 6)


@pytest.mark.parametrize(
    ("span", "skip", "expected"),
    [
        ("both", 3, range(3, 20)),
        ("thinking", 0, range(2, 12)),
        ("thinking", 3, range(5, 12)),
        ("thinking", 30, range(12, 12)),
        ("answer", 0, range(12, 20)),
        ("answer", 3, range(15, 20)),
        ("answer", 30, range(20, 20)),
    ],
)
def test_loss_range_skips_tokens_from_the_start_of_the_span(span, skip, expected):
    assert loss_range(20, Thinking(2, 12), span, skip) == expected
