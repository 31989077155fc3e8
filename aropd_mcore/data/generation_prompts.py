"""Prompts to generate from: a file's lines, checked, and as token ids."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aropd_mcore.data.chat_template import ChatTemplateError
from aropd_mcore.data.dataset import parse_question, shown
from aropd_mcore.data.records import DataError, is_absent, read_records
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.types import Row

KINDS = ("question", "messages", "prompt_ids")
"""The keys that a prompt can be made of; a line has one of them, in one file all the same."""


@dataclass(frozen=True)
class PromptLine:
    """One line of a file of prompts."""

    fields: dict[str, Any]
    kind: str
    """Which of KINDS it has."""
    origin: str
    """`file:line`; errors name it."""


class PromptCounts(NamedTuple):
    """What a file of prompts holds."""

    num_prompts: int
    num_cut: int
    """Number of prompts that are cut to fit views.max_prompt_tokens."""
    longest: int
    """Tokens of the longest prompt."""


class Prompts:
    """The prompts of a JSONL or Parquet file, read as they are asked for.

        question      with an optional `system`: the student view, as in training
        messages      chat turns, each with `role` and `content`, by the chat template
        prompt_ids    token ids, taken as they are

    Args:
        vocab_size: of the model.
        max_tokens: that a prompt may have for its response to fit.
        reserved: keys that a line may not have, since its responses are written under them.
    """

    def __init__(
        self,
        path: Path,
        view_builder: ViewBuilder,
        *,
        vocab_size: int,
        max_tokens: int,
        reserved: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self._view_builder = view_builder
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._reserved = reserved

    def __iter__(self) -> Iterator[PromptLine]:
        """The lines in order.

        Raises:
            DataError: the file cannot be read; a line is broken, has none or several of KINDS, or
                another one than the first line.
        """
        first: PromptLine | None = None
        for origin, record in read_records(self.path):
            if isinstance(record, DataError):
                raise record
            line = PromptLine(record, self._kind(record, origin), origin)
            first = first or line
            if line.kind != first.kind:
                problem = f"expected key {first.kind!r}, as in {first.origin}; a file has one kind"
                raise DataError(origin, problem, f"key {line.kind!r}")
            yield line

    def check(self) -> "PromptCounts":
        """Go through the whole file.

        Raises:
            DataError: as iteration and `ids`; a field of Parquet's that JSON has no word for, since
                the output is JSON; or there is no prompt.
        """
        num_prompts = num_cut = longest = 0
        for line in self:
            ids, num_cut_tokens = self.ids(line)
            _check_json(line)
            num_prompts += 1
            num_cut += num_cut_tokens > 0
            longest = max(longest, len(ids))
        if not num_prompts:
            raise DataError(str(self.path), "expected at least one prompt", "none")
        return PromptCounts(num_prompts, num_cut, longest)

    def ids(self, line: PromptLine) -> tuple[tuple[int, ...], int]:
        """A line's prompt as token ids, and how many tokens were cut off.

        Raises:
            DataError: it is broken, or too long: a question by the rules of views.max_prompt_tokens
                and views.on_long_prompt, and any prompt whose response would not fit behind it.
        """
        num_cut = 0
        if line.kind == "question":
            question, system = parse_question(line.fields, line.origin)
            row = Row(question, reasoning="", answer="", system=system, origin=line.origin)
            prompt = self._view_builder.prompt(row, "student")
            ids, num_cut = prompt.ids, prompt.num_cut_tokens
        elif line.kind == "messages":
            ids = self._chat_ids(line)
        else:
            ids = self._given_ids(line)
        if len(ids) > self._max_tokens:
            problem = f"expected a prompt of at most {self._max_tokens} tokens, to leave room for "
            raise DataError(line.origin, problem + "the response", f"{len(ids)} tokens")
        return ids, num_cut

    def _kind(self, record: dict[str, Any], origin: str) -> str:
        kinds = [kind for kind in KINDS if not is_absent(record.get(kind))]
        if len(kinds) != 1:
            problem = "expected one of the keys " + ", ".join(map(repr, KINDS))
            raise DataError(origin, problem, "keys " + (", ".join(map(str, record)) or "none"))
        for key in self._reserved:
            if key in record:
                problem = f"key {key!r} is what a response is written under; give it another name"
                raise DataError(origin, problem)
        return kinds[0]

    def _chat_ids(self, line: PromptLine) -> tuple[int, ...]:
        messages = line.fields["messages"]
        if not isinstance(messages, list) or not messages:
            problem = "key 'messages': expected a list of chat turns"
            raise DataError(line.origin, problem, shown(messages))
        for number, turn in enumerate(messages):
            has_text = isinstance(turn, dict) and all(
                isinstance(turn.get(key), str) for key in ("role", "content")
            )
            if not has_text:
                problem = f"key 'messages', turn {number}: expected 'role' and 'content', strings"
                raise DataError(line.origin, problem, shown(turn))
        try:
            return self._view_builder.chat_ids(messages)
        except ChatTemplateError as error:
            problem = "key 'messages': the chat template cannot show them"
            raise DataError(line.origin, problem, str(error)) from error

    def _given_ids(self, line: PromptLine) -> tuple[int, ...]:
        ids = line.fields["prompt_ids"]
        if not isinstance(ids, list) or not ids:
            problem = "key 'prompt_ids': expected a list of token ids, at least one"
            raise DataError(line.origin, problem, shown(ids))
        for number, id in enumerate(ids):
            if type(id) is not int or not 0 <= id < self._vocab_size:
                problem = (
                    f"key 'prompt_ids', place {number}: expected a token id from 0 to "
                    f"{self._vocab_size - 1}"
                )
                raise DataError(line.origin, problem, shown(id))
        return tuple(ids)


def _check_json(line: PromptLine) -> None:
    for key, value in line.fields.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            problem = f"key {key!r}: expected what JSON can say"
            raise DataError(line.origin, problem, shown(value)) from error
