"""Warnings about chat templates whose prompts may differ from the user's expectation."""

import os
from typing import TYPE_CHECKING, Any

from aropd_mcore.config import ViewsConfig
from aropd_mcore.data.chat_template import (
    USER_TURN,
    generation_prompt,
    render_chat,
    template_file,
)
from aropd_mcore.data.thoughts import opened_thought, other_tag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arguments = dict[str, Any]
_SYSTEM_IN_USER_TURN = (
    "the chat template has no system turn, so views.system_prompt is the beginning of the user turn"
)


def template_notes(
    tokenizer: "PreTrainedTokenizerBase", config: ViewsConfig, *, has_system_turn: bool
) -> tuple[str, ...]:
    """Return the warnings about a tokenizer's chat template, one sentence each.

    Args:
        has_system_turn: whether the template shows a system turn.
    Raises:
        ChatTemplateError: the template fails.
    """
    student = config.chat_template_kwargs
    teacher = student | config.teacher_chat_template_kwargs
    system = None
    if config.system_prompt:
        system = None if has_system_turn else _SYSTEM_IN_USER_TURN
    elif has_system_turn:
        system = _default_system_prompt(tokenizer, student)
    notes = (
        _missing_generation_prompt(tokenizer, student),
        _other_end(tokenizer, student, teacher) if student != teacher else None,
        system,
        _other_thought(tokenizer, config),
        _missing_bos(tokenizer, student),
    )
    return tuple(f"{template_file(tokenizer)}: {note}" for note in notes if note)


def _missing_generation_prompt(
    tokenizer: "PreTrainedTokenizerBase", arguments: Arguments
) -> str | None:
    """Describe a prompt that ends before the header of the assistant's turn.

    This is so if add_generation_prompt changes nothing, and a chat with a response has more than
    white space between the prompt and the response.
    """
    if generation_prompt(tokenizer, arguments):
        return None
    response = "a response"
    turns = [USER_TURN, {"role": "assistant", "content": response}]
    prompt = render_chat(tokenizer, [USER_TURN], arguments)
    chat = render_chat(tokenizer, turns, arguments, add_generation_prompt=False)
    before, _, _ = chat.rpartition(response)
    missing = before.removeprefix(prompt)
    if not before.startswith(prompt) or not missing.strip():
        return None
    return (
        f"the chat template ignores add_generation_prompt: prompts end before {missing!r}, so they "
        "do not show the student that its turn begins; add that text under "
        "{% if add_generation_prompt %}"
    )


def _other_end(
    tokenizer: "PreTrainedTokenizerBase", student: Arguments, teacher: Arguments
) -> str | None:
    """Describe prompts of student and teacher that end differently."""
    ends = [generation_prompt(tokenizer, arguments) for arguments in (student, teacher)]
    if ends[0] == ends[1]:
        return None
    return (
        f"the student's prompts end with {ends[0]!r} and the teacher's with {ends[1]!r}: the "
        "teacher scores the response as if it began elsewhere, for example inside of a thought; "
        "remove the difference from views.teacher_chat_template_kwargs"
    )


def _other_thought(tokenizer: "PreTrainedTokenizerBase", config: ViewsConfig) -> str | None:
    """Describe prompts that open a thought while the views ask for another kind of thought."""
    opening = opened_thought(generation_prompt(tokenizer, config.chat_template_kwargs))
    if not opening:
        return None
    for name in ("system_prompt", "trace_template"):
        text = getattr(config, name) or ""
        tag = other_tag(text, opening)
        if tag:
            return (
                f"prompts end with {opening!r}, and views.{name} asks for {tag}: responses would "
                f"have two kinds of thoughts; write views.{name} without {tag}, or with {opening}"
            )
    return None


def _default_system_prompt(
    tokenizer: "PreTrainedTokenizerBase", arguments: Arguments
) -> str | None:
    """Describe the text that a template writes if there is no system turn."""
    system, user = "aropd-system", "aropd-user"
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    before = render_chat(tokenizer, turns[1:], arguments).partition(user)[0]
    between = render_chat(tokenizer, turns, arguments).partition(system)[2].partition(user)[0]
    # Both texts end with the header of the user's turn.
    header = os.path.commonprefix([before[::-1], between[::-1]])  # noqa: RUF071
    default = (
        before[: len(before) - len(header)].removeprefix(str(tokenizer.bos_token or "")).strip()
    )
    if not default:
        return None
    return (
        f"without a system turn, the chat template begins prompts with {default[:200]!r}; set "
        "views.system_prompt to replace that text"
    )


def _missing_bos(tokenizer: "PreTrainedTokenizerBase", arguments: Arguments) -> str | None:
    """Describe a template without the BOS that the tokenizer writes before other texts."""
    bos = str(tokenizer.bos_token or "")
    if not bos or list(tokenizer("a")["input_ids"])[:1] != [tokenizer.bos_token_id]:
        return None
    if render_chat(tokenizer, [USER_TURN], arguments).startswith(bos):
        return None
    return (
        f"the tokenizer begins texts with {bos!r} and the chat template does not, so prompts begin "
        f"without it; add {{{{ bos_token }}}} to the template if the model was trained with it"
    )
