"""Separation of a response's thoughts, such as `<think>...</think>`, from its visible text."""

import re
from typing import NamedTuple

_TAG = re.compile(
    r"<(?P<end>/?)(?P<name>think|thinking|thoughts?|reasoning|reflection|scratchpad|seed:think)>"
    r"|<\|(?P<mark>begin|end)_of_thought\|>|\[(?P<slash>/?)THINK\]|◁(?P<stroke>/?)think▷"
    r"|(?P<channel>(?:<\|start\|>assistant)?<\|channel\|>"
    r"(?:(?P<final>final)|analysis|commentary)<\|message\|>)",
    re.IGNORECASE,
)


class Response(NamedTuple):
    """A response, split into its thoughts and its visible text."""

    thought: str
    """Text of all thoughts, without tags."""
    visible: str
    """Text outside of thoughts."""
    is_finished: bool
    """False if the last thought has no end. It then extends to the end of the response."""


def split_thoughts(response: str) -> Response:
    """Split a response into its thoughts and its visible part, in linear time.

    A closing tag without an opening tag ends a thought that began in the prompt. `<reasoning>` and
    the channels that gpt-oss writes before `final` are thoughts too. Other tags within a thought
    belong to the thought.
    """
    thoughts: list[str] = []
    visible: list[str] = []
    position, open_name = 0, None
    for tag in _TAG.finditer(response):
        is_end, name = _is_end(tag), _name(tag)
        if not is_end and open_name is None:
            visible.append(response[position : tag.start()])
            position, open_name = tag.end(), name
        elif is_end and open_name is None:
            thoughts, visible = [response[: tag.start()]], []
            position = tag.end()
        elif is_end and open_name == name:
            thoughts.append(response[position : tag.start()])
            position, open_name = tag.end(), None
    (visible if open_name is None else thoughts).append(response[position:])
    thought = "\n\n".join(text for part in thoughts if (text := _TAG.sub("", part).strip()))
    return Response(thought, "".join(visible), open_name is None)


def find_thought(response: str) -> tuple[int, int | None] | None:
    """Find the first thought of a response.

    Returns:
        The position after its opening tag and the position after its closing tag. The first is 0 if
        there is only a closing tag. The second is None if the thought has no end. None if there is
        no thought.
    """
    tags = _TAG.finditer(response)
    first = next(tags, None)
    if first is None:
        return None
    if _is_end(first):
        return 0, first.end()
    ends = (tag.end() for tag in tags if _is_end(tag) and _name(tag) == _name(first))
    return first.end(), next(ends, None)


def opened_thought(prompt: str) -> str:
    """Return the opening tag of a thought at the end of a prompt, or an empty string.

    If the chat template writes `<think>`, a response that is cut off within the thought has no tag.
    """
    last = prompt.rstrip()[-40:]
    tags = [tag[0] for tag in _TAG.finditer(last) if tag.end() == len(last)]
    return tags[0] if tags and not split_thoughts(tags[0]).is_finished else ""


def other_tag(text: str, opening: str) -> str:
    """Return the first tag of a text if it is of another kind than the tag `opening`, or an empty
    string."""
    first, known = _TAG.search(text), _TAG.fullmatch(opening)
    assert known is not None
    return first[0] if first and _name(first) != _name(known) else ""


def _is_end(tag: re.Match[str]) -> bool:
    return any(tag[name] for name in ("end", "slash", "stroke", "final")) or tag["mark"] == "end"


def _name(tag: re.Match[str]) -> str:
    return (tag["name"] or str(tag.lastgroup)).lower()
