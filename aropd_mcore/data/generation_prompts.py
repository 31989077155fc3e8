"""Files of prompts for generation: reading, checks, and conversion to token ids."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aropd_mcore.config import source_name
from aropd_mcore.data.chat_template import ChatTemplateError
from aropd_mcore.data.dataset import parse_question, shown
from aropd_mcore.data.records import DataError, is_absent, read_records
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.types import Row

KINDS = ("question", "messages", "prompt_ids")
"""Keys of a prompt. Each line has exactly one of them, and all lines of a file the same one."""


@dataclass(frozen=True)
class PromptLine:
    """One line of a file of prompts."""

    fields: dict[str, Any]
    kind: str
    """The key among KINDS that the line has."""
    origin: str
    """Source of the line, as `file:line`, for error messages."""


class PromptCounts(NamedTuple):
    """Summary of a file of prompts."""

    num_prompts: int
    num_cut: int
    """Number of prompts that are cut to fit views.max_prompt_tokens."""
    longest: int
    """Number of tokens of the longest prompt."""


class Prompts:
    """The prompts of a source, read on demand.

        question      with an optional `system`: the student view, as in training
        messages      chat turns, each with `role` and `content`, rendered by the chat template
        prompt_ids    token ids, used unchanged

    Args:
        vocab_size: size of the model's vocabulary.
        max_tokens: maximum length of a prompt that leaves room for the response.
        reserved: keys that a line must not have, since its responses are written under them.
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
        """Yield the lines in order.

        Raises:
            DataError: the file cannot be read, or a line is broken, has none or several of KINDS,
                or has another kind than the first line.
        """
        first: PromptLine | None = None
        for origin, record in read_records(self.path):
            if isinstance(record, DataError):
                raise record
            line = PromptLine(record, self._kind(record, origin), origin)
            first = first or line
            if line.kind != first.kind:
                problem = f"expected key {first.kind!r} as in {first.origin}: use one kind per file"
                raise DataError(origin, problem, f"key {line.kind!r}")
            yield line

    def check(self) -> "PromptCounts":
        """Check the whole file, and summarize it.

        Raises:
            DataError: as in iteration and `ids`. Also if there is no prompt, or a Parquet value has
                no JSON form, since the output is JSON.
        """
        num_prompts = num_cut = longest = 0
        for line in self:
            ids, num_cut_tokens = self.ids(line)
            _check_json(line)
            num_prompts += 1
            num_cut += num_cut_tokens > 0
            longest = max(longest, len(ids))
        if not num_prompts:
            raise DataError(source_name(self.path), "expected at least one prompt", "none")
        return PromptCounts(num_prompts, num_cut, longest)

    def ids(self, line: PromptLine) -> tuple[tuple[int, ...], int]:
        """Convert a line's prompt to token ids. Returns the ids, and the number of tokens cut off.

        Raises:
            DataError: the prompt is broken, it leaves no room for the response, or it is a question
                that views.max_prompt_tokens and views.on_long_prompt refuse.
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
                problem = f"key {key!r} is reserved for responses; rename the key in the file"
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
            problem = "key 'messages': the chat template cannot render the chat"
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
            problem = f"key {key!r}: expected a value that JSON can hold"
            raise DataError(line.origin, problem, shown(value)) from error
