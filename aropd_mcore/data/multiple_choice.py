"""Multiple-choice questions as text: the same for training rows and for benchmarks."""

from collections.abc import Sequence
from typing import Any

from aropd_mcore.data.answer_marks import Unusable

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_MEDMCQA_CHOICES = ("opa", "opb", "opc", "opd")
MEDMCQA_KEYS = (*_MEDMCQA_CHOICES, "cop", "exp")
"""Keys of a MedMCQA record besides `question`: choices, index of the right choice, explanation."""


def choice_question(question: str, choices: Sequence[str]) -> str:
    """Build the user turn: question, choices with letters, and the request for a letter."""
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    request = "Answer with the letter of the choice."
    return "\n".join([question.strip(), "", *lines, "", request])


def medmcqa_choices(record: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Return the four choices of a MedMCQA record, and the index of the right one.

    Raises:
        Unusable: a choice is missing or not a string, or `cop` is not an index from 0 to 3.
    """
    for key in _MEDMCQA_CHOICES:
        if not isinstance(record.get(key), str):
            raise Unusable(f"{key!r} is {'not a string' if key in record else 'missing'}")
    right = record.get("cop")
    if type(right) is not int or not 0 <= right < len(_MEDMCQA_CHOICES):
        # The test split has -1, since its answers are not published.
        raise Unusable(
            "'cop' is not 0 to 3, as in the data set on the Hub (the authors' files count from 1)"
        )
    return tuple(record[key] for key in _MEDMCQA_CHOICES), right
