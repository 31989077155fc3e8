"""Special tokens: the chat template writes them, user text never becomes them."""

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def unused_character(texts: Iterable[str]) -> str:
    """The first private-use character that occurs in none of `texts`."""
    used = set().union(*texts)
    return next(chr(code) for block in _PRIVATE_USE for code in block if chr(code) not in used)


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Name -> id of every special token.

    Names that are only white space are left out: ordinary text is full of them.
    """
    added = tokenizer.added_tokens_decoder
    tokens = {token.content: id for id, token in added.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    tokens = {**dict(named), **tokens}
    return {name: id for name, id in tokens.items() if name.strip() and id is not None}


class SpecialTokens:
    """Encodes prompts in which special tokens are only what the templates write.

    User text goes through `protect` before it enters a template. `protect` puts a mark, a character
    that occurs in none of the texts, in front of each special token's name. The rendered text goes
    through `encode`, which encodes a marked name as text and an unmarked name as the token.

    Text without a marked name is encoded as the tokenizer encodes it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self.ids = special_tokens(tokenizer)
        """Name -> id."""
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._names = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) matches nothing.
        self._clones = lru_cache(maxsize=2)(self._clone)

    def protect(self, text: str, mark: str) -> str:
        """User text with `mark` in front of each special token's name."""
        protected = re.sub(self._names, lambda name: mark + name[0], text)
        if protected == text and self._becomes_name(text):
            protected = re.sub(r"\S", lambda first: mark + first[0], text, count=1)
        return protected

    def protect_all(self, value: Any, mark: str) -> Any:
        """JSON-like data with every string protected, at any depth; keys stay as they are."""
        if isinstance(value, str):
            return self.protect(value, mark)
        if isinstance(value, dict):
            return {key: self.protect_all(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.protect_all(item, mark) for item in value)
        return value

    def encode(self, text: str, mark: str) -> list[int]:
        """The ids of a text whose user parts went through `protect` with the same mark."""
        if mark not in text:
            return self._tokenizer.encode(text, add_special_tokens=False)
        if getattr(self._tokenizer, "backend_tokenizer", None) is None:
            return self._encode_by_pieces(text, mark)
        clone, name_of, id_of = self._clones(mark)

        def written(match: re.Match[str]) -> str:
            if match["token"]:
                return name_of.get(match["token"], match["token"])
            return match["text"] or ""  # A template's string methods can leave a mark alone.

        pattern = f"{mark}(?P<text>{self._names})|(?P<token>{self._names})|{mark}"
        text = re.sub(pattern, written, text)
        return [id_of.get(id, id) for id in clone.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _normalized_names(self) -> list[str]:
        """Names that are looked for in normalized text, as the normalizer writes them."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or backend.normalizer is None:
            return []
        added = self._tokenizer.added_tokens_decoder.values()
        names = [token.content for token in added if token.normalized and token.content in self.ids]
        return [backend.normalizer.normalize_str(name) for name in names]

    def _becomes_name(self, text: str) -> bool:
        """Whether normalizing makes a name of a text, such as `[PAD]` of `[pad]`."""
        if not self._normalized_names:
            return False
        normalized = self._tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        return any(name in normalized for name in self._normalized_names)

    def _clone(self, mark: str) -> tuple["Tokenizer", dict[str, str], dict[int, int]]:
        """The same tokenizer with special tokens of other names.

        Returns:
            The clone, original name -> the clone's name, and the clone's id -> original id.
        """
        from tokenizers import Tokenizer

        backend = self._tokenizer.backend_tokenizer
        content = json.loads(backend.to_str())
        specials = [token for token in content["added_tokens"] if token["content"] in self.ids]
        name_of = {
            token["content"]: f"{mark}{number}{mark}" for number, token in enumerate(specials)
        }
        id_of_name = {
            name_of.get(token["content"], token["content"]): token["id"]
            for token in content["added_tokens"]
        }
        for token in content["added_tokens"]:
            token["content"] = name_of.get(token["content"], token["content"])
        _rename_in_model(content["model"], name_of)
        content |= {"post_processor": None, "truncation": None, "padding": None}
        clone = Tokenizer.from_str(json.dumps(content))
        ids = {clone.token_to_id(name): id for name, id in id_of_name.items()}
        return clone, name_of, ids

    def _encode_by_pieces(self, text: str, mark: str) -> list[int]:
        """For tokenizers that are written in Python: piece by piece, as they do it themselves."""
        added = {token.content: token for token in self._tokenizer.added_tokens_decoder.values()}
        pieces = re.split(f"((?<!{mark})(?:{self._names}))", text)
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            if number % 2:
                ids.append(self.ids[piece])
                continue
            before = added.get(pieces[number - 1]) if number else None
            after = added.get(pieces[number + 1]) if number + 1 < len(pieces) else None
            piece = piece.replace(mark, "")
            piece = piece.lstrip() if before and before.rstrip else piece
            piece = piece.rstrip() if after and after.lstrip else piece
            ids += self._tokenizer.encode(
                piece, add_special_tokens=False, split_special_tokens=True
            )
        return ids


def _rename_in_model(model: dict[str, Any], name_of: dict[str, str]) -> None:
    """Rename special tokens in a model's vocabulary, so that text is never cut into one."""
    made = set(_merged(model))
    name_of = {name: new for name, new in name_of.items() if name not in made}
    if model["type"] == "Unigram":
        model["vocab"] = [[name_of.get(name, name), score] for name, score in model["vocab"]]
    else:
        model["vocab"] = {name_of.get(name, name): id for name, id in model["vocab"].items()}
    if unknown := model.get("unk_token"):
        model["unk_token"] = name_of.get(unknown, unknown)


def _merged(model: dict[str, Any]) -> Iterator[str]:
    for merge in model.get("merges") or ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        yield from (*parts, "".join(parts))
