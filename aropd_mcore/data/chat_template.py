"""Chat templates: messages as text, the same on every day, and errors in one line."""

import traceback
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
"""For tokenizers without a chat template: `User:`, a line break, the turn, a blank line."""

_TODAY = datetime(2024, 7, 26)
"""Date of every prompt, and the default of Llama 3's templates. Prompts must not change with the
moment at which a run is resumed."""
_LONGEST_ERROR = 300


class ChatTemplateError(ConfigError):
    """A chat template that cannot be used, or cannot show these messages."""


class MessagesRefused(ChatTemplateError):
    """The template itself refuses the messages, such as a system turn."""


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's own (default) chat template, or PLAIN_CHAT_TEMPLATE where it has none.

    Raises:
        ChatTemplateError: The tokenizer has several templates and no default.
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
    """The file that the chat template is read from; errors name it."""
    folder = Path(tokenizer.name_or_path)
    file = folder / "chat_template.jinja"
    return file if file.is_file() else folder / "tokenizer_config.json"


def check_repeatable(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a chat template that draws random numbers or random text.

    Raises:
        ChatTemplateError: Names the filter or function, and its line.
    """
    template = chat_template(tokenizer)
    try:
        environment = _compiled(template).environment
        tree = environment.parse(template)
        undeclared = meta.find_undeclared_variables(tree)
    except Exception as error:
        raise _error(tokenizer, error) from error
    random = [(f.lineno, "the filter 'random'") for f in tree.find_all(nodes.Filter) if _draws(f)]
    lorem = [
        (name.lineno, "the function 'lipsum'")
        for name in tree.find_all(nodes.Name)
        if name.name == "lipsum" and name.name in undeclared
    ]
    for line, source in sorted(random + lorem):
        raise ChatTemplateError(
            f"{template_file(tokenizer)}: line {line}: found {source}, expected a chat template "
            "that renders a row the same way every time; remove it from the template"
        )


def _draws(filter: nodes.Filter) -> bool:
    mapped = filter.args[:1] if filter.name == "map" else []
    return filter.name == "random" or any(
        isinstance(argument, nodes.Const) and argument.value == "random" for argument in mapped
    )


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, *, add_generation_prompt: bool = True
) -> str:
    """The messages as text, by `chat_template`, with the clock stopped at 26 July 2024.

    The text holds whatever BOS the template writes: encode it with add_special_tokens=False.

    Raises:
        MessagesRefused: The template refuses the messages (jinja's own errors count as refusals).
        ChatTemplateError: Any other failure of the template. Both name its file, and where jinja
            knows it the line.
    """
    template = chat_template(tokenizer)
    try:
        # apply_chat_template renders with this compiled template, which transformers caches. It
        # takes no functions as arguments, so the clock is stopped here.
        _compiled(template).environment.globals["strftime_now"] = _TODAY.strftime
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=_TODAY.strftime("%d %b %Y"),
        )
        assert isinstance(text, str)
        text.encode()  # Refuses half a surrogate pair, which tokenizers cannot take.
    except Exception as error:  # Templates are programs: anything, from a TypeError on.
        raise _error(tokenizer, error) from error
    return text


def generation_prompt_notes(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """A sentence where prompts end before the assistant's turn begins, otherwise nothing.

    The template is at fault where add_generation_prompt changes nothing, and a chat with a response
    has more than white space between the prompt and the response.
    """
    user, response = {"role": "user", "content": "a question"}, "a response"
    turns = [user, {"role": "assistant", "content": response}]
    prompt, without = (
        render_chat(tokenizer, [user], add_generation_prompt=wanted) for wanted in (True, False)
    )
    before, _, _ = render_chat(tokenizer, turns, add_generation_prompt=False).rpartition(response)
    missing = before.removeprefix(prompt)
    if prompt != without or not before.startswith(prompt) or not missing.strip():
        return ()
    return (
        f"{template_file(tokenizer)}: the chat template ignores add_generation_prompt: prompts end "
        f"before {missing!r}, so the student is not shown that its turn begins; add that text "
        "under {% if add_generation_prompt %}",
    )


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
    """An error's text in one line, with its type where the text alone would not explain it."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, ValueError | jinja2.TemplateError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST_ERROR else text[:_LONGEST_ERROR] + " ..."
