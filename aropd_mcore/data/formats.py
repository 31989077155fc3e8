"""Conversion of published data sets' records to question, reasoning and answer.

    name      a record has                             reasoning comes from
    rows      question or messages, reasoning, answer  reasoning, unchanged
    numina    problem or question, solution, answer    solution
    gsm8k     question, answer                         answer, up to its last line `#### 7`
    tags      a question and a response                the response
    messages  messages, or ShareGPT's conversations    the assistant turn after the last user turn
    medmcqa   question, opa to opd, cop, exp           exp
    code      a question and a response with a         the response without its code blocks
              code block

The answer of `medmcqa` is a letter. The answer of `code` is the response's first code block with
its fences. `code` must be selected by its name: detection reads such a record as `tags`.

In the other formats the answer is the record's `answer`. If there is none, the answer is the first
of these that the trace has: the last `<answer>...</answer>`, a last line `#### 7`, the last
`\\boxed{}`. A thought, as in `<think>...</think>` or `<reasoning>`, is a part of the reasoning.
Marks inside a thought are ignored.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from textwrap import dedent
from typing import Any

from aropd_mcore.data.answer_marks import (
    Unusable,
    answer_text,
    split_boxed,
    split_hashes,
    split_tags,
)
from aropd_mcore.data.chat import read_turns
from aropd_mcore.data.multiple_choice import (
    LETTERS,
    MEDMCQA_KEYS,
    choice_question,
    medmcqa_choices,
)
from aropd_mcore.data.records import DataError, is_absent, shown, shown_keys
from aropd_mcore.data.thoughts import split_thoughts

Record = dict[str, Any]

_QUESTION_KEYS = ("question", "problem", "prompt", "instruction")
_RESPONSE_KEYS = ("response", "completion", "output", "answer", "solution")
_CHAT_KEYS = ("messages", "conversations")
_TYPE_KEYS = ("question_type", "problem_type")
_VALIDITY_KEYS = ("problem_is_valid", "solution_is_valid")
USED_KEYS = (
    *("reasoning", "reasoning_content", "thinking", "input", "history", *MEDMCQA_KEYS),
    *(_QUESTION_KEYS + _RESPONSE_KEYS + _CHAT_KEYS + _TYPE_KEYS + _VALIDITY_KEYS),
)
"""Keys that `convert` reads."""

_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_EMPTY_ANSWERS = ("", "nan", "null")
_PLACEHOLDERS = (
    *("proof", "proven", "proved", "qed", "proofiscomplete", "seesolution", "seeproof"),
    *("notfound", "notprovided", "notavailable", "noanswer", "n/a", "?", "youranswer"),
    *("youranswerhere", *_EMPTY_ANSWERS),
)
"""Placeholders for an answer in data sets, without white space, `_`, `-` and `.`."""

_OPENS_WITH_ANSWER = re.compile(
    r"\W*(?:(?:the\s+)?(?:correct\s+)?(?:ans(?:wer)?|option)(?:\W|is\b)*[a-d]\s*"
    r"(?:$|[^\w\s]|is\s+correct\b|i\.?e\b)|[a-d]\s*\)|[a-d](?:\W*\si\.?e\b|\s*i\.e\b))",
    re.IGNORECASE,
)
"""Pattern of an explanation that begins with the letter: `Ans. is 'b' i.e., ...`, `(d) ...`,
`Option A is correct ...`."""

_SOLUTION_MARK = re.compile(r"<\|(?:begin|end)_of_solution\|>")


@dataclass(frozen=True)
class Exchange:
    """A question and its oracle solution."""

    prompt: Record
    """The row's key `question` or `messages` with its value."""
    reasoning: str
    answer: str
    other_answer: str | None
    """An answer that the trace marks and that differs from `answer`. None if there is none."""


def convert(record: Record, origin: str, format: str = "auto") -> tuple[str, Exchange]:
    """Convert a record to an exchange. Returns the name of the format, and the exchange.

    Args:
        format: a name from the table above, or "auto" to detect the format from the record's keys.

    Raises:
        DataError: the record has no known format, its question, trace or answer is incomplete, or
            they do not belong to one exchange.
    """
    present = {key: value for key, value in record.items() if not is_absent(value)}
    name = _detect(present) if format == "auto" else format
    if name is None:
        keys = shown_keys(sorted(present)) if present else "keys (none)"
        raise DataError(origin, f"no known format for the {keys}", shown_keys(record))
    exchange = CONVERTERS[name](present, origin)
    if "messages" not in exchange.prompt:
        _check_no_lost_turns(present, origin)
    return name, exchange


def _detect(record: Record) -> str | None:
    keys, answer = set(record), record.get("answer")
    answer_or_trace = answer if isinstance(answer, str) else ""
    has_response = not keys.isdisjoint(("response", "completion", "output"))
    if "reasoning" in keys and keys & {"question", "messages"} and not has_response:
        return "rows"
    if "problem" in keys and keys & {"solution", "reasoning", "answer"}:
        return "numina"
    if keys & set(_CHAT_KEYS):
        return "messages"
    if keys.issuperset(("question", *MEDMCQA_KEYS[:-1])):
        return "medmcqa"
    if "question" in keys and "####" in answer_or_trace:
        return "gsm8k"
    has_parts = "solution" in keys or isinstance(answer, int | float)
    if "question" in keys and has_parts and "<answer>" not in answer_or_trace:
        return "numina"
    if keys & set(_QUESTION_KEYS) and keys & set(_RESPONSE_KEYS):
        return "tags"
    return "numina" if "problem" in keys else None


def _from_rows(record: Record, origin: str) -> Exchange:
    key = "messages" if "question" not in record and "messages" in record else "question"
    reasoning = _text(record, "reasoning", origin)
    missing = "no 'answer', and no \\boxed{} in 'reasoning'"
    exchange = _exchange({key: record.get(key)}, reasoning, record, origin, missing)
    return replace(exchange, reasoning=reasoning)


def _from_numina(record: Record, origin: str) -> Exchange:
    for key in _VALIDITY_KEYS:
        if record.get(key, "Yes") not in ("Yes", True):
            raise DataError(origin, f"{key!r} is not 'Yes'", shown(record[key]))
    for key in _TYPE_KEYS:
        value = record.get(key)
        if isinstance(value, str) and _squeezed(value) == "proof":
            raise DataError(origin, f"{key!r} is 'proof': there is no final answer")
    questions = [_text(record, key, origin) for key in ("problem", "question") if key in record]
    if len({question.strip() for question in questions}) > 1:
        problem = "'problem' and 'question' differ: remove one of them"
        raise DataError(origin, problem, " and ".join(map(shown, questions)))
    question = questions[0] if questions else _text(record, "problem", origin)
    key = "reasoning" if "reasoning" in record and "solution" not in record else "solution"
    trace = _text(record, key, origin) if key in record else ""
    missing = f"no 'answer', and no \\boxed{{}} in {key!r}"
    return _exchange({"question": question.strip()}, trace, record, origin, missing)


def _from_gsm8k(record: Record, origin: str) -> Exchange:
    question, trace = (_text(record, key, origin) for key in ("question", "answer"))
    missing = "no line '#### answer' at the end of 'answer'"
    return _exchange({"question": question.strip()}, trace, {}, origin, missing)


def _from_tags(record: Record, origin: str) -> Exchange:
    question = _question(record, origin)
    key = _first_key(record, _RESPONSE_KEYS, origin)
    own = {} if key == "answer" else record
    missing = f"no <answer>...</answer> in {key!r}"
    trace = _with_thought(record, _text(record, key, origin))
    return _exchange({"question": question}, trace, own, origin, missing)


def _from_medmcqa(record: Record, origin: str) -> Exchange:
    try:
        choices, right = medmcqa_choices(record)
    except Unusable as error:
        raise DataError(origin, str(error), shown(record.get("cop"))) from error
    explanation = _text(record, "exp", origin).strip()
    if _OPENS_WITH_ANSWER.match(explanation):
        problem = "'exp' begins with the answer, so it is not a reasoning that leads to the answer"
        raise DataError(origin, problem, shown(explanation))
    question = choice_question(_text(record, "question", origin), choices)
    return Exchange({"question": question}, explanation, LETTERS[right], None)


def _from_code(record: Record, origin: str) -> Exchange:
    question = _question(record, origin)
    key = _first_key(record, _RESPONSE_KEYS, origin)
    response = _text(record, key, origin)
    prose, blocks, is_open = _split_code(response)
    if not blocks:
        raise DataError(origin, f"no code block (```) in {key!r}", shown(response))
    if is_open:
        raise DataError(origin, f"a code block in {key!r} has no end", shown(blocks[-1]))
    if not "".join(blocks[0].splitlines()[1:-1]).strip():
        raise DataError(origin, f"the first code block in {key!r} is empty", shown(response))
    return Exchange({"question": question}, prose, blocks[0], None)


def _split_code(text: str) -> tuple[str, list[str], bool]:
    """Return the lines outside code blocks, the code blocks with fences, and whether one is open.

    Fences follow CommonMark: a block ends at a line that consists of backticks only, at least as
    many as in the block's first line.
    """
    prose: list[str] = []
    blocks: list[list[str]] = []
    fence = ""
    for line in text.splitlines():
        opens = None if fence else _FENCE.match(line)
        if opens:
            fence = opens[1]
            blocks.append([])
        (blocks[-1] if fence else prose).append(line.rstrip())
        mark = line.strip()
        if fence and not opens and mark.startswith(fence) and not mark.strip("`"):
            fence = ""
    squeezed = re.sub(r"\n{3,}", "\n\n", "\n".join(prose))
    return squeezed.strip(), [dedent("\n".join(block)).strip() for block in blocks], bool(fence)


_FENCE = re.compile(r"\s*(`{3,})[^`]*$")
"""Pattern of a line that begins a code block: backticks and an optional language."""


def _from_messages(record: Record, origin: str) -> Exchange:
    key = _first_key(record, _CHAT_KEYS, origin)
    turns = read_turns(record[key], origin, key=key)
    roles = [role for role, _ in turns]
    if "user" not in roles:
        raise DataError(origin, f"{key!r} has no user turn")
    last_user = len(roles) - 1 - roles[::-1].index("user")
    after = roles[last_user + 1 :]
    if "assistant" not in after:
        raise DataError(origin, f"{key!r} has no assistant turn after the last user turn")
    if len(after) > 1:
        problem = f"{key!r} has more than one turn after the last user turn"
        raise DataError(origin, problem, ", ".join(after[:8]))
    turns[last_user] = ("user", turns[last_user][1].strip())
    prompt = [{"role": role, "content": text} for role, text in turns[:-1]]
    trace = _with_thought(record[key][-1], turns[-1][1])
    missing = "the assistant turn has no <answer>, '####' or \\boxed{}"
    return _exchange({"messages": prompt}, trace, record, origin, missing)


CONVERTERS: dict[str, Callable[[Record, str], Exchange]] = {
    "rows": _from_rows,
    "gsm8k": _from_gsm8k,
    "numina": _from_numina,
    "tags": _from_tags,
    "messages": _from_messages,
    "medmcqa": _from_medmcqa,
    "code": _from_code,
}


def _exchange(prompt: Record, trace: str, record: Record, origin: str, missing: str) -> Exchange:
    """Combine a trace with the record's `answer`, or with the answer that the trace marks.

    Args:
        missing: the problem that the DataError states if there is neither.
    """
    thought, visible, is_finished = split_thoughts(trace)
    if not is_finished:
        raise DataError(origin, "the thought (<think>) has no end, so there is no answer")
    visible = _SOLUTION_MARK.sub("", visible)
    solutions = [reader(visible) for reader in (split_tags, split_hashes, split_boxed)]
    marked = [solution for solution in solutions if solution and solution[1]]
    reasoning = marked[0][0] if marked else visible.strip()
    answers = [_unboxed(answer) for _, answer in marked]
    if own_answer := _own_answer(record, origin):
        answers.insert(0, own_answer)
    if not answers:
        raise DataError(origin, missing, shown(trace))
    if (placeholder := _squeezed(_plain(answers[0]))) in _PLACEHOLDERS:
        raise DataError(origin, f"the answer is {placeholder!r}: there is no final answer")
    others = [answer for answer in answers if _plain(answer) != _plain(answers[0])]
    whole = "\n\n".join(part for part in (thought, reasoning) if part)
    return Exchange(prompt, whole, answers[0], others[0] if others else None)


def _question(record: Record, origin: str) -> str:
    """Read the question under any of its keys, with Alpaca's `input` after its `instruction`."""
    key = _first_key(record, _QUESTION_KEYS, origin)
    question = _text(record, key, origin).strip()
    if key == "instruction" and "input" in record:
        question = f"{question}\n\n{_text(record, 'input', origin)}".strip()
    return question


def _with_thought(record: Record, response: str) -> str:
    """Prepend the thought that the record has under a separate key to the response."""
    thought = next((v for key in _THOUGHT_KEYS if isinstance(v := record.get(key), str)), "")
    has_thought = not thought.strip() or thought.strip() in response
    return response if has_thought else f"<think>{thought}</think>{response}"


def _own_answer(record: Record, origin: str) -> str:
    """Read the record's `answer`. Returns an empty string if there is none."""
    try:
        answer = answer_text(record.get("answer", ""))
    except Unusable as error:
        raise DataError(origin, str(error), shown(record["answer"])) from error
    return "" if _squeezed(answer) in _EMPTY_ANSWERS else _unboxed(answer)


def _unboxed(answer: str) -> str:
    boxed = split_boxed(answer)
    return boxed[1] if boxed else answer


def _check_no_lost_turns(record: Record, origin: str) -> None:
    """Refuse a record whose question comes from one key and whose earlier turns are in another."""
    if record.get("history"):  # LLaMA-Factory: [question, response] of each earlier exchange
        problem = "'history' has turns before the question: write all turns as 'messages'"
        raise DataError(origin, problem, shown(record["history"]))
    for key in _CHAT_KEYS:
        turns = record.get(key)
        roles = [
            turn.get("role") or turn.get("from")
            for turn in (turns if isinstance(turns, list) else ())
            if isinstance(turn, dict)
        ]
        if sum(role in ("user", "human") for role in roles) > 1:
            problem = f"{key!r} has several user turns: use --format messages"
            raise DataError(origin, problem)


def _plain(answer: str) -> str:
    """Remove insignificant notation: `\\textbf{(1,025) }` becomes `1025`.

    This is not a grader. Equal answers in other notations stay different, and are reported as in
    doubt.
    """
    text = re.sub(r"\\[dt]frac", r"\\frac", answer.replace("−", "-"))
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[!,;:$ ]|[\s$]", "", text)
    text = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", text)  # 1,000
    text = re.sub(r"(?<=\d)\.0+(?!\d)", "", text).rstrip(".")
    if match := re.fullmatch(r"\(([^()]*)\)", text):
        text = match[1]
    return re.sub(r"^(-?)0+(?=\d+$)", r"\1", text)


def _squeezed(text: str) -> str:
    return re.sub(r"[\s_.-]", "", text).casefold()


def _text(record: Record, key: str, origin: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        problem = f"{key!r} is {'missing' if value is None else 'not a string'}"
        raise DataError(origin, problem, shown(value))
    return value


def _first_key(record: Record, keys: Sequence[str], origin: str) -> str:
    for key in keys:
        if key in record:
            return key
    raise DataError(origin, f"none of the keys {', '.join(keys)}", shown_keys(record))
