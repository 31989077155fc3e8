"""Teacher signals as predictors of right responses.

A signal is a mean over the loss tokens y_t of a response, in nats:

    total      log f(y_t) - log s(y_t)    the full view against the student
    partial    log p(y_t) - log s(y_t)    the part of the anchor
    marginal   log f(y_t) - log p(y_t)    the residual, before clip and scale

s is the student, p the partial view and f the full view. A signal's AUC is the probability that
it is higher for a right response than for a wrong one.

Source: METHOD section 7, `predictors`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aropd_mcore.data.spans import prompt_opening
from aropd_mcore.evaluation.diagnose.summary import Scored
from aropd_mcore.evaluation.grade import Graders, check_graders, row_gold
from aropd_mcore.evaluation.statistics import accuracy, auc, auc_interval, interval
from aropd_mcore.evaluation.tasks import MathAnswer
from aropd_mcore.types import Views

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIGNALS = {
    "total": ("full", "student"),
    "partial": ("partial", "student"),
    "marginal": ("full", "partial"),
}
"""Signal name -> the distributions (a, b) of log a - log b."""


def predict(
    scored: Sequence[Scored],
    views: Sequence[Views],
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, Any]:
    """Grade the responses and compare the signals of right and wrong ones.

    Returns:
        The `predictors` of a diagnosis (see `compare`).
    """
    try:
        check_graders([MathAnswer("")])
    except ValueError as error:
        return compare(scored, [None] * len(scored), reason=str(error))
    return compare(scored, grade(scored, views, tokenizer))


def grade(
    scored: Sequence[Scored], views: Sequence[Views], tokenizer: "PreTrainedTokenizerBase"
) -> list[bool | None]:
    """Grade each response as `aropd eval` grades a task of format `math`.

    Returns:
        Whether each response is right. None: its row has no answer, or the answer is a program,
        which can only be run.
    """

    def text(one: Scored) -> str:
        # A thought that the prompt opens belongs to the response.
        opening = prompt_opening(tokenizer, views[one.row].student_ids)
        ids = list(one.rollout.response_ids)
        return opening + str(tokenizer.decode(ids, skip_special_tokens=True))

    golds = [row_gold(views[one.row].row.answer) for one in scored]
    request = [(text(one), gold) for one, gold in zip(scored, golds, strict=True) if gold]
    with Graders() as graders:
        grades = graders.grade_all(request)
        return [next(grades).verdict == "right" if gold else None for gold in golds]


def compare(
    scored: Sequence[Scored],
    right: Sequence[bool | None],
    *,
    reason: str | None = None,
) -> dict[str, Any]:
    """Compare the signals of right and wrong responses.

    Args:
        right: whether each response is right. None: it has no grade.
        reason: reason why there are no grades.
    Returns:
        graded       number of responses with a grade
        accuracy     share of graded responses that are right
        accuracy_95  95 % interval of the accuracy
        right, wrong numbers of right and wrong graded responses with loss tokens. The AUCs compare
                     these responses
        signals      signal name -> {auc, interval_95}. Intervals by bootstrap over rows
        reason       reason why there are no AUCs. None if there are

        A number that does not exist is None.
    """
    by_row: dict[int, list[bool]] = {}
    compared: list[tuple[Scored, bool]] = []
    for one, is_right in zip(scored, right, strict=True):
        if is_right is None:
            continue
        by_row.setdefault(one.row, []).append(is_right)
        if one.loss_tokens:
            compared.append((one, is_right))
    rights = np.array([is_right for _, is_right in compared], dtype=bool)
    num_right = int(rights.sum())
    num_wrong = len(rights) - num_right
    if reason is None and not by_row:
        reason = "no row has an answer that can be graded"
    if reason is None and not (num_right and num_wrong):
        kind = "wrong" if num_wrong else "right"
        reason = f"all graded responses with loss tokens are {kind}"
        if not compared:
            reason = "no graded response has loss tokens"
    signals: dict[str, Any] = {name: {"auc": None, "interval_95": None} for name in SIGNALS}
    if reason is None:
        rows = [one.row for one, _ in compared]
        for name in SIGNALS:
            values = np.array([one.mean_gap(*SIGNALS[name]) for one, _ in compared])
            bounds = auc_interval(values, rights, rows)
            signals[name] = {"auc": auc(values, rights), "interval_95": bounds and list(bounds)}
    samples = list(by_row.values())
    return {
        "graded": sum(map(len, samples)),
        "accuracy": accuracy(samples) if samples else None,
        "accuracy_95": list(interval(samples)) if samples else None,
        "right": num_right,
        "wrong": num_wrong,
        "signals": signals,
        "reason": reason,
    }
