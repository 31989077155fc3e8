"""Separation of thoughts from the visible text of a response."""

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
def test_split_thoughts_separates_thought_and_visible_text(response, thought, visible):
    assert split_thoughts(response)[:2] == (thought, visible)


@pytest.mark.parametrize(
    ("response", "is_finished"),
    [("a", True), ("<think>a</think>", True), ("<think>a", False), ("a</think>b<think>", False)],
)
def test_split_thoughts_returns_whether_the_last_thought_ends(response, is_finished):
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
def test_opened_thought_returns_the_opening_tag_at_the_end_of_a_prompt(prompt, tag):
    assert opened_thought(prompt) == tag
