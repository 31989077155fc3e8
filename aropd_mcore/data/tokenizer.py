"""A model folder's tokenizer, and the tokens that end a response."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from aropd_mcore.data.chat_template import one_line, render_chat
from aropd_mcore.data.special_tokens import plain_ids, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model_dir: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local HF folder; never reaches for the network.

    Raises:
        ValueError: the folder is missing, or holds no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise ValueError(f"{model_dir}: no such folder; expected a HF model folder")
    # Without one of these files transformers makes a tokenizer that drops every text.
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((model_dir / name).is_file() for name in names):
        raise ValueError(f"{model_dir}: no tokenizer in this folder; expected {' or '.join(names)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
        # Settings of a wrong type are taken by the constructor and fail at the first use.
        special_tokens(tokenizer)
        plain_ids(tokenizer, "a text")
    except Exception as error:  # Anything, from a Rust parser's error to a KeyError.
        raise ValueError(
            f"{_unreadable_file(model_dir) or model_dir}: the tokenizer cannot be loaded: "
            f"{one_line(error)}"
        ) from error
    _check_one_template(model_dir)
    return tokenizer


def _unreadable_file(model_dir: Path) -> Path | None:
    """The first of the tokenizer's text files that is not UTF-8 or not JSON."""
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
    """Raise ValueError if the folder holds two chat templates that differ."""
    file, settings = model_dir / "chat_template.jinja", model_dir / "tokenizer_config.json"
    if not file.is_file() or not settings.is_file():
        return
    other = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    template = file.read_text(encoding="utf-8")
    if isinstance(other, str) and other.rstrip("\n") != template.rstrip("\n"):
        raise ValueError(
            f"{file}: the chat template differs from chat_template in {settings.name}; older "
            "versions of transformers read the latter. Keep the one that is right."
        )


def response_end_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The one token that ends a response, and is appended to oracle responses.

    It is the special token that the chat template writes after an assistant turn (`<|im_end|>`
    for Qwen, `<|eot_id|>` for Llama 3), which for a base model with a chat template is not its
    `eos_token`; where the template writes no such token, it is `eos_token`.

    Raises:
        ValueError: neither exists.
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
            f"{tokenizer.name_or_path}: the tokenizer has no eos_token, and its chat template ends "
            "an assistant turn with no special token; set eos_token in tokenizer_config.json"
        )
    return eos_id


def _eos_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    id = tokenizer.eos_token_id
    assert id is None or isinstance(id, int)
    return id


def eos_token_ids(model_dir: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The tokens at which sampling stops: `response_end_id` first, then the others, ascending.

    The others are the tokenizer's `eos_token` and what generation_config.json (or, where it names
    none, config.json) lists under `eos_token_id`.

    Raises:
        ValueError: a file of the folder is not JSON, or its eos_token_id is no token id.
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
