"""Check of a tokenizer against its model's vocabulary, and the identity of prompts."""

import json
import shutil

import pytest
from tokenizers import AddedToken

from aropd_mcore.config import ConfigError, ViewsConfig
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.views import ViewBuilder
from tests.data.small_tokenizers import KINDS, small_tokenizer
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, VOCAB_SIZE, save_tiny_tokenizer

SYSTEM_TOKEN = (
    "{% for m in messages %}{% if m.role == 'ROLE' %}<|added|>{% endif %}{{ m.content }}\n"
    "{% endfor %}"
)


def build(folder, vocab_size, *, template=CHAT_TEMPLATE, added=None, **views):
    tokenizer = save_tiny_tokenizer(folder, chat_template=template)
    if added is not None:
        tokenizer.add_tokens([added], special_tokens=added.special)
        tokenizer.save_pretrained(folder)
    return ViewBuilder(load_tokenizer(folder), ViewsConfig(**views), vocab_size=vocab_size)


SPECIAL, ORDINARY = AddedToken("<|added|>", special=True), AddedToken("<|added|>", special=False)


@pytest.mark.parametrize(
    ("added", "settings"),
    [
        (ORDINARY, {}),  # Any text can contain it.
        (SPECIAL, {"template": CHAT_TEMPLATE + "<|added|>"}),
        (SPECIAL, {"template": SYSTEM_TOKEN.replace("ROLE", "system")}),
        (SPECIAL, {"template": SYSTEM_TOKEN.replace("ROLE", "assistant")}),  # Earlier turns.
        (SPECIAL, {"template": CHAT_TEMPLATE + "{{ '<|add' ~ 'ed|>' }}"}),
        (SPECIAL, {"teacher_template": "{question}<|added|>{trace}"}),
        (SPECIAL, {"trace_template": "<|added|>{reasoning}{answer}"}),
        (SPECIAL, {"template": "{% for m in messages %}{{ m.content }}<|added|>{% endfor %}"}),
    ],
)
def test_a_token_that_a_prompt_can_contain_must_be_in_the_vocabulary(tmp_path, added, settings):
    build(tmp_path, VOCAB_SIZE + 1, added=added, **settings)
    build(tmp_path, None, added=added, **settings)
    with pytest.raises(ConfigError) as raised:
        build(tmp_path, VOCAB_SIZE, added=added, **settings)
    assert str(raised.value) == (
        f"{tmp_path}: the tokenizer has tokens outside the model's vocabulary: found '<|added|>' "
        f"259, expected ids from 0 to 258 (vocab_size 259 in config.json); use the tokenizer that "
        "the model was trained with, or add rows to the model's embeddings"
    )


def test_a_special_token_that_no_prompt_can_contain_may_be_outside(tmp_path):
    build(tmp_path, VOCAB_SIZE, added=AddedToken("[PAD]", special=True))
    # System text does not become a special token, so its names do not count.
    build(tmp_path, VOCAB_SIZE, added=SPECIAL, system_prompt="Write <|added|>.")


def test_many_tokens_outside_are_counted(tmp_path):
    with pytest.raises(ConfigError, match=r"found '\S+' 100, '\S+' 101, '\S+' 102 and 155 more, "):
        build(tmp_path, 100)
    with pytest.raises(ConfigError, match=r"found '<\|im_end\|>' 258, expected ids from 0 to 257 "):
        build(tmp_path, 258)


@pytest.mark.parametrize("kind", KINDS)
def test_the_unknown_token_must_be_in_the_vocabulary(kind):
    tokenizer = small_tokenizer(kind)
    highest = max(tokenizer.get_vocab().values())
    ViewBuilder(tokenizer, ViewsConfig(), vocab_size=highest + 1)
    with pytest.raises(ConfigError, match=f" {highest}, expected ids from 0"):
        ViewBuilder(tokenizer, ViewsConfig(), vocab_size=highest)


def identity(folder):
    return ViewBuilder(load_tokenizer(folder), ViewsConfig()).identity


def test_identity_is_independent_of_the_tokenizers_storage(tmp_path):
    folder = tmp_path / "a"
    save_tiny_tokenizer(folder)
    same = identity(folder)
    assert set(same) == {"chat_template", "tokenizer"} and len(set(map(len, same.values()))) == 1

    moved = tmp_path / "b" / "c"
    shutil.copytree(folder, moved)
    content = json.loads((moved / "tokenizer.json").read_text())
    (moved / "tokenizer.json").write_text(json.dumps(content, indent=7))
    config = json.loads((moved / "tokenizer_config.json").read_text())
    template = (moved / "chat_template.jinja").read_text()
    (moved / "chat_template.jinja").unlink()
    config |= {"chat_template": [{"name": "default", "template": template}], "padding_side": "left"}
    (moved / "tokenizer_config.json").write_text(json.dumps(config))
    assert identity(moved) == same
    load_tokenizer(moved).save_pretrained(tmp_path / "saved")
    assert identity(tmp_path / "saved") == same


def change_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("\n", " ", 1))


def change_config(**settings):
    def change(folder):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def change_json(edit):
    def change(folder):
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


def swap(content):
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (change_template, {"chat_template"}),
        (change_config(eos_token="<|endoftext|>"), {"tokenizer"}),
        (change_json(swap), {"tokenizer"}),
        (change_json(lambda c: c["added_tokens"][1].update(rstrip=True)), {"tokenizer"}),
        (change_json(lambda c: c["added_tokens"][0].update(lstrip=True)), {"tokenizer"}),
        (change_json(lambda c: c.update(normalizer={"type": "NFC"})), {"tokenizer"}),
        (change_json(lambda c: c.update(normalizer={"type": "NFKC"})), {"tokenizer"}),
        (change_json(lambda c: c["pre_tokenizer"].update(add_prefix_space=True)), {"tokenizer"}),
    ],
)
def test_identity_changes_with_the_tokenizers_behaviour(tmp_path, change, changed):
    save_tiny_tokenizer(tmp_path)
    before = identity(tmp_path)
    change(tmp_path)
    after = identity(tmp_path)
    assert {key for key in before if before[key] != after[key]} == changed
