"""Special tokens: only templates write them, and user text never becomes one."""

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
    """Return the first private-use character that occurs in none of `texts`."""
    used = set().union(*texts)
    return next(chr(code) for block in _PRIVATE_USE for code in block if chr(code) not in used)


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return {name: id} of the special tokens.

    Names that are only white space are omitted, since they are frequent in ordinary text.
    """
    added = tokenizer.added_tokens_decoder
    tokens = {token.content: id for id, token in added.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    tokens = {**dict(named), **tokens}
    return {name: id for name, id in tokens.items() if name.strip() and id is not None}


def plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Encode a text. The name of a special token becomes that token."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


class SpecialTokens:
    """Encoder of prompts in which special tokens come from templates only.

    User text passes through `protect` before it enters a template. `protect` puts a mark, a
    character that occurs in none of the texts, before each special token's name. The rendered text
    passes through `encode`, which encodes a marked name as text and an unmarked name as the token.

    A text without a marked name is encoded as the tokenizer encodes it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self.ids = special_tokens(tokenizer)
        """Special tokens as {name: id}."""
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._names = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) matches nothing.
        self._clones = lru_cache(maxsize=4)(self._clone)

    def protect(self, text: str, mark: str) -> str:
        """Put `mark` before each special token's name in user text."""
        protected = re.sub(self._names, lambda name: mark + name[0], text)
        if protected == text and self._becomes_name(text):
            protected = re.sub(r"\S", lambda first: mark + first[0], text, count=1)
        return protected

    def protect_all(self, value: Any, mark: str) -> Any:
        """Protect every string of JSON-like data, at any depth. Keys stay unchanged."""
        if isinstance(value, str):
            return self.protect(value, mark)
        if isinstance(value, dict):
            return {key: self.protect_all(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.protect_all(item, mark) for item in value)
        return value

    def encode(self, text: str, mark: str) -> list[int]:
        """Encode a text whose user parts passed through `protect` with the same mark."""
        if mark not in text:
            return plain_ids(self._tokenizer, text)
        if self._backend is None:
            return self._encode_by_pieces(text, mark)
        clone, name_of, id_of = self._clones(mark)

        def rename(match: re.Match[str]) -> str:
            if match["token"]:
                return name_of.get(match["token"], match["token"])
            return match["text"] or ""  # A template's string methods can isolate a mark.

        pattern = f"{mark}(?P<text>{self._names})|(?P<token>{self._names})|{mark}"
        text = re.sub(pattern, rename, text)
        return [id_of.get(id, id) for id in clone.encode(text, add_special_tokens=False).ids]

    def token_ends(self, text: str, mark: str) -> list[int]:
        """Return the place in a user text at which each of its tokens ends.

        Of the tokens of one character, each ends behind the character. Requires a tokenizer with a
        backend.

        Args:
            mark: a character that the text does not contain.
        """
        clone, _, _ = self._clones(mark)  # There the names of special tokens are text.
        return [end for _, end in clone.encode(text, add_special_tokens=False).offsets]

    @cached_property
    def _normalized_names(self) -> list[str]:
        """Normalized forms of the names that the tokenizer matches in normalized text."""
        added = self._tokenizer.added_tokens_decoder.values()
        names = [token.content for token in added if token.normalized and token.content in self.ids]
        return [self._normalize(name) for name in names] if self._backend else []

    def _becomes_name(self, text: str) -> bool:
        """Return whether normalization turns a text into a name, such as `[pad]` into `[PAD]`."""
        names = self._normalized_names
        normalized = self._normalize(text) if names else ""
        return any(name in normalized for name in names)

    def _normalize(self, text: str) -> str:
        assert self._backend is not None
        normalizer = self._backend.normalizer
        text = text.encode(errors="replace").decode()  # A lone surrogate is refused later.
        return text if normalizer is None else normalizer.normalize_str(text)

    def _clone(self, mark: str) -> tuple["Tokenizer", dict[str, str], dict[int | None, int]]:
        """Copy the tokenizer, with other names for its special tokens.

        Returns:
            The copy, {original name: name in the copy}, and {id in the copy: original id}.
        """
        from tokenizers import Tokenizer

        assert self._backend is not None
        content = json.loads(self._backend.to_str())
        specials = [token for token in content["added_tokens"] if token["content"] in self.ids]
        name_of = {
            token["content"]: f"{mark}{number}{mark}" for number, token in enumerate(specials)
        }
        id_of_name: dict[str, int] = {}
        for token in content["added_tokens"]:
            token["content"] = name_of.get(token["content"], token["content"])
            id_of_name[token["content"]] = token["id"]
        _rename_in_model(content["model"], name_of)
        content |= {"post_processor": None, "truncation": None, "padding": None}
        clone = Tokenizer.from_str(json.dumps(content))
        ids = {clone.token_to_id(name): id for name, id in id_of_name.items()}
        return clone, name_of, ids

    def _encode_by_pieces(self, text: str, mark: str) -> list[int]:
        """Encode piece by piece, as tokenizers that are written in Python do."""
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
    """Rename special tokens in a model's vocabulary, so that no text is segmented into one."""
    used_in_merges = set(_merged(model))
    name_of = {name: new for name, new in name_of.items() if name not in used_in_merges}
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
