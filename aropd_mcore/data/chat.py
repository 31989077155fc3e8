"""Reading the chat turns of a record, and splitting them into system text, history and question."""

from typing import Any, NamedTuple

from aropd_mcore.data.records import DataError, is_absent, shown

Turn = tuple[str, str]
"""Role and text."""

ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class Prompt(NamedTuple):
    """The parts of a Row that come before the response."""

    system: str | None
    history: tuple[Turn, ...]
    question: str


def read_turns(value: Any, origin: str, *, key: str = "messages") -> list[Turn]:
    """Read a list of {role, content}, or of ShareGPT's {from, value}.

    Content is a string, or a list of {"type": "text", "text": ...} parts, which are joined. A turn
    that calls a tool is refused, since its text is not the whole turn.

    Args:
        value: the record's value under `key`.

    Raises:
        DataError: the value is not such a list, or a turn has another role or other content.
    """
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        problem = f"{key!r} is not a list of objects with 'role' and 'content'"
        raise DataError(origin, problem, shown(value))
    return [_read_turn(turn, origin, f"turn {n} of {key!r}") for n, turn in enumerate(value, 1)]


def split_turns(turns: list[Turn], origin: str) -> Prompt:
    """Split turns that end with the question, which is the last user turn.

    The question may follow a system turn and pairs of a user turn and an assistant turn.

    Raises:
        DataError: the turns are in another order, or a user or assistant turn is empty.
    """
    has_system = bool(turns) and turns[0][0] == "system"
    history = turns[has_system:]
    if any(role == "system" for role, _ in history):
        raise DataError(origin, "a system turn is not the first turn")
    for number, (role, text) in enumerate(history):
        if role != ("assistant" if number % 2 else "user"):
            problem = "the turns do not alternate between user and assistant, from a user turn on"
            raise DataError(origin, problem, f"roles {_roles(turns)}")
        if not text.strip():
            raise DataError(origin, f"the text of a turn is empty (role {role!r})")
    if len(history) % 2 == 0:
        raise DataError(origin, "the last turn is not the user's", f"roles {_roles(turns)}")
    system = turns[0][1] if has_system else None
    return Prompt(system, tuple(history[:-1]), history[-1][1])


def _read_turn(turn: dict[str, Any], origin: str, place: str) -> Turn:
    turn = {key: value for key, value in turn.items() if not is_absent(value)}
    role, text_key = turn.get("role"), "content"
    if role is None and isinstance(turn.get("from"), str):
        role, text_key = _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "value"
    if not isinstance(role, str) or role not in ROLES:
        problem = f"the role of a turn is not one of {', '.join(ROLES)}"
        raise DataError(origin, problem, f"{place}: {shown(role)}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise DataError(origin, "a turn calls a tool", place)
    content = turn.get(text_key)
    if isinstance(content, list) and content:
        content = "".join(_part_text(part, origin, place) for part in content)
    if not isinstance(content, str):
        problem = f"{text_key!r} is {'missing' if content is None else 'not a string'}"
        raise DataError(origin, problem, f"{place}: {shown(content)}")
    return role, content


def _part_text(part: Any, origin: str, place: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise DataError(origin, "a part of 'content' is not text", f"{place}: {shown(part)}")
    return text


def _roles(turns: list[Turn]) -> str:
    roles = [role for role, _ in turns]
    return ", ".join(roles if len(roles) <= 8 else [*roles[:7], "..."])
