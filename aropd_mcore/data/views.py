"""Row -> student prompt, partial view, full view, as token ids."""

import hashlib
import json
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from jinja2 import TemplateError

from aropd_mcore.config import ConfigError, ViewsConfig
from aropd_mcore.data.records import DataError
from aropd_mcore.data.templates import check_fields, fill, partial_trace, write_trace
from aropd_mcore.data.tokenizer import chat_template, render_chat, response_end_id
from aropd_mcore.types import Row, Views

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

View = Literal["student", "partial", "full"]
VIEWS: tuple[View, ...] = get_args(View)

# Stands for the question while the chat template is rendered; plain ASCII, so that no template's
# trimming or escaping changes it.
_SLOT = "aropd-question-slot-5b1c"


class PromptTooLong(DataError):
    """A row whose prompt does not fit `max_prompt_tokens`; the caller drops and counts it."""


@dataclass(frozen=True)
class Prompt:
    """One view of a row, with the texts that it was made from."""

    ids: tuple[int, ...]
    question: str
    """What the prompt shows of the question; shorter than the row's where it was cut."""
    trace: str
    """What the prompt shows of the oracle trace; empty for the student."""
    num_cut_tokens: int


class ViewBuilder:
    """Builds the prompts of METHOD section 2 with one tokenizer and one set of templates.

        student view   chat(system, student_template(question))
        partial view   chat(system, teacher_template(question, trace of the partial reasoning))
        full view      chat(system, teacher_template(question, trace of the whole reasoning))

    A view whose trace is empty (`prefix_without_answer` with ratio 0) has nothing to show as a
    worked example, and is the student view. Where the chat template refuses or leaves out a system
    turn, the system text opens the user turn.

    Raises:
        ConfigError: a template with an unknown, missing or repeated field, or a chat template that
            does not show the user turn once.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: ViewsConfig) -> None:
        check_fields("views.student_template", config.student_template, ["question"])
        check_fields("views.teacher_template", config.teacher_template, ["question", "trace"])
        check_fields("views.trace_template", config.trace_template, ["reasoning", "answer"])
        self.tokenizer = tokenizer
        self.config = config
        self.end_id = response_end_id(tokenizer)
        """Ends a response; appended to oracle responses."""
        self._takes_system_turn = self._shows_system_turn()

    def build(self, row: Row) -> Views:
        """The three prompts of a row, each of at most `max_prompt_tokens`.

        With on_long_prompt "cut", a prompt over the limit loses the beginning of its question and
        nothing else: chat template, instructions and trace stay whole.

        Raises:
            PromptTooLong: a prompt is over the limit, and on_long_prompt is "drop" or it would be
                too long with no question at all.
        """
        student, partial, full = (self.prompt(row, view) for view in VIEWS)
        return Views(
            row=row,
            student_ids=student.ids,
            partial_ids=partial.ids,
            full_ids=full.ids,
            num_cut_tokens=sum(view.num_cut_tokens for view in (student, partial, full)),
        )

    def prompt(self, row: Row, view: View) -> Prompt:
        """One view of a row; raises as `build` does."""
        question, trace = row.question.strip(), self._trace(row, view)
        head, tail = self._frame(row, trace)

        def ids_from(cut: int) -> list[int]:
            return self._encode(head + question[cut:] + tail)

        limit = self.config.max_prompt_tokens
        ids, cut = ids_from(0), 0
        num_tokens = len(ids)
        if num_tokens > limit:
            if self.config.on_long_prompt == "drop":
                problem = f"the {view} view's prompt is over max_prompt_tokens {limit}"
                raise PromptTooLong(row.origin, problem, f"{num_tokens} tokens")
            # The least cut that fits. The number of tokens need not fall with every character, but
            # the cut that bisection ends at was itself encoded and found to fit.
            cuts = range(len(question) + 1)
            cut = bisect_left(cuts, True, key=lambda cut: len(ids_from(cut)) <= limit)
            if cut == len(cuts):
                problem = (
                    f"the {view} view's prompt is over max_prompt_tokens {limit} even without its "
                    "question: shorten its system prompt, its templates or the row's trace"
                )
                raise PromptTooLong(row.origin, problem, f"{len(ids_from(len(question)))} tokens")
            ids = ids_from(cut)
        return Prompt(tuple(ids), question[cut:], trace, num_tokens - len(ids))

    def oracle_response_ids(self, row: Row) -> tuple[int, ...]:
        """The whole trace as a response, with the token that ends it."""
        text = write_trace(self.config.trace_template, row.reasoning, row.answer)
        # A special token's name within the text is text here: it must not end the response.
        return (*self._encode(text, split_special_tokens=True), self.end_id)

    @cached_property
    def template_hash(self) -> str:
        """Of the chat template and of every setting that shapes a prompt; runs record it."""
        parts = [chat_template(self.tokenizer), self.config.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _trace(self, row: Row, view: View) -> str:
        if view == "student":
            return ""
        reasoning, answer = row.reasoning.strip(), row.answer
        if view == "partial":
            mode = self.config.partial_view
            ratio = 0.0 if mode == "answer_only" else self.config.partial_ratio
            reasoning = partial_trace(reasoning, ratio)
            answer = "" if mode == "prefix_without_answer" else answer
        return write_trace(self.config.trace_template, reasoning, answer)

    def _frame(self, row: Row, trace: str) -> tuple[str, str]:
        """The prompt's text before and after the question."""
        if trace:
            user = fill(self.config.teacher_template, question=_SLOT, trace=trace)
        else:
            user = fill(self.config.student_template, question=_SLOT)
        system = self.config.system_prompt if row.system is None else row.system
        messages = [{"role": "user", "content": user}]
        if system and self._takes_system_turn:
            messages.insert(0, {"role": "system", "content": system})
        elif system:
            messages[0]["content"] = f"{system}\n\n{user}"
        pieces = render_chat(self.tokenizer, messages).split(_SLOT)
        if len(pieces) != 2:
            raise ConfigError(
                f"{self.tokenizer.name_or_path}: the chat template shows the user turn "
                f"{len(pieces) - 1} times, expected once"
            )
        return pieces[0], pieces[1]

    def _shows_system_turn(self) -> bool:
        messages = [
            {"role": "system", "content": _SLOT},
            {"role": "user", "content": "a question"},
        ]
        try:
            return _SLOT in render_chat(self.tokenizer, messages)
        except TemplateError:
            return False

    def _encode(self, text: str, *, split_special_tokens: bool = False) -> list[int]:
        return self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens
        )
