"""Chat templates: errors in one line, a fixed date, no randomness, and the generation prompt."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aropd_mcore.config import ConfigError, ViewsConfig
from aropd_mcore.data.records import DataError
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.types import Row
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, save_tiny_tokenizer

USER = {"role": "user", "content": "1+1?"}
LOOP = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def tokenizer_with(folder, template):
    save_tiny_tokenizer(folder, chat_template=template)
    return load_tokenizer(folder)


def build(folder, template):
    builder = ViewBuilder(tokenizer_with(folder, template), ViewsConfig())
    builder.build(Row("1+1?", reasoning="One and one.", answer="2", origin="rows.jsonl:1"))
    return builder


@pytest.mark.parametrize(
    ("template", "place", "message"),
    [
        (
            "{% for m in messages %}<|im_start|>{{ m['role']",
            "line 1: ",
            "unexpected end of template",
        ),
        (
            "{% for m in messages %}\n{{ m['content'] + 1 }}{% endfor %}",
            "line 2: ",
            'TypeError: can only concatenate str (not "int") to str',
        ),
        ("\n\n{{ messages[0]['content'] / 2 }}", "line 3: ", "TypeError: unsupported operand"),
        ("{{ messages | length // 0 }}", "line 1: ", "ZeroDivisionError"),
        ("{{ raise_exception('no\nthanks') }}", "line 1: ", "no thanks"),
        ("{{ messages[0].text.strip() }}", "line 1: ", "has no attribute 'text'"),
        ("{{ no_such_function() }}", "line 1: ", "'no_such_function' is undefined"),
        ("{{ messages | no_such_filter }}", "line 1: ", "No filter named 'no_such_filter'"),
        ("{% for i in range(10**9) %}{% endfor %}", "line 1: ", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "line 1: ", "RecursionError"),
        ("{{ messages.__class__.mro() }}", "line 1: ", "unsafe"),
        ("{{ '%d' % messages[0].content }}", "line 1: ", "TypeError: %d format"),
        ("{% include 'other.jinja' %}", "line 1: ", "no loader for this environment"),
        ("{{ messages[0].content }}{{ '\\ud800' }}", "", "surrogates not allowed"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "", "RecursionError"),
        ("{% for i in a %}" * 30 + "{% endfor %}" * 30, "", "too many statically nested blocks"),
        ("", "", None),  # transformers treats this as no template.
        ("{# nothing #}", "", "shows the user turn 0 times, expected once"),
        ("{{ messages[-1].content * 2 }}", "", "shows the user turn 2 times, expected once"),
    ],
)
def test_a_failing_template_is_named_in_one_line(tmp_path, template, place, message):
    if message is None:
        build(tmp_path, template)
        return
    with pytest.raises(ConfigError) as raised:
        build(tmp_path, template)
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}/chat_template.jinja: {place}")
    assert message in text and "\n" not in text and len(text) < 600


def test_a_type_error_in_a_system_turn_is_not_a_refusal(tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ FAIL }}{% endif %}" + LOOP + HEAD
    build(tmp_path, refusing.replace("FAIL", "raise_exception('no system turns')"))
    with pytest.raises(ConfigError, match="line 1: the chat template failed: TypeError"):
        build(tmp_path, refusing.replace("FAIL", "'a' + 1"))


def test_a_template_that_fails_on_one_row_names_the_row(tmp_path):
    template = (
        "{% for m in messages %}{{ m.content }}{{ 1 // (m.content | length - 3) }}{% endfor %}"
    )
    builder = ViewBuilder(tokenizer_with(tmp_path, template), ViewsConfig(system_prompt=None))
    row = Row("2?", "", "2", history=(("user", "abc"),), origin="rows.jsonl:7")
    with pytest.raises(DataError) as raised:
        builder.build(row)
    assert str(raised.value) == (
        "rows.jsonl:7: the chat template cannot render this row; found "
        f"{tmp_path}/chat_template.jinja: line 1: the chat template failed: ZeroDivisionError: "
        "integer division or modulo by zero"
    )


def test_invalid_templates_in_tokenizer_config_are_refused(tmp_path):
    tokenizer_with(tmp_path, None)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())

    def build_with(template):
        path.write_text(json.dumps(settings | {"chat_template": template}))
        return ViewBuilder(load_tokenizer(tmp_path), ViewsConfig())

    def named(**templates):
        return [{"name": name, "template": text} for name, text in templates.items()]

    build_with(named(default=CHAT_TEMPLATE, tool_use="{{ 1 + 'a' }}"))
    for template, message in (
        ("{{ 1 + 'a' }}", "tokenizer_config.json: line 1: the chat template failed: TypeError"),
        (named(tool_use=CHAT_TEMPLATE, rag=CHAT_TEMPLATE), "multiple chat templates with no def"),
        (named(default=7), "found int as chat template, expected a string"),
        (7, "found int as chat template, expected a string"),
        (True, "found bool as chat template, expected a string"),
    ):
        with pytest.raises(ValueError) as raised:
            build_with(template)
        assert str(raised.value).startswith(str(tmp_path)) and message in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["{", "[]", '"text"', '{"model": 3}', "null", "\ud800", ""])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_file_of_the_tokenizer_is_refused_in_one_line(tmp_path, name, damage):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(damage.encode(errors="surrogatepass"))
    try:
        ViewBuilder(load_tokenizer(tmp_path), ViewsConfig())
    except ValueError as error:
        assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
    else:
        assert (name, damage) == ("tokenizer_config.json", '{"model": 3}')


@pytest.mark.parametrize(
    "call",
    [
        "strftime_now('%Y-%m-%d %H:%M:%S')",
        "strftime_now(format='%Y-%m-%d %H:%M:%S')",
        "f('%Y-%m-%d %H:%M:%S') if true",
    ],
)
def test_strftime_now_returns_a_fixed_date(tmp_path, call):
    template = (
        "{% macro f(x) %}{{ strftime_now(x) }}{% endmacro %}It is {{ CALL }}.\n" + LOOP + HEAD
    )
    builder = build(tmp_path, template.replace("CALL", call))
    text = builder.tokenizer.decode(builder.prompt(Row("1+1?", "", "2"), "student").ids)
    assert text.startswith("It is 2024-07-26 00:00:00.\n<|im_start|>")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ [1, 2] | random }}", "line 1: found the filter 'random'"),
        ("{% filter random %}ab{% endfilter %}", "line 1: found the filter 'random'"),
        ("{{ ['ab', 'cd'] | map('random') | join }}", "line 1: found the filter 'random'"),
        (
            "{% if messages | length > 9 %}{{ lipsum(2) }}{% endif %}",
            "line 1: found the function 'lipsum'",
        ),
        ("{{ messages | map(attribute='role') }}", "found an object printed with its address"),
        ("{{ strftime_now }}", "found an object printed with its address"),
    ],
)
def test_a_random_template_is_refused(tmp_path, source, problem):
    with pytest.raises(ConfigError) as raised:
        build(tmp_path, f"{source}\n{LOOP}{HEAD}")
    assert str(raised.value).startswith(f"{tmp_path}/chat_template.jinja: {problem}")


def test_a_template_variable_named_lipsum_is_accepted(tmp_path):
    build(tmp_path, "{% set lipsum = 'Hi.\n' %}{{ lipsum }}" + LOOP + HEAD)


QWEN3_HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
QWEN3_LOOP = LOOP.replace(
    "{{ m['content'] }}",
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [None, LOOP + HEAD, MISTRAL, LOOP + QWEN3_HEAD, QWEN3_LOOP + HEAD, QWEN3_LOOP + QWEN3_HEAD],
)
def test_a_template_that_opens_the_assistants_turn_has_no_note(tmp_path, template):
    assert not any("generation_prompt" in note for note in build(tmp_path, template).notes)


def test_a_template_without_a_generation_prompt_has_a_note(tmp_path):
    [note] = build(tmp_path, LOOP).notes
    assert note == (
        f"{tmp_path}/chat_template.jinja: the chat template ignores add_generation_prompt: prompts "
        "end before '<|im_start|>assistant\\n', so they do not show the student that its turn "
        "begins; add that text under {% if add_generation_prompt %}"
    )


FRAGMENTS = st.sampled_from(
    [
        *("{{ ", " }}", "{% ", " %}", "{#", "#}", "messages", "m", "m.content", "m['role']", "[0]"),
        *(
            "{% for m in messages %}",
            "{% endfor %}",
            "{% if add_generation_prompt %}",
            "{% endif %}",
        ),
        *(
            "{{ m.content }}",
            "{{ messages[-1].content }}",
            "{% else %}",
            "{% set x = ",
            "x",
            "<|im_end|>",
        ),
        *(
            " + ",
            " // ",
            " ~ ",
            " | ",
            "0",
            "7",
            "'a'",
            "none",
            "loop.index",
            "range(10**9)",
            "namespace(",
        ),
        *("trim", "tojson", "random", "length", "upper", "join", "map", "(", ")", ".strip()", "\n"),
        *(
            "strftime_now('%Y')",
            "raise_exception('no')",
            "{% macro f() %}",
            "{% endmacro %}",
            "f()",
        ),
        *(
            "{% generation %}",
            "{% endgeneration %}",
            "{% break %}",
            "bos_token",
            "\\ud800",
            "é",
            "\x00",
        ),
    ]
)


@given(
    st.lists(FRAGMENTS, max_size=12).map("".join),
    st.sampled_from([LOOP + HEAD + "{}", "{}" + LOOP, "{}", LOOP.replace("\n", "{}\n", 1) + HEAD]),
)
def test_any_template_gives_views_or_an_error_of_one_line(fuzzed, fragments, around):
    fuzzed.chat_template = around.replace("{}", fragments)
    row = Row("1+1?", "One.", "2", "s", (("user", "a"), ("assistant", "b")), origin="rows.jsonl:1")
    try:
        builder = ViewBuilder(fuzzed, ViewsConfig())
        views = builder.build(row)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 800
    else:
        assert views.student_ids and builder.identity


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("fuzzed"))
