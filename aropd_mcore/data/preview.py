"""The three views of a row as coloured text."""

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from aropd_mcore.config import View
from aropd_mcore.data.spans import find_thinking
from aropd_mcore.data.views import VIEWS, ViewBuilder
from aropd_mcore.types import Row

_QUESTION_STYLE, _PRIVILEGED_STYLE, _FRAME_STYLE = "not dim bold cyan", "not dim magenta", "dim"
_THINKING_STYLE, _ANSWER_STYLE = "yellow", "green"
_START = Text("◀ response", style="not dim bold reverse")
"""Mark of the place where a response begins."""


def render_views(builder: ViewBuilder, row: Row) -> RenderableType:
    """Render the row's three views as the model reads them, that is, their decoded token ids. There
    is one partial view per ratio of views.partial_ratio.

    The question and the privileged part have separate colours and token counts. Below are the
    oracle response, with a colour for each span, and notes about the chat template. Print the
    result with `rich.console.Console().print(...)`.

    Raises:
        PromptTooLong: see `ViewBuilder.build`.
    """
    ratios = builder.config.partial_ratios
    panels = [
        _panel(builder, row, view, ratio, show_ratio=view == "partial" and len(ratios) > 1)
        for view in VIEWS
        for ratio in (ratios if view == "partial" else ratios[:1])
    ]
    legend = Text.assemble(
        f"{row.origin}  ",
        ("question", _QUESTION_STYLE),
        "  ",
        ("privileged", _PRIVILEGED_STYLE),
        "  ",
        ("template", _FRAME_STYLE),
        "  ",
        ("thinking", _THINKING_STYLE),
        "  ",
        ("answer", _ANSWER_STYLE),
    )
    notes = list(builder.notes)
    if builder.loses_thoughts(row):
        notes.append("the chat template removes the thoughts of earlier assistant turns")
    response = _response_panel(builder, row)
    return Group(legend, *panels, response, *(Text(f"note: {note}") for note in notes))


def _response_panel(builder: ViewBuilder, row: Row) -> Panel:
    ids = builder.oracle_response_ids(row)
    prompt_ids = builder.prompt(row, "student").ids
    num_thinking = find_thinking(builder.tokenizer, prompt_ids, ids).end
    parts = {_THINKING_STYLE: ids[:num_thinking], _ANSWER_STYLE: ids[num_thinking:]}
    text = Text()
    for style, part in parts.items():
        text.append(str(builder.tokenizer.decode(list(part))), style)
    counts = f"{len(ids)} tokens, thinking {num_thinking}, answer {len(ids) - num_thinking}"
    return Panel(text, title=f"oracle response: {counts}", title_align="left")


def _panel(builder: ViewBuilder, row: Row, view: View, ratio: float, *, show_ratio: bool) -> Panel:
    prompt = builder.prompt(row, view, ratio)
    text = Text(str(builder.tokenizer.decode(list(prompt.ids))), style=_FRAME_STYLE)
    counts = [f"{len(prompt.ids)} tokens"]
    for name, part, style in (
        ("question", prompt.question, _QUESTION_STYLE),
        ("privileged", prompt.trace, _PRIVILEGED_STYLE),
    ):
        if part:
            num_tokens = len(builder.text_ids(part))
            counts.append(f"{name} {num_tokens}")
            # If decoding does not return the same text, the part stays uncoloured.
            start = text.plain.find(part)
            if start >= 0:
                text.stylize(style, start, start + len(part))
    if prompt.num_cut_tokens:
        counts.append(f"cut {prompt.num_cut_tokens}")
    text.append_text(_START)
    name = f"{view} view, ratio {ratio:g}" if show_ratio else f"{view} view"
    return Panel(text, title=f"{name}: {', '.join(counts)}", title_align="left")
