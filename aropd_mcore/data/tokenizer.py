"""A model folder's tokenizer, and the tokens that end a response."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from aropd_mcore.data.chat_template import one_line, render_chat
from aropd_mcore.data.special_tokens import special_tokens

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
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((model_dir / name).is_file() for name in names):
        raise ValueError(f"{model_dir}: no tokenizer in this folder; expected {' or '.join(names)}")
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except Exception as error:  # Anything, from a Rust parser's error to a KeyError.
        raise ValueError(
            f"{model_dir}: the tokenizer cannot be loaded: {one_line(error)}"
        ) from error


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
    ids = tokenizer.encode(after.lstrip(), add_special_tokens=False) if shown else []
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
