"""The tokenizer of a model folder, and the tokens that end a response."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from aropd_mcore.data.chat_template import one_line, render_chat
from aropd_mcore.data.special_tokens import plain_ids, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model_dir: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a local HF folder, without access to the network.

    Raises:
        ValueError: the folder is missing, has no tokenizer that transformers can load, or has two
            chat templates that differ.
    """
    from transformers import AutoTokenizer

    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise ValueError(f"{model_dir}: no such folder; expected a HF model folder")
    # If all of these files are missing, transformers creates a tokenizer that drops every text.
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((model_dir / name).is_file() for name in names):
        raise ValueError(f"{model_dir}: no tokenizer in this folder; expected {' or '.join(names)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
        # The constructor accepts settings of a wrong type, which fail at the first use.
        special_tokens(tokenizer)
        plain_ids(tokenizer, "a text")
    except Exception as error:  # Any error, from a Rust parser's error to a KeyError.
        raise ValueError(
            f"{_unreadable_file(model_dir) or model_dir}: the tokenizer cannot be loaded: "
            f"{one_line(error)}"
        ) from error
    _check_one_template(model_dir)
    return tokenizer


def _unreadable_file(model_dir: Path) -> Path | None:
    """Return the first of the tokenizer's text files that is not UTF-8 or not JSON."""
    for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json", "chat_template.jinja"):
        path = model_dir / name
        if path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
                if path.suffix == ".json":
                    json.loads(text)
            except (OSError, ValueError, RecursionError):
                return path
    return None


def _check_one_template(model_dir: Path) -> None:
    """Raise ValueError if the folder has two chat templates that differ."""
    file, settings = model_dir / "chat_template.jinja", model_dir / "tokenizer_config.json"
    if not file.is_file() or not settings.is_file():
        return
    other = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    template = file.read_text(encoding="utf-8")
    if isinstance(other, str) and other.rstrip("\n") != template.rstrip("\n"):
        raise ValueError(
            f"{file}: the chat template differs from chat_template in {settings.name}, which older "
            "versions of transformers read; remove the wrong one"
        )


def response_end_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that ends a response, which is also appended to oracle responses.

    This is the special token that the chat template writes after an assistant turn (`<|im_end|>`
    for Qwen, `<|eot_id|>` for Llama 3). For a base model with a chat template, this token is not
    the `eos_token`. If the template writes no such token, `eos_token` is returned.

    Raises:
        ValueError: there is neither such a token nor an `eos_token`.
    """
    content = "a response"
    messages = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": content},
    ]
    text = render_chat(tokenizer, messages, add_generation_prompt=False)
    _, shown, after = text.rpartition(content)
    ids = plain_ids(tokenizer, after.lstrip()) if shown else []
    if ids and ids[0] in special_tokens(tokenizer).values():
        return ids[0]
    eos_id = _eos_id(tokenizer)
    if eos_id is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has no eos_token, and its chat template "
            "writes no special token after an assistant turn; set eos_token in "
            "tokenizer_config.json"
        )
    return eos_id


def _eos_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    id = tokenizer.eos_token_id
    assert id is None or isinstance(id, int)
    return id


def eos_token_ids(model_dir: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the tokens at which sampling stops: `response_end_id`, then the others, ascending.

    The others are the tokenizer's `eos_token` and the `eos_token_id` of generation_config.json, or
    of config.json if generation_config.json has none.

    Raises:
        ValueError: one of the files is not a JSON object, or its eos_token_id is not a token id or
            a list of token ids.
    """
    end = response_end_id(tokenizer)
    eos_id = _eos_id(tokenizer)
    others = set() if eos_id is None else {eos_id}
    for name in ("generation_config.json", "config.json"):
        listed = _listed_eos(Path(model_dir) / name)
        if listed:
            others |= listed
            break
    return (end, *sorted(others - {end}))


def _listed_eos(path: Path) -> set[int]:
    if not path.is_file():
        return set()
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object: {error}") from error
    values = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(id) is not int or id < 0 for id in values):
        raise ValueError(f"{path}: eos_token_id: found {value!r}, expected a token id or a list")
    return set(values)
