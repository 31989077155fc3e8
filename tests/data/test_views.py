"""The three views of a row, compared with prompts that are written by hand."""

import io
import unicodedata
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from aropd_mcore.config import ConfigError, ViewsConfig
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.prepare import prepare
from aropd_mcore.data.preview import render_views
from aropd_mcore.data.records import DataError
from aropd_mcore.data.templates import (
    line_partial_trace,
    partial_trace,
    reference_partial_trace,
    sentence_partial_trace,
    write_trace,
)
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.views import VIEWS, PromptTooLong, ViewBuilder
from aropd_mcore.types import Row
from tests.support.tiny_tokenizer import save_tiny_tokenizer

ROW = Row(
    question="What is {1} + 1?",
    reasoning="One and one make two, as everyone knows.",
    answer="{2}",
    origin="rows.jsonl:3",
)
PLAIN = {"system_prompt": None, "teacher_template": "{question}\n\n{trace}\n\nYour turn."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts(tokenizer, row=ROW, **settings):
    """Return the three views of a row as text."""
    views = ViewBuilder(tokenizer, ViewsConfig(**(PLAIN | settings))).build(row)
    return [tokenizer.decode(getattr(views, f"{name}_ids")) for name in VIEWS]


def chatml(user, system=None):
    turns = [("system", system)] if system else []
    rendered = "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in [*turns, ("user", user)])
    return rendered + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("text", "ratio", "expected"),
    [
        ("one two three", 0.0, ""),
        ("one two three", 1.0, "one two three"),
        ("one two three", 0.3, "one"),  # Cut at 3: at the end of a word.
        ("one two three", 0.35, "one"),  # Cut at 4: before a word, which is left out.
        ("one two three", 0.4, "one two"),  # Cut at 5: within `two`, which is kept whole.
        ("one two three", 0.99, "one two three"),
        ("x=\\frac{1}{2} so", 0.2, "x=\\frac{1}{2}"),
        ("一加一等于二。", 0.5, "一加一"),  # No spaces: a cut must not run to the end.
        ("", 0.5, ""),
        ("สองบวกสองเท่ากับสี่", 0.5, "สองบวกสอง"),  # Thai.
        ("สองบวกสองเท่ากับสี่", 0.53, "สองบวกสองเท่า"),  # Not between a vowel and its consonant.
        ("ກີ່ກີ່", 0.2, "ກີ່"),  # Lao: a consonant keeps its marks.
        ("ស្រីស្រី", 0.2, "ស្រី"),  # Khmer: a stacked consonant stays.
        ("ဗုဒ္ဓဘာသာ", 0.4, "ဗုဒ္ဓ"),  # Myanmar: a stacked consonant stays.
        ("བཀྲ་ཤིས", 0.3, "བཀྲ"),  # Tibetan.
        ("ได้ ๑๒๓๔ คน", 0.5, "ได้ ๑๒๓๔"),  # A number is not cut.
        ("คือ x=12 แล้ว", 0.5, "คือ x=12"),  # Words of other scripts are not cut.
    ],
)
def test_partial_trace_ends_at_the_end_of_a_word(text, ratio, expected):
    assert partial_trace(text, ratio) == expected


@pytest.mark.parametrize(
    ("text", "ratio", "expected"),
    [
        ("one two three", 0.0, ""),
        ("one two three", 1.0, "one two three"),
        ("one two three", 0.01, "one"),  # Rounded up to 1 character.
        ("one two three", 0.3, "one"),  # Cut at 4: after a word and its space.
        ("one two three", 0.31, "one two"),  # Cut at 5.
        ("one two.", 0.1, "one two."),  # Two words stay whole.
        ("a (b+c) d", 0.4, "a (b"),  # Cut at 4: `b` ends there, and `+` is not part of a word.
        ("x = \\frac{1}{2} so", 0.3, "x = \\frac"),
        ("let x_1 be", 0.5, "let x_1"),
        ("ab 一加一等于二 c", 0.3, "ab 一加一等于二"),  # One run, even without spaces.
    ],
)
def test_reference_partial_trace_cuts_as_the_authors_release(text, ratio, expected):
    assert reference_partial_trace(text, ratio) == expected


SENTENCES = "First add 3.5, i.e. 7/2. Then (see Fig. 2) stop! Why?\n\nNo dot here\n\n1. Last one"


@pytest.mark.parametrize(
    ("text", "ratio", "expected"),
    [
        (SENTENCES, 0.0, ""),
        (SENTENCES, 0.05, "First add 3.5, i.e. 7/2."),  # Neither at `3.5` nor at `i.e.`
        (SENTENCES, 24 / len(SENTENCES), "First add 3.5, i.e. 7/2."),
        (SENTENCES, 25.5 / len(SENTENCES), "First add 3.5, i.e. 7/2."),  # After the space.
        (SENTENCES, 26.5 / len(SENTENCES), "First add 3.5, i.e. 7/2. Then (see Fig. 2) stop!"),
        (SENTENCES, 0.75, SENTENCES[: SENTENCES.index("\n\n1.")]),  # At a blank line.
        (SENTENCES, 0.88, SENTENCES),  # Not at the number of a list's entry.
        (SENTENCES, 1.0, SENTENCES),
        ("一加一。等于二！“好。”所以", 0.1, "一加一。"),
        ("一加一。等于二！“好。”所以", 0.7, "一加一。等于二！“好。”"),
        ('He says "so." Then (no.) it ends', 0.1, 'He says "so."'),
        ('He says "so." Then (no.) it ends', 0.6, 'He says "so." Then (no.)'),
        (r"So \(x = 2.\) Then", 0.1, r"So \(x = 2.\)"),
        ("no end at all", 0.3, "no end at all"),
        # In linear time: a search from each of the dots to the last one would take minutes.
        (f"{'.' * 200_000}a b", 0.1, f"{'.' * 200_000}a b"),
    ],
)
def test_sentence_partial_trace_ends_at_the_end_of_a_sentence(text, ratio, expected):
    assert sentence_partial_trace(text, ratio) == expected


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.0, ""),
        (0.1, "a = 1"),
        (0.3, "a = 1"),  # Cut at 5: at the end of the line.
        (0.36, "a = 1"),  # Cut at 6: before the next line.
        (0.6, "a = 1\n\nb = 2"),
        (0.99, "a = 1\n\nb = 2\nc."),
        (1.0, "a = 1\n\nb = 2\nc."),
    ],
)
def test_line_partial_trace_ends_at_the_end_of_a_line(ratio, expected):
    assert line_partial_trace("a = 1\n\nb = 2\nc.", ratio) == expected
    assert line_partial_trace("a = 1 \r\n \n\tb = 2", 0.5) == "a = 1"


@given(st.text(st.sampled_from("ab .!?\n。1$)\u0301"), max_size=40), st.floats(0, 1))
def test_every_cut_shows_a_prefix_from_nothing_to_the_whole_trace(text, ratio):
    text = text.strip()
    for cut in (partial_trace, sentence_partial_trace, line_partial_trace):
        shown = cut(text, ratio)
        assert text.startswith(shown) and len(shown) >= len(text[: int(ratio * len(text))].rstrip())
        assert (cut(text, 0.0), cut(text, 1.0)) == ("", text)


def before(text, ratio):
    """Compute partial_trace for text in scripts with spaces, and for wide characters."""

    def in_word(character):
        wide = unicodedata.east_asian_width(character) in "WF"
        return not character.isspace() and not wide

    cut = int(ratio * len(text))
    while 0 < cut < len(text) and in_word(text[cut - 1]) and in_word(text[cut]):
        cut += 1
    return text[:cut].rstrip()


LETTERS = st.one_of(
    st.characters(min_codepoint=first, max_codepoint=last, categories=("Lo", "Mn", "Mc"))
    for first, last in ((0xE00, 0x109F), (0x1780, 0x17FF))
)


@given(
    st.text(st.characters(max_codepoint=0xDFF) | st.sampled_from("一二。ーが１ \n"), max_size=30),
    st.text(LETTERS, min_size=40, max_size=60),
    st.floats(0, 1),
)
def test_partial_trace_of_scripts_with_and_without_spaces(spaced, unspaced, ratio):
    assert partial_trace(spaced, ratio) == before(spaced, ratio)
    cut = len(partial_trace(unspaced, ratio))
    if 0 < cut < len(unspaced):
        assert not unicodedata.category(unspaced[cut]).startswith("M")


TAGGED = ViewsConfig().trace_template


@pytest.mark.parametrize(
    ("template", "reasoning", "answer", "expected"),
    [
        (TAGGED, "z", "a", "<reasoning>\nz\n</reasoning>\n<answer>\na\n</answer>"),
        (TAGGED, "z", "", "<reasoning>\nz\n</reasoning>"),
        (TAGGED, " ", "a", "<answer>\na\n</answer>"),
        (TAGGED, "", "", ""),
        ("<r>{reasoning}</r> <a>{answer}</a>", "z", "", "<r>z</r>"),
        ("<r>{reasoning}</r> <a>{answer}</a>", "", "a", "<a>a</a>"),
        ("Steps: {reasoning}\nAnswer: \\boxed{{answer}}", "z", "a", "Steps: z\nAnswer: \\boxed{a}"),
        ("Steps: {reasoning}\nAnswer: \\boxed{{answer}}", "z", "", "Steps: z"),
        ("Steps: {reasoning}\nAnswer: \\boxed{{answer}}", "", "a", "Answer: \\boxed{a}"),
        ("{reasoning} The answer is {answer}.", "z", "", "z"),
        ("<r>{reasoning}</r>", "{answer}", "", "<r>{answer}</r>"),
    ],
)
def test_write_trace_with_an_empty_part_removes_its_surroundings(
    template, reasoning, answer, expected
):
    assert write_trace(template, reasoning, answer) == expected


def test_the_three_views_equal_prompts_written_by_hand(tokenizer):
    question = "What is {1} + 1?"
    whole = "<reasoning>\nOne and one make two, as everyone knows.\n</reasoning>"
    part = "<reasoning>\nOne and one make two,\n</reasoning>"
    answer = "<answer>\n{2}\n</answer>"

    def teacher(trace):
        return chatml(f"{question}\n\n{trace}\n\nYour turn.")

    student, full = chatml(question), teacher(f"{whole}\n{answer}")
    assert texts(tokenizer) == [student, teacher(f"{part}\n{answer}"), full]
    partials = {
        "prefix_without_answer": teacher(part),
        "answer_only": teacher(answer),
    }
    for mode, partial in partials.items():
        assert texts(tokenizer, partial_view=mode) == [student, partial, full]
    assert texts(tokenizer, partial_ratio=0) == [student, teacher(answer), full]
    assert texts(tokenizer, partial_ratio=1) == [student, full, full]
    # Without a privileged part, the partial view equals the student view.
    nothing = {"partial_view": "prefix_without_answer", "partial_ratio": 0}
    assert texts(tokenizer, **nothing) == [student, student, full]


def test_system_text_of_the_row_replaces_the_system_prompt(tokenizer, tmp_path):
    row = replace(ROW, system="The row's own.")
    assert texts(tokenizer, system_prompt="Ours.")[0] == chatml(ROW.question, "Ours.")
    assert texts(tokenizer, row, system_prompt="Ours.")[0] == chatml(ROW.question, row.system)
    assert texts(tokenizer, replace(ROW, system=""), system_prompt="Ours.")[0] == chatml(
        ROW.question
    )

    refusing = (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{{ messages[0]['content'] }}"
    )
    ignoring = (
        "{{ bos_token }}{% for message in messages if message['role'] == 'user' %}"
        "{{ message['content'] }}{% endfor %}"
    )
    for template in (refusing, ignoring):
        gemma = save_tiny_tokenizer(tmp_path, chat_template=template)
        gemma.bos_token = "<|im_start|>"
        student, _, _ = texts(gemma, system_prompt="Ours.")
        assert student == f"<|im_start|>Ours.\n\n{ROW.question}"  # One BOS, from the template.


def test_earlier_turns_precede_the_question_in_every_view(tokenizer, tmp_path):
    history = (("user", "Keep 9."), ("assistant", "Done. {question} <|im_end|>"))
    row = replace(ROW, history=history)
    earlier = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in history)
    plain, with_history = (texts(tokenizer, r, system_prompt="Ours.") for r in (ROW, row))
    system = "<|im_start|>system\nOurs.<|im_end|>\n"
    assert with_history == [view.replace(system, system + earlier) for view in plain]

    # A prompt over the limit still loses only the beginning of its question.
    builder = ViewBuilder(tokenizer, ViewsConfig(**PLAIN, max_prompt_tokens=150))
    prompt = builder.prompt(replace(row, question="Z" * 200), "student")
    text = tokenizer.decode(prompt.ids)
    assert text == earlier + chatml(prompt.question) and len(prompt.ids) == 150

    # Without a system turn, the system text is the beginning of the first user turn.
    alternating = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
    )
    gemma = save_tiny_tokenizer(tmp_path, chat_template=alternating)
    student, _, _ = texts(gemma, replace(ROW, history=(("user", "a"), ("assistant", "b"))))
    assert student == f"[a][b][{ROW.question}]"
    student, _, _ = texts(
        gemma, replace(ROW, system="Sys.", history=(("user", "a"), ("assistant", "b")))
    )
    assert student == f"[Sys.\n\na][b][{ROW.question}]"
    refused = replace(ROW, history=(("user", "a"),))
    with pytest.raises(
        DataError, match=r"^rows\.jsonl:3: the chat template cannot render .*alternate"
    ):
        texts(gemma, refused)
    gemma.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: .*omits earlier turns"):
        texts(gemma, refused)


def test_the_slot_of_the_question_is_in_no_text_of_the_row(tokenizer):
    slots = "".join(f"aropd-slot-{number}-" for number in range(3))
    row = replace(ROW, question=slots, reasoning=slots, system=slots, history=(("user", slots),))
    student, _, full = texts(tokenizer, row)
    assert student.count(slots) == 3 and full.count(slots) == 4


def test_a_template_that_shows_no_assistant_turn_ends_responses_with_eos(tmp_path):
    template = (
        "{% for m in messages if m.role != 'assistant' %}<|im_start|>{{ m.content }}{% endfor %}"
    )
    builder = ViewBuilder(save_tiny_tokenizer(tmp_path, chat_template=template), ViewsConfig())
    assert builder.end_id == builder.tokenizer.eos_token_id


def test_oracle_response_is_the_trace_and_the_end_token(tokenizer):
    builder = ViewBuilder(tokenizer, ViewsConfig())
    *response, end = builder.oracle_response_ids(replace(ROW, reasoning="Then <|im_end|> so."))
    assert end == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in response  # The name of a special token within the text does not end it.
    text = "<reasoning>\nThen <|im_end|> so.\n</reasoning>\n<answer>\n{2}\n</answer>"
    assert tokenizer.decode(response) == text


HEAD = "<|im_start|>user\n"


@given(st.text(min_size=1, max_size=60).filter(str.strip), st.integers(125, 190))
def test_cut_prompts_fit_and_keep_everything_but_the_question(tokenizer, question, limit):
    row = replace(ROW, question=question)
    stripped = question.strip()
    uncut = texts(tokenizer, row)
    builder = ViewBuilder(tokenizer, ViewsConfig(**PLAIN, max_prompt_tokens=limit))
    num_cut = 0
    for name, text in zip(VIEWS, uncut, strict=True):
        prompt = builder.prompt(row, name)
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
        head, tail = text[: len(HEAD)], text[len(HEAD) + len(stripped) :]
        assert len(prompt.ids) <= limit
        if num_tokens <= limit:
            assert prompt.num_cut_tokens == 0 and tokenizer.decode(prompt.ids) == text
            continue
        assert stripped.endswith(prompt.question)
        assert tokenizer.decode(prompt.ids) == head + prompt.question + tail
        assert prompt.num_cut_tokens == num_tokens - len(prompt.ids)
        # The cut is minimal: a character has up to 4 of this tokenizer's tokens.
        assert len(prompt.ids) > limit - 4
        num_cut += prompt.num_cut_tokens
    assert builder.build(row).num_cut_tokens == num_cut


@pytest.mark.parametrize("limit", [30, 90, 125, 150])
def test_a_whole_chat_is_cut_on_its_left(tokenizer, limit):
    """Each view loses first the system prompt, then the question, then the trace."""
    row = replace(ROW, system="Be brief.")
    builder = ViewBuilder(
        tokenizer, ViewsConfig(**PLAIN, max_prompt_tokens=limit, on_long_prompt="cut_chat")
    )
    num_cut = 0
    for name, whole in zip(VIEWS, texts(tokenizer, row), strict=True):
        ids = tokenizer.encode(whole, add_special_tokens=False)
        prompt = builder.prompt(row, name)
        assert list(prompt.ids) == ids[-limit:]
        assert prompt.num_cut_tokens == max(len(ids) - limit, 0)
        text = tokenizer.decode(prompt.ids)
        for part in (prompt.question, prompt.trace):
            assert part in text
        shows_question = row.question in text
        assert (prompt.question == row.question) == shows_question
        assert row.question.endswith(prompt.question)
        num_cut += prompt.num_cut_tokens
    assert builder.build(row).num_cut_tokens == num_cut > 0


def test_the_partial_view_is_cut_as_configured(tokenizer):
    row = replace(ROW, reasoning="a (b+c) d")
    cuts = get_args(ViewsConfig.model_fields["partial_cut"].annotation)
    for cut in cuts:
        for ratio in (0, 1):
            partial, full = texts(tokenizer, row, partial_ratio=ratio, partial_cut=cut)[1:]
            assert (partial == full) == (ratio == 1), cut
    shown = [
        texts(tokenizer, row, partial_ratio=0.4, partial_cut=cut)[1].split("reasoning>")[1]
        for cut in cuts
    ]
    traces = ["a (b+c)", "a (b+c) d", "a (b+c) d", "a (", "a (b"]
    assert shown == [f"\n{trace}\n</" for trace in traces]


def test_token_end_shows_a_share_of_the_tokens_without_cutting_a_character(tokenizer):
    """Every byte is a token."""
    reasoning = "né 中<|im_end|>x"

    def trace(num_tokens):
        ratio = (num_tokens + 0.5) / len(reasoning.encode())
        views = ViewsConfig(**PLAIN, partial_cut="tokens", partial_ratio=ratio)
        row = replace(ROW, reasoning=reasoning)
        shown = ViewBuilder(tokenizer, views).prompt(row, "partial").trace
        return shown.removeprefix("<reasoning>\n").partition("\n</reasoning>")[0]

    assert [trace(n) for n in range(1, 10)] == [
        "n", "né", "né", "né", "né 中", "né 中", "né 中", "né 中<", "né 中<|",
    ]  # fmt: skip  # The name of a special token in a trace is text.


def test_token_end_with_a_tokenizer_without_offsets_is_refused(tokenizer):
    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    with pytest.raises(ConfigError, match=r"tokens: expected .* tokenizer\.json, .* found Slow"):
        ViewBuilder(Slow(), ViewsConfig(**PLAIN, partial_cut="tokens"))


def test_each_ratio_has_a_partial_view_and_the_median_is_the_default(tokenizer):
    def build(ratio):
        return ViewBuilder(tokenizer, ViewsConfig(**PLAIN, partial_ratio=ratio))

    builder = build([1, 0.25, 0.0, 0.5])
    each = builder.build_each(ROW)
    assert each == [build(ratio).build(ROW) for ratio in (1, 0.25, 0.0, 0.5)]
    assert len({views.partial_ids for views in each}) == 4
    assert builder.build(ROW) == each[1]
    assert builder.prompt(ROW, "partial", 0.5).ids == each[3].partial_ids

    printed = io.StringIO()
    Console(file=printed, width=200).print(render_views(builder, ROW))
    for title in ("ratio 1:", "ratio 0.25:", "ratio 0:", "ratio 0.5:"):
        assert f"partial view, {title}" in printed.getvalue()
    assert printed.getvalue().count("student view: ") == 1


def test_rows_that_do_not_fit_are_refused(tokenizer):
    def build(**settings):
        ViewBuilder(tokenizer, ViewsConfig(**PLAIN, **settings)).build(ROW)

    with pytest.raises(PromptTooLong) as raised:
        build(max_prompt_tokens=120, on_long_prompt="drop")
    assert str(raised.value) == (
        "rows.jsonl:3: the full view's prompt is over max_prompt_tokens 120; found 137 tokens"
    )
    with pytest.raises(PromptTooLong) as raised:
        build(max_prompt_tokens=120)
    assert str(raised.value) == (
        "rows.jsonl:3: the full view's prompt is over max_prompt_tokens 120 even without its "
        "question: shorten its system prompt, its templates or the row's trace; found 121 tokens"
    )


@pytest.mark.parametrize(
    ("setting", "template", "message"),
    [
        (
            "student_template",
            "{question} {trace}",
            "unknown field {trace}; its fields are {question}",
        ),
        ("student_template", "Solve it.", "found {question} 0 times in 'Solve it.', expected it"),
        ("teacher_template", "{question} {example} {trace}", "unknown field {example}; its fields"),
        ("teacher_template", "{question}", "found {trace} 0 times"),
        ("trace_template", "{answer} {reasoning} {answer}", "found {answer} 2 times"),
    ],
)
def test_templates_with_wrong_fields_are_refused(tokenizer, setting, template, message):
    with pytest.raises(ConfigError) as raised:
        ViewBuilder(tokenizer, ViewsConfig(**{setting: template}))
    assert f"views.{setting}: {message}" in str(raised.value)


def test_a_chat_template_that_loses_the_question_is_refused(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path, chat_template="{{ messages | length }}")
    with pytest.raises(ConfigError, match="shows the user turn 0 times, expected once"):
        texts(tokenizer)


def test_template_hash_changes_with_template_and_settings(tokenizer, tmp_path):
    def template_hash(tokenizer, **settings):
        return ViewBuilder(tokenizer, ViewsConfig(**settings)).template_hash

    other = save_tiny_tokenizer(tmp_path, chat_template=None)
    hashes = [
        template_hash(tokenizer),
        template_hash(other),
        template_hash(tokenizer, partial_ratio=0.25),
        template_hash(tokenizer, system_prompt=None),
    ]
    assert len(set(hashes)) == 4
    assert template_hash(tokenizer) == hashes[0]


@pytest.fixture(scope="module")
def gsm8k(shared_data, tmp_path_factory):
    """Return GSM8K's rows and Qwen2's tokenizer."""
    output = tmp_path_factory.mktemp("gsm8k") / "rows.jsonl"
    prepare([shared_data / "gsm8k" / "test.jsonl"], output)
    return RowDataset.load([output]), load_tokenizer(shared_data / "qwen2_tokenizer")


@pytest.mark.slow
def test_views_of_gsm8k_with_qwen2_equal_prompts_written_by_hand(gsm8k):
    rows, tokenizer = gsm8k
    config = ViewsConfig()
    builder = ViewBuilder(tokenizer, config)
    for row in rows[:150]:
        views = builder.build(row)
        assert views.num_cut_tokens == 0
        trace = f"<reasoning>\n{row.reasoning}\n</reasoning>\n<answer>\n{row.answer}\n</answer>"
        user = config.teacher_template.replace("{question}", row.question).replace("{trace}", trace)
        for ids, turn in ((views.student_ids, row.question), (views.full_ids, user)):
            text = chatml(turn, config.system_prompt)
            assert list(ids) == tokenizer.encode(text, add_special_tokens=False)
        assert views.full_ids[0] == 151644  # <|im_start|>: Qwen2 has no BOS that could be doubled.
        assert builder.oracle_response_ids(row) == (
            *tokenizer.encode(trace, add_special_tokens=False),
            151645,
        )


def test_a_gsm8k_prompt_cut_to_every_limit_loses_only_its_question(gsm8k):
    rows, tokenizer = gsm8k
    row = rows[0]
    whole = ViewBuilder(tokenizer, ViewsConfig()).prompt(row, "full")
    head, tail = tokenizer.decode(list(whole.ids)).split(row.question)
    kept = []
    for limit in range(len(whole.ids) - 50, len(whole.ids) + 1):
        prompt = ViewBuilder(tokenizer, ViewsConfig(max_prompt_tokens=limit)).prompt(row, "full")
        assert limit - 2 <= len(prompt.ids) <= limit
        assert tokenizer.decode(list(prompt.ids)) == head + prompt.question + tail
        kept.append(len(prompt.question))
    assert kept == sorted(kept) and kept[-1] == len(row.question)


def test_render_views_shows_texts_and_counts(gsm8k):
    rows, tokenizer = gsm8k
    row = rows[3]
    config = ViewsConfig(max_prompt_tokens=150)
    builder = ViewBuilder(tokenizer, config)
    console = Console(width=300, record=True, force_terminal=True, file=io.StringIO())
    console.print(render_views(builder, row))
    coloured = console.export_text(styles=True, clear=False)
    text = console.export_text()
    views = builder.build(row)
    assert f"student view: {len(views.student_ids)} tokens, question 35 " in text
    assert f"full view: {len(views.full_ids)} tokens, " in text
    assert "cut 3 " in text
    assert f"oracle response: {len(builder.oracle_response_ids(row))} tokens" in text
    assert "\x1b[35mSo he runs 9*60=540 meters" in coloured
    assert row.question in text and row.origin in text
