"""Building of a row's three prompts as token ids: student view, partial view, full view."""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

from aropd_mcore.config import ConfigError, View, ViewsConfig
from aropd_mcore.data.chat_template import (
    USER_TURN,
    ChatTemplateError,
    Messages,
    MessagesRefused,
    chat_template,
    check_arguments,
    check_repeatable,
    generation_prompt,
    render_chat,
    template_file,
)
from aropd_mcore.data.records import DataError
from aropd_mcore.data.special_tokens import SpecialTokens, unused_character
from aropd_mcore.data.template_notes import template_notes
from aropd_mcore.data.templates import (
    check_fields,
    fill,
    line_partial_trace,
    partial_trace,
    reference_partial_trace,
    sentence_partial_trace,
    token_partial_trace,
    write_trace,
)
from aropd_mcore.data.thoughts import opened_thought, split_thoughts
from aropd_mcore.data.tokenizer import response_end_id
from aropd_mcore.data.vocabulary import check_vocabulary, short_hash, tokenizer_hash
from aropd_mcore.types import Row, Views

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VIEWS: tuple[View, ...] = ("student", "partial", "full")

# Placeholder for a text while the chat template is rendered. It is plain ASCII, so that trimming or
# escaping by a template does not change it.
_SLOT = "aropd-slot"

_CUTS = {
    "words": partial_trace,
    "sentences": sentence_partial_trace,
    "lines": line_partial_trace,
    "reference": reference_partial_trace,
}
"""Functions that cut a reasoning, by the value of views.partial_cut. `tokens` needs the
tokenizer."""


class PromptTooLong(DataError):
    """Error: a row's prompt exceeds `max_prompt_tokens`. The caller drops and counts the row."""


@dataclass(frozen=True)
class Prompt:
    """One view of a row, with the texts that it shows."""

    ids: tuple[int, ...]
    question: str
    """The part of the question that the prompt shows. Shorter than the row's question if cut."""
    trace: str
    """The part of the oracle trace that the prompt shows. Empty for the student view."""
    num_cut_tokens: int


class ViewBuilder:
    """Builder of the prompts of METHOD section 2 for one tokenizer and one set of templates.

        student view   chat(system, student_template(question))
        partial view   chat(system, teacher_template(question, trace of the partial reasoning))
        full view      chat(system, teacher_template(question, trace of the whole reasoning))

    A view whose trace is empty (`prefix_without_answer` with ratio 0) equals the student view. If
    the chat template refuses or omits a system turn, the system text becomes the beginning of the
    user turn.

    Special tokens in a prompt come only from the chat template and the templates of `config`. Names
    of special tokens in user text (questions, traces, answers, system texts, chat turns) are text.

    Args:
        is_privileged: whether the teacher's views show more than the student's. If not, all three
            views are the student view (teacher.views `none`).
        vocab_size: size of the model's vocabulary. None: token ids are not checked.
    Raises:
        ConfigError: a template of `config` has an unknown, missing or repeated field. The chat
            template fails, is random, or does not show the user turn exactly once. A token id that
            a prompt or response can contain is not below vocab_size. views.partial_cut is
            `tokens`, and the tokenizer does not report the places of its tokens.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        config: ViewsConfig,
        *,
        vocab_size: int | None = None,
        is_privileged: bool = True,
    ) -> None:
        check_fields("views.student_template", config.student_template, ["question"])
        check_fields("views.teacher_template", config.teacher_template, ["question", "trace"])
        check_fields("views.trace_template", config.trace_template, ["reasoning", "answer"])
        check_repeatable(tokenizer)
        self.tokenizer = tokenizer
        self.config = config
        self.is_privileged = is_privileged
        self.end_id = response_end_id(tokenizer)
        """Token that ends a response, which is also appended to oracle responses."""
        self._special_tokens = SpecialTokens(tokenizer)
        if config.partial_cut == "tokens" and not tokenizer.is_fast:
            raise ConfigError(
                "views.partial_cut tokens: expected a tokenizer with a tokenizer.json, which "
                f"reports the places of its tokens, found {type(tokenizer).__name__}; choose "
                "another partial_cut"
            )
        self._templates = (
            chat_template(tokenizer),
            config.student_template,
            config.teacher_template,
            config.trace_template,
        )
        student = config.chat_template_kwargs
        teacher = student | config.teacher_chat_template_kwargs
        check_arguments(tokenizer, "views.chat_template_kwargs", student)
        check_arguments(
            tokenizer,
            "views.teacher_chat_template_kwargs",
            config.teacher_chat_template_kwargs,
        )
        self._arguments: dict[View, dict[str, Any]] = {
            "student": student,
            "partial": teacher,
            "full": teacher,
        }
        self._shows = lru_cache(maxsize=64)(self._shows_turns)
        self._frame(
            Row("", reasoning="", answer=""), "", unused_character(self._templates), "student"
        )
        if vocab_size is not None:
            check_vocabulary(tokenizer, vocab_size, self.written_ids())
        self.notes = template_notes(
            tokenizer, config, has_system_turn=self._shows(("system",), "student")
        )
        """Warnings about the templates, to print once at the start."""

    def build(self, row: Row) -> Views:
        """Build the three prompts of a row, each of at most `max_prompt_tokens`.

        With on_long_prompt "cut", a prompt over the limit loses only the beginning of its question:
        chat template, instructions and trace stay complete. With "cut_chat", the prompt loses its
        first tokens, including the chat template's.

        Raises:
            PromptTooLong: a prompt is over the limit, and on_long_prompt is "drop", or the prompt
                would be too long even without its question.
            DataError: the chat template cannot render the row, or omits its earlier turns.
        """
        (views,) = self._build(row, [self.config.median_ratio])
        return views

    def build_each(self, row: Row) -> list[Views]:
        """As `build`, for each ratio of views.partial_ratio."""
        return self._build(row, self.config.partial_ratios)

    def _build(self, row: Row, ratios: Sequence[float]) -> list[Views]:
        student = self.prompt(row, "student")
        partials = [self.prompt(row, "partial", ratio) for ratio in ratios]
        full = self.prompt(row, "full")
        return [
            Views(
                row=row,
                student_ids=student.ids,
                partial_ids=partial.ids,
                full_ids=full.ids,
                num_cut_tokens=sum(view.num_cut_tokens for view in (student, partial, full)),
            )
            for partial in partials
        ]

    def prompt(self, row: Row, view: View, ratio: float | None = None) -> Prompt:
        """Build one view of a row. Raises the same errors as `build`.

        Args:
            ratio: partial_ratio of the partial view. None: ViewsConfig.median_ratio.
        """
        ratio = self.config.median_ratio if ratio is None else ratio
        view = view if self.is_privileged else "student"
        mark = self._mark(row)
        question, trace = row.question.strip(), self._trace(row, view, ratio, mark)
        try:
            head, tail = self._frame(row, trace, mark, view)
        except ChatTemplateError as error:
            problem = "the chat template cannot render this row"
            raise DataError(row.origin, problem, str(error)) from error

        def ids_from(cut: int) -> list[int]:
            kept = self._special_tokens.protect(question[cut:], mark)
            return self._special_tokens.encode(head + kept + tail, mark)

        limit = self.config.max_prompt_tokens
        ids, cut = ids_from(0), 0
        num_tokens = len(ids)
        if num_tokens > limit:
            if self.config.on_long_prompt == "drop":
                problem = f"the {view} view's prompt is over max_prompt_tokens {limit}"
                raise PromptTooLong(row.origin, problem, f"{num_tokens} tokens")
            if self.config.on_long_prompt == "cut_chat":
                return self._cut_on_the_left(ids, question, trace.replace(mark, ""))
            # Find the smallest cut that fits. The number of tokens need not decrease with every
            # character, but the result of the bisection was itself encoded and fits.
            cuts = range(len(question) + 1)
            cut = bisect_left(cuts, True, key=lambda cut: len(ids_from(cut)) <= limit)
            if cut == len(cuts):
                problem = (
                    f"the {view} view's prompt is over max_prompt_tokens {limit} even without its "
                    "question: shorten its system prompt, its templates or the row's trace"
                )
                raise PromptTooLong(row.origin, problem, f"{len(ids_from(len(question)))} tokens")
            ids = ids_from(cut)
        shown_trace = trace.replace(mark, "")
        return Prompt(tuple(ids), question[cut:], shown_trace, num_tokens - len(ids))

    def _cut_on_the_left(self, ids: list[int], question: str, trace: str) -> Prompt:
        num_cut = len(ids) - self.config.max_prompt_tokens
        text = str(self.tokenizer.decode(ids[num_cut:]))
        question, trace = (_remaining_end(part, text) for part in (question, trace))
        return Prompt(tuple(ids[num_cut:]), question, trace, num_cut)

    def chat_ids(self, messages: Messages) -> tuple[int, ...]:
        """Encode chat turns as a prompt that ends where the assistant's next turn begins.

        Raises:
            ChatTemplateError: the chat template cannot render the turns.
        """
        text = json.dumps(messages, ensure_ascii=False, default=str)
        mark = unused_character([text, *self._templates])
        protected = self._special_tokens.protect_all(messages, mark)
        text = render_chat(self.tokenizer, protected, self._arguments["student"])
        return tuple(self._special_tokens.encode(text, mark))

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Encode user text. Names of special tokens in it are text."""
        mark = unused_character([text])
        protected = self._special_tokens.protect(text, mark)
        return tuple(self._special_tokens.encode(protected, mark))

    def oracle_response_ids(self, row: Row) -> tuple[int, ...]:
        """Encode the whole trace as a response, followed by the token that ends it.

        If prompts end with the opening tag of a thought and the trace begins with it, the response
        begins after the tag.
        """
        mark = self._mark(row)
        text = self._write_trace(row.reasoning, row.answer, mark)
        for written in (self.opening, self.opening.rstrip()):
            if written and text.startswith(written):
                text = text.removeprefix(written)
                break
        return (*self._special_tokens.encode(text, mark), self.end_id)

    @cached_property
    def opening(self) -> str:
        """Opening tag of a thought at the end of the student's prompts, with the white space after
        it. Empty if prompts open no thought."""
        end = generation_prompt(self.tokenizer, self._arguments["student"])
        tag = opened_thought(end)
        return end[end.rindex(tag) :] if tag else ""

    def loses_thoughts(self, row: Row) -> bool:
        """Return whether the chat template removes the thoughts of the row's earlier turns."""
        texts = (text for role, text in row.history if role == "assistant")
        return any(split_thoughts(text).thought for text in texts) and self._removes_thoughts

    @cached_property
    def _removes_thoughts(self) -> bool:
        thought, answer = f"{_SLOT}-thought", f"{_SLOT}-answer"
        turn = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{answer}"}
        text = render_chat(self.tokenizer, [USER_TURN, turn, USER_TURN], self._arguments["student"])
        return thought not in text

    @cached_property
    def template_hash(self) -> str:
        """Hash of the chat template and of all settings that affect a prompt. Runs record it."""
        return short_hash([chat_template(self.tokenizer), self.config.model_dump(mode="json")])

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """Hashes of `chat_template` and `tokenizer`, independent of where these are stored.

        If these hashes and the settings of `views` are equal, equal rows have equal prompts.
        """
        return {
            "chat_template": short_hash(chat_template(self.tokenizer)),
            "tokenizer": tokenizer_hash(self.tokenizer, self.end_id),
        }

    def _mark(self, row: Row) -> str:
        """Choose the character that marks special tokens' names in this row's texts."""
        texts = (row.question, row.reasoning, row.answer, self._system(row), *sum(row.history, ()))
        return unused_character([*texts, *self._templates])

    def _system(self, row: Row) -> str:
        return (self.config.system_prompt if row.system is None else row.system) or ""

    def _trace(self, row: Row, view: View, ratio: float, mark: str) -> str:
        """Return the trace that a view shows, protected."""
        if view == "student":
            return ""
        reasoning, answer = row.reasoning.strip(), row.answer
        if view == "partial":
            mode = self.config.partial_view
            reasoning = self._cut(reasoning, 0.0 if mode == "answer_only" else ratio, mark)
            answer = "" if mode == "prefix_without_answer" else answer
        return self._write_trace(reasoning, answer, mark)

    def _cut(self, reasoning: str, ratio: float, mark: str) -> str:
        """Return the part of a reasoning that the partial view shows."""
        if self.config.partial_cut == "tokens":
            ends = self._special_tokens.token_ends(reasoning, mark)
            return token_partial_trace(reasoning, ratio, ends)
        return _CUTS[self.config.partial_cut](reasoning, ratio)

    def _write_trace(self, reasoning: str, answer: str, mark: str) -> str:
        protect = self._special_tokens.protect
        template = self.config.trace_template
        return write_trace(template, protect(reasoning, mark), protect(answer, mark))

    def _frame(self, row: Row, trace: str, mark: str, view: View) -> tuple[str, str]:
        """Return the prompt's text before and after the question, protected like the trace."""
        history = [self._special_tokens.protect_all(turn, mark) for turn in row.history]
        system = self._special_tokens.protect(self._system(row), mark)
        slot = _unused_slot([trace, system, *sum(row.history, ()), *self._templates])
        if trace:
            user = fill(self.config.teacher_template, question=slot, trace=trace)
        else:
            user = fill(self.config.student_template, question=slot)
        messages = [{"role": role, "content": text} for role, text in (*history, ("user", user))]
        if system and self._shows(("system",), view):
            messages.insert(0, {"role": "system", "content": system})
        elif system:
            first = next(message for message in messages if message["role"] == "user")
            first["content"] = f"{system}\n\n{first['content']}"
        pieces = render_chat(self.tokenizer, messages, self._arguments[view]).split(slot)
        if len(pieces) != 2:
            raise ChatTemplateError(
                f"{template_file(self.tokenizer)}: the chat template shows the user turn "
                f"{len(pieces) - 1} times, expected once"
            )
        if history and not self._shows(tuple(role for role, _ in history), view):
            raise ChatTemplateError(
                f"{template_file(self.tokenizer)}: the chat template omits earlier turns"
            )
        return pieces[0], pieces[1]

    def _shows_turns(self, roles: tuple[str, ...], view: View) -> bool:
        """Return whether the chat template shows turns of these roles before a user turn."""
        slots = [f"{_SLOT}-{number}-" for number in range(len(roles))]
        turns = [*zip(roles, slots, strict=True), ("user", "a question")]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = render_chat(self.tokenizer, messages, self._arguments[view])
        except MessagesRefused:
            return False
        return all(slot in text for slot in slots)

    def written_ids(self) -> set[int]:
        """Return the ids that the templates write, and the id that ends a response."""
        user, turn = (
            {"role": "user", "content": "a question"},
            {"role": "assistant", "content": "a"},
        )
        chats: list[Messages] = [[user], [{"role": "system", "content": "a"}, user]]
        chats.append([user, turn, user])
        ids = {self.end_id}
        for messages in chats:
            with suppress(MessagesRefused):
                ids.update(self.chat_ids(messages))
        named = self._special_tokens.ids.items()
        return ids | {id for name, id in named if any(name in text for text in self._templates)}


def _remaining_end(part: str, text: str) -> str:
    """Return the end of `part` that remains in `text`, which was cut on its left."""
    if part in text:
        return part
    ends = (part[start:] for start in range(1, len(part) + 1))
    return next((end for end in ends if text.startswith(end)), "")


def _unused_slot(texts: Sequence[str]) -> str:
    slots = (f"{_SLOT}-{number}-" for number in count())
    return next(slot for slot in slots if not any(slot in text for text in texts))
