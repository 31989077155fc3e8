"""Readers of answer tags, boxes and `####`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aropd_mcore.data.answer_marks import (
    boxed_answer,
    hashes_answer,
    split_boxed,
    split_hashes,
    split_tags,
)

BOXES = [
    # the mark
    (r"It is $\boxed{\frac{3}{4}}$.", r"\frac{3}{4}"),
    (r"It is $\boxed {\frac{3}{4}}$.", r"\frac{3}{4}"),
    ("It is \\boxed\n{ 9 }.", "9"),
    (r"It is $\fbox{12}$ by lemma 7.", "12"),
    (r"It is \\boxed{7}.", "7"),
    (r"The \boxedtext{5} is no box.", None),
    # no braces
    (r"It is $\boxed 9$ in 3 steps.", "9"),
    (r"It is \boxed 9 and costs $5.", "9"),
    (r"It is \boxed -5.", "-5"),
    (r"It is \boxed 1,080.", "1,080"),
    (r"It is $\boxed\frac12$.", r"\frac12"),
    (r"It is $\boxed \frac{1}{2}$.", r"\frac{1}{2}"),
    (r"It is \boxed\sqrt{2} by lemma 7.", r"\sqrt{2}"),
    (r"It is $\boxed x+1$.", "x+1"),
    (r"\(\boxed 2\pi r\)", r"2\pi r"),
    (r"Choice \boxed B", "B"),
    (r"The answer is put in a \boxed as demanded.", None),
    # braces within
    (r"\boxed{\text{(B)}}", r"\text{(B)}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x : x > \frac{1}{2} \right\}}", r"\left\{ x : x > \frac{1}{2} \right\}"),
    # boxes within boxes
    (r"\boxed{\boxed{9}}", "9"),
    (r"\boxed{\boxed 9}", "9"),
    pytest.param("\\boxed{" * 100_000 + "9" + "}" * 100_000, "9", id="100,000 nested"),
    (r"\boxed{\fbox{3}, \fbox{5}}", "3, 5"),
    # unclosed, empty
    (r"It is \boxed{1}; I could also write \boxed{", "1"),
    (r"It is \boxed{1}, and 2 \cdot \boxed{\frac{1}{2} = 1", "1"),
    (r"\boxed{I think that it is \boxed{9}", "9"),
    (r"{ unclosed \boxed{5}", "5"),
    (r"\boxed{9}. I put it in \boxed{}, not \boxed{...} or \boxed{\ldots}.", "9"),
    (r"\boxed{}", None),
    # several
    (r"\boxed{1}, no: \boxed{2}", "2"),
    (r"First \boxed{1}. Then \boxed{2}", "2"),
    (r"\boxed{3}, \boxed{5} and \boxed{7}", "3, 5, 7"),
    (r"$\boxed{3}$, $\boxed{5}$, or $\boxed{7}$.", "3, 5, 7"),
    (r"$\boxed{3} \text{ and } \boxed{5}$", "3, 5"),
    (r"\[\boxed{3} \quad \boxed{5}\]", "3, 5"),
    (r"\boxed 3, \boxed 5", "3, 5"),
    (r"No: \boxed{1}. It is \boxed{3} and \boxed{5}", "3, 5"),
    ("$\\boxed{3}$\n\n$\\boxed{3}$", "3"),
    ("$\\boxed{3}$\n\n$\\boxed{3 \\text{ m}}$", r"3 \text{ m}"),
]


@pytest.mark.parametrize(("text", "answer"), BOXES)
def test_boxed_answer_of_each_form_is_the_last_complete_content(text, answer):
    assert boxed_answer(text) == answer
    assert split_boxed(f" {text}\n") == (None if answer is None else (text.strip(), answer))


@given(
    content=st.recursive(
        st.text("ab1 ,+", max_size=4),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map("".join),
            inner.map(lambda text: f"{{{text}}}"),
            inner.map(lambda text: f"\\{{{text}\\}}"),
            inner.map(lambda text: f"\\sqrt{{{text}}}"),
        ),
    ),
    before=st.text("ab{} \n$\\", max_size=12),
    blank=st.sampled_from(["", " ", "\n"]),
    mark=st.sampled_from(["boxed", "fbox"]),
)
def test_boxed_answer_with_any_balanced_content_returns_it(content, before, blank, mark):
    before = before.rstrip("\\")
    text = f"{before}.\\{mark}{blank}{{{content}}}. So it is."
    assert boxed_answer(text) == ((content.strip() or None) if content.strip(" .") else None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 * 9 = 18\n#### 18", "18"),
        ("2 * 9 = 18 #### 18", "18"),
        ("####18", "18"),
        ("#### 17\n#### 18 ducks\nDone in 5.", "18 ducks"),
        ("#### $1,080.50", "$1,080.50"),
        ("#### \\$18", "\\$18"),
        ("#### €18", "€18"),
        ("#### **18**", "**18**"),
        ("#### -5", "-5"),
        ("#### \u22125", "\u22125"),
        ("#### .5", ".5"),
        ("#### 3/4", "3/4"),
        ("#### $\\frac12$", "$\\frac12$"),
        ("#### 18\n#### Result", "18"),
        ("#### Step 1\n9 * 2 = 18\n#### Result\nIt is 18.", None),
        ("#### 1. Count them", None),
        ("#### **2) Add them up**", None),
        ("#### 3: result", None),
        ("#### 4 Steps of the solution", None),
        ("#### 1.2 Overview", None),
        ("##### 5", None),
        ("####\n18", None),
    ],
)
def test_hashes_answer_counts_only_before_a_number(text, answer):
    assert hashes_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "solution"),
    [
        ("He has <<2*9=18>>18.\n#### 18", ("He has 18.", "18")),
        ("They vote.\n#### yes", ("They vote.", "yes")),
        ("Sum.\n#### \\boxed{18}\n", ("Sum.", "18")),
        ("#### Step 1\nSum.\n#### 18", ("#### Step 1\nSum.", "18")),
        ("#### Step 1\nSum: \\boxed{18}\n#### Result", None),
        ("#### 18\nand so on", None),
    ],
)
def test_split_hashes_of_a_record_reads_the_last_line(text, solution):
    assert split_hashes(text) == solution


@pytest.mark.parametrize(
    ("text", "solution"),
    [
        ("<reasoning> z </reasoning> <answer> a </answer>", ("z", "a")),
        ("z <answer>1</answer> no <answer>2</answer>", ("z <answer>1</answer> no", "2")),
        ("z <Answer>1</Answer>", ("z", "1")),
        ("z <answer>18</answer> I kept to <answer> and </answer>.", ("z", "18")),
        ("z <answer>18</answer> I used `<answer>` and `</answer>` tags.", ("z", "18")),
        ("z <answer>18</answer> in <answer>...</answer>, ended by </answer>", ("z", "18")),
        ("z <answer>18</answer>, then <answer> was kept", ("z", "18")),
        ("z <answer>and</answer>", ("z", "and")),
        ("z <answer>1", None),
        ("z </answer>1<answer>", None),
    ],
)
def test_split_tags_takes_the_last_pair_that_states_an_answer(text, solution):
    assert split_tags(text) == solution


BOX_MARKS = ["\\boxed{", "\\boxed", "\\boxed 1 ", "\\boxed{1},", "\\boxed{}", "{", "}", "\\"]
OTHER_MARKS = ["<answer>", "</answer>", "<answer></answer>", "<reasoning>", "#### 1 ", "####\n"]


@pytest.mark.slow
@pytest.mark.parametrize("piece", [*BOX_MARKS, *OTHER_MARKS])
def test_readers_of_100_000_repeated_marks_finish(piece):
    """A reader with quadratic time would take hours."""
    text = piece * 100_000
    for reader in (boxed_answer, hashes_answer, split_hashes, split_tags):
        reader(text)
