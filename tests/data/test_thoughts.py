"""Thoughts apart from the text that answers."""

import pytest

from aropd_mcore.data.thoughts import opened_thought, split_thoughts


@pytest.mark.parametrize(
    ("response", "thought", "visible"),
    [
        ("no thought", "", "no thought"),
        ("<think>a</think>b", "a", "b"),
        ("a</think>b", "a", "b"),
        ("<think>a<think>b</think>c</think>d", "abc", "d"),
        ("<think><think>a</think>b", "a", "b"),
        ("<think>a</think>b<think>c</think>d", "a\n\nc", "bd"),
        ("<think>a</think>b<think>c", "a\n\nc", "b"),
        ("<think>a", "a", ""),
        ("<think>a <reasoning>b</reasoning> c", "a b c", ""),
        ("<THINKING>a</THINKING>b", "a", "b"),
        ("<thought>a</thought>b", "a", "b"),
        ("<reasoning>a</reasoning>b", "a", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "a", "b"),
        ("[THINK]a[/THINK]b", "a", "b"),
        ("\u25c1think\u25b7a\u25c1/think\u25b7b", "a", "b"),
    ],
)
def test_split_thoughts_separates_the_text_that_answers(response, thought, visible):
    assert split_thoughts(response)[:2] == (thought, visible)


@pytest.mark.parametrize(
    ("response", "is_finished"),
    [("a", True), ("<think>a</think>", True), ("<think>a", False), ("a</think>b<think>", False)],
)
def test_split_thoughts_tells_whether_the_last_thought_ends(response, is_finished):
    assert split_thoughts(response).is_finished is is_finished


@pytest.mark.parametrize(
    ("prompt", "tag"),
    [
        ("Q<|im_start|>assistant\n<think>\n", "<think>"),
        ("Q<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("Think between <think> and </think>.<|im_start|>assistant\n", ""),
        ("", ""),
    ],
)
def test_opened_thought_is_the_tag_with_which_a_prompt_ends(prompt, tag):
    assert opened_thought(prompt) == tag
