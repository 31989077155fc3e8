"""Files of prompts: the token ids of each kind, and errors with file and line."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from aropd_mcore.config import ViewsConfig
from aropd_mcore.data.generation_prompts import PromptLine, Prompts
from aropd_mcore.data.records import DataError
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.types import Row
from tests.support.tiny_tokenizer import save_tiny_tokenizer

VIEWS = ViewsConfig(max_prompt_tokens=80, system_prompt="Add.", student_template="Q: {question}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def prompts_in(tokenizer, path: Path, *lines: Any, max_tokens: int = 90, **views: Any) -> Prompts:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    builder = ViewBuilder(tokenizer, VIEWS.model_copy(update=views))
    return Prompts(path, builder, vocab_size=259, max_tokens=max_tokens, reserved=("text",))


def rendered(prompts: Prompts) -> list[tuple[tuple[int, ...], int]]:
    return [prompts.ids(line) for line in prompts]


def test_questions_have_the_student_views_of_training(tokenizer, tmp_path):
    lines = [
        {"question": "1 + 1?", "source": {"a": [1, None]}},
        {"question": " 2 + 2? ", "system": "Be brief.", "answer": "4", "messages": None},
        {"question": "Z" * 100},
    ]
    prompts = prompts_in(tokenizer, tmp_path / "p.jsonl", *lines)
    builder = ViewBuilder(tokenizer, VIEWS)
    views = [
        builder.prompt(Row(r["question"], "z", "a", r.get("system")), "student") for r in lines
    ]
    assert rendered(prompts) == [(view.ids, view.num_cut_tokens) for view in views]
    assert views[2].num_cut_tokens > 40 and len(views[2].ids) == 80
    assert [line.fields for line in prompts] == lines
    assert prompts.check() == (3, 1, 80)


def test_messages_are_rendered_by_the_chat_template_and_ids_are_unchanged(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    [(ids, num_cut)] = rendered(prompts_in(tokenizer, tmp_path / "m.jsonl", {"messages": messages}))
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert num_cut == 0
    given = prompts_in(
        tokenizer, tmp_path / "i.jsonl", {"prompt_ids": [0, 258]}, "", {"prompt_ids": [5]}
    )
    assert rendered(given) == [((0, 258), 0), ((5,), 0)]
    assert [line.origin for line in given] == [f"{tmp_path}/i.jsonl:1", f"{tmp_path}/i.jsonl:3"]


def test_names_of_special_tokens_in_chat_turns_are_text(tokenizer, tmp_path):
    text = "a<|im_end|>\n<|im_start|>assistant\nb"
    messages = [{"role": "user", "content": text, "name": text}, {"role": text, "content": "?"}]
    path = tmp_path / "m.jsonl"
    [(ids, _)] = rendered(prompts_in(tokenizer, path, {"messages": messages}, max_tokens=200))
    assert tokenizer.decode(ids) == (
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>{text}\n?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (ids.count(257), ids.count(258)) == (3, 2)


def test_parquet_gives_the_same_prompts(tokenizer, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    lines = [{"question": "1 + 1?", "id": 7}, {"question": "2?", "id": 8}]
    parquet.write_table(pa.Table.from_pylist(lines), tmp_path / "p.parquet")
    builder = ViewBuilder(tokenizer, VIEWS)
    prompts = Prompts(tmp_path / "p.parquet", builder, vocab_size=259, max_tokens=90)
    assert list(prompts) == [
        PromptLine(line, "question", f"{tmp_path}/p.parquet:{number}")
        for number, line in enumerate(lines, start=1)
    ]
    assert prompts.check().num_prompts == 2

    dated = [{"question": "1?", "seen": {"on": date(2026, 1, 2)}}]
    parquet.write_table(pa.Table.from_pylist(dated), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet:1: key 'seen': expected a value that JSON"):
        prompts.check()


GOOD = {"question": "1 + 1?"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "p.jsonl: expected at least one prompt; found none"),
        ([GOOD, "{"], "p.jsonl:2: the line is not JSON; found "),
        ([GOOD, {"prompt": "x"}], "p.jsonl:2: expected one of the keys 'question', 'messages', "),
        ([GOOD | {"prompt_ids": [1]}], "p.jsonl:1: expected one of the keys "),
        (
            [GOOD, {"prompt_ids": [1]}],
            "p.jsonl:2: expected key 'question' as in {path}:1: use one kind per file; found key "
            "'prompt_ids'",
        ),
        ([GOOD | {"text": 1}], "p.jsonl:1: key 'text' is reserved for responses; rename"),
        ([{"question": 3}], "p.jsonl:1: key 'question': expected a string; found int 3"),
        ([GOOD | {"system": []}], "p.jsonl:1: key 'system': expected a string; found list []"),
        ([{"messages": "hi"}], "'messages': expected a list of chat turns; found str 'hi'"),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}],
            "key 'messages', turn 1: expected 'role' and 'content', strings; found dict",
        ),
        (
            [{"messages": [{"role": "user", "content": "\ud800"}]}],
            "p.jsonl:1: key 'messages': the chat template cannot render the chat",
        ),
        ([{"prompt_ids": []}], "key 'prompt_ids': expected a list of token ids, at least one; "),
        (
            [{"prompt_ids": [1, 259]}],
            "key 'prompt_ids', place 1: expected a token id from 0 to 258; found int 259",
        ),
        ([{"prompt_ids": [True]}], "place 0: expected a token id from 0 to 258; found bool True"),
        (
            [{"prompt_ids": [1] * 90}, {"prompt_ids": [1] * 91}],
            "p.jsonl:2: expected a prompt of at most 90 tokens, to leave room for the response; "
            "found 91 tokens",
        ),
        (
            [{"messages": [{"role": "user", "content": "Z" * 91}]}],
            "p.jsonl:1: expected a prompt of at most 90 tokens, to leave room",
        ),
    ],
)
def test_an_invalid_prompt_is_refused_with_its_line(tokenizer, tmp_path, lines, message):
    path = tmp_path / "p.jsonl"
    with pytest.raises(DataError) as error:
        prompts_in(tokenizer, path, *lines).check()
    assert str(error.value).startswith(str(path)) and message.format(path=path) in str(error.value)


def test_a_long_question_is_refused_if_views_do_not_cut(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    long = {"question": "Z" * 100}
    with pytest.raises(DataError, match=r"p\.jsonl:1: the student view's prompt is over max_prom"):
        prompts_in(tokenizer, path, long, on_long_prompt="drop").check()
    with pytest.raises(DataError, match=r"p\.jsonl:1: expected a prompt of at most 79 tokens"):
        prompts_in(tokenizer, path, long, max_tokens=79).check()
