"""Arguments of chat templates (views.chat_template_kwargs), such as enable_thinking."""

from dataclasses import replace

import pytest
import yaml
from rich.console import Console
from tokenizers import processors

from aropd_mcore.cli import main
from aropd_mcore.config import ConfigError, ViewsConfig
from aropd_mcore.data.preview import render_views
from aropd_mcore.data.spans import find_thinking
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.rollout.generation_spec import build_generation_spec
from aropd_mcore.types import Row
from tests.support.tiny_runs import tiny_config, write_model, write_rows
from tests.support.tiny_tokenizer import THINKING_TEMPLATE, save_tiny_tokenizer

# As Qwen3's: without thinking, the prompt has an empty thought. `tone` is in the system turn.
TEMPLATE = (
    "{% set marker = '<|im_start|>' %}"
    "{% if tone is defined %}{{ marker }}system\nBe {{ tone }}.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ marker }}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ marker }}assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
ROW = Row("1 + 1?", reasoning="One and one is two.", answer="2")


@pytest.fixture
def tokenizer(tmp_path):
    save_tiny_tokenizer(tmp_path, chat_template=TEMPLATE)
    return load_tokenizer(tmp_path)


def test_arguments_apply_to_all_views_and_the_teachers_take_precedence(tokenizer):
    config = ViewsConfig(
        system_prompt="Add.",
        chat_template_kwargs={"enable_thinking": False, "tone": "brief"},
        teacher_chat_template_kwargs={"tone": "kind"},
    )
    builder = ViewBuilder(tokenizer, config)
    views = builder.build(ROW)
    for ids, tone in ((views.student_ids, "brief"), (views.full_ids, "kind")):
        text = tokenizer.decode(ids)
        assert text.startswith(f"<|im_start|>system\nBe {tone}.<|im_end|>\n")
        assert text.endswith("assistant\n<think>\n\n</think>\n\n")
    expected = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Add."}, {"role": "user", "content": ROW.question}],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
        tone="brief",
    )
    assert tokenizer.decode(views.student_ids) == expected
    assert builder.notes == ()
    assert builder.template_hash != ViewBuilder(tokenizer, ViewsConfig()).template_hash


def test_prompts_that_end_differently_have_a_note(tokenizer):
    config = ViewsConfig(teacher_chat_template_kwargs={"enable_thinking": False})
    [note] = ViewBuilder(tokenizer, config).notes
    assert "the student's prompts end with '<|im_start|>assistant\\n' and the teacher's" in note


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TEMPLATE
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n"
    "{% endif %}" + TEMPLATE
)


@pytest.mark.parametrize(
    ("template", "system_prompt", "note"),
    [
        (GEMMA, "Add.", "has no system turn, so views.system_prompt is the beginning of the user"),
        (GEMMA, None, None),
        (
            QWEN,
            None,
            "begins prompts with '<|im_start|>system\\nYou are Qwen.'; set views.system_p",
        ),
        (QWEN, "Add.", None),
        (TEMPLATE, None, None),
    ],
)
def test_system_prompt_that_a_template_moves_or_adds_has_a_note(
    tmp_path, template, system_prompt, note
):
    save_tiny_tokenizer(tmp_path, chat_template=template)
    builder = ViewBuilder(load_tokenizer(tmp_path), ViewsConfig(system_prompt=system_prompt))
    text = builder.tokenizer.decode(builder.build(ROW).student_ids)
    assert text.count("Add.") == (system_prompt is not None)
    assert (note in builder.notes[0]) if note else (builder.notes == ())
    console = Console(record=True, width=300)
    console.print(render_views(builder, ROW))
    assert ("note: " in console.export_text()) == (note is not None)


@pytest.mark.parametrize("has_bos", [False, True])
def test_template_without_the_tokenizers_bos_has_a_note(tmp_path, has_bos):
    tokenizer = save_tiny_tokenizer(tmp_path, chat_template="{{ bos_token }}" * has_bos + TEMPLATE)
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    id = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", id)]
    )
    tokenizer.save_pretrained(str(tmp_path))
    builder = ViewBuilder(load_tokenizer(tmp_path), ViewsConfig())
    ids = builder.build(ROW).student_ids
    assert ids.count(id) == has_bos, "at most one BOS"
    assert len(builder.notes) == (not has_bos)


@pytest.mark.parametrize("name", ["enable_thinkin", "marker", "messages", "m"])
@pytest.mark.parametrize("setting", ["chat_template_kwargs", "teacher_chat_template_kwargs"])
def test_argument_that_the_template_does_not_read_is_refused(tokenizer, setting, name):
    config = ViewsConfig(**{setting: {name: True}})
    message = rf"views\.{setting}\.{name}: .* does not read it; expected one of enable_thinking, to"
    with pytest.raises(ConfigError, match=message):
        ViewBuilder(tokenizer, config)


def test_argument_of_a_template_without_arguments_is_refused(tmp_path):
    save_tiny_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="does not read it; expected no arguments"):
        config = ViewsConfig(chat_template_kwargs={"enable_thinking": True})
        ViewBuilder(load_tokenizer(tmp_path), config)


# As Qwen3's: thoughts of earlier assistant turns are removed.
WITHOUT_THOUGHTS = TEMPLATE.replace(
    "{{ m.content }}", "{{ (m.content.split('</think>') | last).lstrip('\n') }}"
)


@pytest.mark.parametrize(("template", "is_removed"), [(TEMPLATE, False), (WITHOUT_THOUGHTS, True)])
def test_removed_thought_of_an_earlier_turn_has_a_note(tmp_path, template, is_removed):
    save_tiny_tokenizer(tmp_path, chat_template=template)
    builder = ViewBuilder(load_tokenizer(tmp_path), ViewsConfig(system_prompt=None))
    turns = (("user", "Hello"), ("assistant", "<think>\nA guest.\n</think>\n\nGood day"))
    row = replace(ROW, history=turns)
    text = builder.tokenizer.decode(builder.build(row).full_ids)
    assert "Good day" in text and ("A guest." in text) != is_removed
    assert builder.loses_thoughts(row) == is_removed
    assert not builder.loses_thoughts(replace(ROW, history=(turns[0], ("assistant", "Hi"))))
    console = Console(record=True, width=300)
    console.print(render_views(builder, row))
    assert ("removes the thoughts of earlier" in console.export_text()) == is_removed


@pytest.mark.parametrize(
    ("system_prompt", "trace_template", "expected"),
    [
        (
            "Add, in <reasoning> tags.",
            "{reasoning} {answer}",
            "views.system_prompt asks for <reasoning>:",
        ),
        (None, ViewsConfig().trace_template, "views.trace_template asks for <reasoning>:"),
        ("Add, in <think> tags.", "<think>\n{reasoning}\n</think>\n\n{answer}", None),
        # The prompt has the opening tag.
        (None, "{reasoning}\n</think>\n\n{answer}", None),
        (
            None,
            "a < b [THINK]{reasoning}[/THINK]{answer}",
            "views.trace_template asks for [THINK]:",
        ),
    ],
)
def test_prompt_that_opens_another_thought_than_the_views_has_a_note(
    tmp_path, system_prompt, trace_template, expected
):
    save_tiny_tokenizer(tmp_path, chat_template=THINKING_TEMPLATE)
    config = ViewsConfig(system_prompt=system_prompt, trace_template=trace_template)
    notes = ViewBuilder(load_tokenizer(tmp_path), config).notes
    assert notes == () if expected is None else expected in notes[0]


@pytest.mark.parametrize("after_tag", ["\n", ""])
def test_oracle_response_continues_the_thought_that_the_prompt_opens(tmp_path, after_tag):
    template = THINKING_TEMPLATE.replace("<think>\n", "<think>" + after_tag)
    save_tiny_tokenizer(tmp_path, chat_template=template)
    trace = "<think>\n{reasoning}\n</think>\n\n{answer}"
    builder = ViewBuilder(load_tokenizer(tmp_path), ViewsConfig(trace_template=trace))
    prompt, response = builder.prompt(ROW, "student").ids, builder.oracle_response_ids(ROW)
    text = builder.tokenizer.decode([*prompt, *response])
    assert text.endswith("assistant\n<think>\nOne and one is two.\n</think>\n\n2<|im_end|>")
    thinking = "One and one is two.\n</think>" if after_tag else "\nOne and one is two.\n</think>"
    assert find_thinking(builder.tokenizer, prompt, response) == (0, len(thinking))
    console = Console(record=True, width=300)
    console.print(render_views(builder, ROW))
    text = console.export_text()
    assert text.count("◀ response") == 3
    assert f"{len(response)} tokens, thinking {len(thinking)}, answer 4" in text


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model", chat_template=TEMPLATE)
    return tmp_path / "model"


def test_show_views_option_replaces_arguments_of_the_run(model, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl")
    config = tiny_config(model, rows, tmp_path / "out")
    config["views"]["chat_template_kwargs"] = {"enable_thinking": True, "tone": "kind"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    words = ["show-views", str(rows), "--config", str(tmp_path / "run.yaml")]
    assert main([*words, "--chat-template-kwargs", '{"enable_thinking": false}']) == 0
    out = capsys.readouterr().out
    assert out.count("</think>") == 3 and out.count("│ Be kind.") == 3
    assert main([*words, "--chat-template-kwargs", "{enable_thinkin: false}"]) == 2
    assert "chat_template_kwargs.enable_thinkin" in capsys.readouterr().err


def test_generation_spec_adds_arguments_to_those_of_the_run(model, tmp_path):
    views = {"chat_template_kwargs": {"enable_thinking": True, "tone": "kind"}}
    config = tiny_config(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", views=views)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def build(arguments):
        return build_generation_spec(
            model,
            tmp_path / "rows.jsonl",
            tmp_path / "out.jsonl",
            config=tmp_path / "run.yaml",
            rollout={"max_response_tokens": 4},
            parallel={},
            chat_template_kwargs=arguments,
        )

    spec = build({"enable_thinking": False})
    assert spec.views.chat_template_kwargs == {"enable_thinking": False, "tone": "kind"}
    assert spec.identity()["views.chat_template_kwargs"] == spec.views.chat_template_kwargs
    with pytest.raises(ConfigError, match=r"--chat-template-kwargs: chat_template_kwargs\.tone"):
        build({"tone": ["kind"]})


@pytest.mark.parametrize("text", ["enable_thinking=false", "[1]", "{a: 1"])
def test_template_arguments_that_are_no_mapping_are_refused(text, tmp_path, capsys):
    words = ["show-views", "rows.jsonl", "--model", str(tmp_path), "--chat-template-kwargs", text]
    assert main(words) == 2
    assert "argument --chat-template-kwargs" in capsys.readouterr().err
