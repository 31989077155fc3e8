"""Loading a folder's tokenizer, chat templates, and the tokens that end a response."""

import json
import string

import pytest

from aropd_mcore.config import ViewsConfig
from aropd_mcore.data.chat_template import render_chat
from aropd_mcore.data.tokenizer import eos_token_ids, load_tokenizer, response_end_id
from aropd_mcore.data.views import ViewBuilder
from tests.support.tiny_tokenizer import VOCAB_SIZE, save_tiny_tokenizer

PAD_ID, START_ID, END_ID = 256, 257, 258


def write_json(path, value):
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("model_type", [None, "qwen2", "qwen3", "llama"])
def test_the_tiny_tokenizer_round_trips(tmp_path, model_type):
    save_tiny_tokenizer(tmp_path)
    if model_type:
        write_json(tmp_path / "config.json", {"model_type": model_type})
    tokenizer = load_tokenizer(tmp_path)
    text = string.printable + "  two spaces , don't 'quote'\n\n é中"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == VOCAB_SIZE


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="absent: no such folder; expected a HF model folder"):
        load_tokenizer(tmp_path / "absent")
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer in this folder; expected tok"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer in this folder; expected tok"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_with_a_broken_file_names_the_file(tmp_path):
    for name, content in (
        ("tokenizer.json", b'{"version": "1.0", '),
        ("tokenizer_config.json", b"{"),
        ("chat_template.jinja", b"{{ messages }} \xe9"),
    ):
        save_tiny_tokenizer(tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path / name}: the tokenizer cannot be loaded"):
            load_tokenizer(tmp_path)


def test_load_tokenizer_with_two_chat_templates_refuses_unless_they_are_equal(tmp_path):
    save_tiny_tokenizer(tmp_path)
    file, settings = tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    write_json(settings, content | {"chat_template": file.read_text() + "\n"})
    load_tokenizer(tmp_path)
    write_json(settings, content | {"chat_template": "{{ messages[0]['content'] }}"})
    with pytest.raises(ValueError, match=f"{file}: the chat template differs from chat_template"):
        load_tokenizer(tmp_path)


NONSENSE = (None, 5, True, "x", "", [], {}, [1], {"content": 3}, {"content": "<x>", "special": 1})


def test_nonsense_in_the_tokenizers_files_is_refused_in_one_line(tmp_path):
    save_tiny_tokenizer(tmp_path)
    names = ("tokenizer_config.json", "tokenizer.json")
    whole = {name: json.loads((tmp_path / name).read_text()) for name in names}
    keys = {name: list(content) for name, content in whole.items()}
    keys[names[0]] += ["bos_token", "unk_token", "added_tokens_decoder", "split_special_tokens"]
    num_refused = 0
    for name, key, value in ((n, k, v) for n in names for k in keys[n] for v in NONSENSE):
        write_json(tmp_path / name, whole[name] | {key: value})
        try:
            ViewBuilder(load_tokenizer(tmp_path), ViewsConfig(), vocab_size=300)
        except ValueError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
            num_refused += 1
        write_json(tmp_path / name, whole[name])
    assert num_refused > 50


def test_eos_token_ids_reads_the_generation_config_first(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path)
    assert eos_token_ids(tmp_path, tokenizer) == (END_ID,)
    write_json(tmp_path / "config.json", {"eos_token_id": 10})
    assert eos_token_ids(tmp_path, tokenizer) == (END_ID, 10)
    write_json(tmp_path / "generation_config.json", {"temperature": 0.7})
    assert eos_token_ids(tmp_path, tokenizer) == (END_ID, 10)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [END_ID, PAD_ID, 3]})
    assert eos_token_ids(tmp_path, tokenizer) == (END_ID, 3, PAD_ID)

    write_json(tmp_path / "generation_config.json", {"eos_token_id": "<|im_end|>"})
    with pytest.raises(
        ValueError, match=r"generation_config\.json: eos_token_id: found '<\|im_end"
    ):
        eos_token_ids(tmp_path, tokenizer)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json: not a JSON object"):
        eos_token_ids(tmp_path, tokenizer)


def test_a_base_model_ends_a_response_as_its_chat_template_does(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path)
    tokenizer.eos_token = "<|endoftext|>"  # As in Qwen2.5's base models.
    assert response_end_id(tokenizer) == END_ID
    assert eos_token_ids(tmp_path, tokenizer) == (END_ID, PAD_ID)
    # Llama 2's template trims the turn and writes a space before its end.
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] | trim }} <|endoftext|>{% endfor %}"
    )
    assert response_end_id(tokenizer) == PAD_ID


def test_a_tokenizer_without_a_chat_template_uses_the_plain_one(tmp_path):
    save_tiny_tokenizer(tmp_path, chat_template=None)
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    text = render_chat(tokenizer, messages)
    assert text == "System:\nBe brief.\n\nUser:\n1+1?\n\nAssistant:\n"
    tokenizer.bos_token = "<|im_start|>"
    assert render_chat(tokenizer, messages) == "<|im_start|>" + text
    assert response_end_id(tokenizer) == END_ID
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token, and its chat template writes"):
        response_end_id(tokenizer)


def test_render_chat_uses_a_fixed_date(tmp_path):
    llama = (
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
        "{%- endif %}Today Date: {{ date_string }}\n{{ messages[0]['content'] }}"
    )
    tokenizer = save_tiny_tokenizer(tmp_path, chat_template=llama)
    text = render_chat(tokenizer, [{"role": "user", "content": "1+1?"}])
    assert text == "Today Date: 26 Jul 2024\n1+1?"
