"""Rendering of chat templates, independent of the date, with errors in one line."""

import re
import traceback
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta, nodes

from aropd_mcore.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""Template for tokenizers without one: `User:`, a line break, the turn, a blank line."""

_TODAY = datetime(2024, 7, 26)
"""Date in every prompt, which is the default of Llama 3's templates. The date is fixed because
prompts must not change when a run is resumed on another day."""
_LONGEST_ERROR = 300
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}>")
_GIVEN = {"messages", "add_generation_prompt", "date_string", "tools", "documents"}
_GIVEN |= {"strftime_now", "raise_exception", "namespace", "range"}
"""Variables that transformers or jinja give to every template, and that no setting replaces."""
USER_TURN = {"role": "user", "content": "a question"}


class ChatTemplateError(ConfigError):
    """Error: a chat template cannot be used, or cannot render these messages."""


class MessagesRefused(ChatTemplateError):
    """Error: the template itself refuses the messages, for example a system turn."""


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the tokenizer's (default) chat template, or PLAIN_CHAT_TEMPLATE if it has none.

    Raises:
        ChatTemplateError: the tokenizer has several templates and no default.
    """
    if not tokenizer.chat_template:
        return PLAIN_CHAT_TEMPLATE
    try:
        template = tokenizer.get_chat_template()
    except Exception as error:
        raise _error(tokenizer, error) from error
    if not isinstance(template, str):
        problem = f"found {type(template).__name__} as chat template, expected a string"
        raise ChatTemplateError(f"{template_file(tokenizer)}: {problem}")
    return template


def template_file(tokenizer: "PreTrainedTokenizerBase") -> Path:
    """Return the file that contains the chat template, for error messages."""
    folder = Path(tokenizer.name_or_path)
    file = folder / "chat_template.jinja"
    return file if file.is_file() else folder / "tokenizer_config.json"


def check_repeatable(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a chat template that uses random numbers, or prints an object's memory address.

    Raises:
        ChatTemplateError: the template does so (the message names the filter or function and its
            line), or it fails.
    """
    template = chat_template(tokenizer)
    try:
        tree = _compiled(template).environment.parse(template)
    except Exception as error:
        raise _error(tokenizer, error) from error
    random = [(f.lineno, "the filter 'random'") for f in tree.find_all(nodes.Filter) if _draws(f)]
    lorem = [name for name in tree.find_all(nodes.Name) if name.name == "lipsum"]
    if all(name.ctx == "load" for name in lorem):  # Otherwise `lipsum` is a template variable.
        random += [(name.lineno, "the function 'lipsum'") for name in lorem]
    problems = [f"line {line}: found {source}" for line, source in sorted(random)]
    if not problems and _ADDRESS.search(render_chat(tokenizer, [USER_TURN])):
        problems = ["found an object printed with its address, such as a filter's generator"]
    if problems:
        raise ChatTemplateError(
            f"{template_file(tokenizer)}: {problems[0]}, expected a chat template that renders a "
            "chat the same way every time; remove it from the template"
        )


def _draws(filter: nodes.Filter) -> bool:
    mapped = filter.args[:1] if filter.name == "map" else []
    return filter.name == "random" or any(
        isinstance(argument, nodes.Const) and argument.value == "random" for argument in mapped
    )


def check_arguments(
    tokenizer: "PreTrainedTokenizerBase", setting: str, arguments: Mapping[str, Any]
) -> None:
    """Refuse arguments that the chat template does not read.

    Args:
        setting: name of the setting, for the message.
    Raises:
        ChatTemplateError: an argument is not a variable of the template.
    """
    template = chat_template(tokenizer)
    tree = _compiled(template).environment.parse(template)
    special = set(tokenizer.special_tokens_map)
    known = sorted(meta.find_undeclared_variables(tree) - _GIVEN - special)
    for name in arguments:
        if name not in known:
            raise ChatTemplateError(
                f"{setting}.{name}: {template_file(tokenizer)} does not read it; expected "
                f"{'one of ' + ', '.join(known) if known else 'no arguments'}"
            )


def generation_prompt(
    tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any] | None = None
) -> str:
    """Return the text that add_generation_prompt appends to a chat: the header of a response."""
    with_prompt, without = (
        render_chat(tokenizer, [USER_TURN], arguments, add_generation_prompt=flag)
        for flag in (True, False)
    )
    return with_prompt.removeprefix(without)


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    arguments: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render messages as text by `chat_template`, with the date fixed at 26 July 2024.

    Args:
        arguments: further variables of the template; see check_arguments.

    The text includes the BOS that the template writes, so encode it with add_special_tokens=False.

    Raises:
        MessagesRefused: the template refuses the messages. Errors of jinja itself, other than
            syntax errors, count as refusals.
        ChatTemplateError: any other failure of the template. Both errors name the template's file,
            and the line if jinja reports it.
    """
    template = chat_template(tokenizer)
    try:
        # apply_chat_template renders with this compiled template, which transformers caches. The
        # method accepts no functions as arguments, so the date is fixed in the template's globals.
        _compiled(template).environment.globals["strftime_now"] = _TODAY.strftime
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=_TODAY.strftime("%d %b %Y"),
            **(arguments or {}),
        )
        assert isinstance(text, str)
        text.encode()  # Refuses half a surrogate pair, which tokenizers cannot take.
    except Exception as error:  # A template is a program and can raise any error.
        raise _error(tokenizer, error) from error
    return text


def _compiled(template: str) -> jinja2.Template:
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template(template)


def _error(tokenizer: "PreTrainedTokenizerBase", error: Exception) -> ChatTemplateError:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename in ("<template>", "<unknown>")
    ]
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else (lines or [None])[-1]
    is_refusal = isinstance(error, jinja2.TemplateError) and not isinstance(
        error, jinja2.TemplateSyntaxError
    )
    place = f"{template_file(tokenizer)}: " + (f"line {line}: " if line else "")
    kind = MessagesRefused if is_refusal else ChatTemplateError
    return kind(f"{place}the chat template failed: {one_line(error)}")


def one_line(error: Exception) -> str:
    """Return an error's text in one line, with its type unless it is a ValueError or jinja's."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, ValueError | jinja2.TemplateError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST_ERROR else text[:_LONGEST_ERROR] + " ..."
