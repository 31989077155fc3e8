"""Diagnosis of scored responses, in the form of its JSON file.

    schema        "aropd-diagnosis/3". It changes with the format
    model         path, weights (student or teacher), step, teacher, dtype
    data          path, rows, samples (per row)
    settings      lambda, clip, thresholds, views and sampling, by their names in a run's config
    metrics       metrics of METHOD section 7 over the loss tokens, also by position (NAME/BUCKET)
                  and by span (NAME/thinking, NAME/answer). Support gaps
                  (numerics/token_diagnostics.py). Metrics of the responses: lengths,
                  truncation_rate, premature_answer_rate, ends_with_answer_rate
    residual      log f - log p of the sampled loss tokens: mean, quantiles, and a histogram whose
                  first and last bins are unbounded
    hindsight     hindsight token rate by thresholds: gaps, floors, and rates[gap][floor]
    tenths        metrics by the tenth of the response that contains the token, and num_tokens
    reliability   by the number of tokens that the full view shows: see `_reliability`
    response_ends number of responses that ended by themselves (finished) or at the limit (cut).
                  eos_prob: mean probability of the EOS token at the end of the finished responses,
                  under each distribution (student, partial, full, target)
    predictors    AUC of the teacher's signals as predictors of a right response (predictors.py)
    vocabulary    token id -> text, for the tokens in `rollouts`
    rollouts      responses for the reader. Each has row, sample, question, answer, prompt, text,
                  finished, premature, ends_with_answer, loss_tokens ([first, end), positions of the
                  tokens in the loss), num_thinking_tokens, and these lists with one item per token:
                  ids, residual, hindsight (true or false), the log-probability under student,
                  partial, full and target, and top: [[id, probability under student, partial, full,
                  target], ...], the likeliest tokens of any distribution, likeliest first

Log-probabilities are in nats. A number that does not exist is null.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aropd_mcore.config import ObjectiveConfig
from aropd_mcore.data.answer_match import ends_with_answer, is_premature
from aropd_mcore.numerics.position_metrics import (
    BY_POSITION,
    hindsight_tokens,
    sum_by_position,
    token_metrics,
)
from aropd_mcore.numerics.token_diagnostics import DISTRIBUTIONS
from aropd_mcore.types import Rollout, Views

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = "aropd-diagnosis/3"
GAPS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
"""Values of tau in nats for the hindsight token rate by thresholds."""
FLOORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Values of epsilon for the hindsight token rate by thresholds."""
_EDGES = tuple(x / 2 for x in range(-10, 11))
"""Bin edges of the residual's histogram in nats."""
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_NUM_BUCKETS = 4
"""Number of buckets of privileged context lengths."""
_MIN_PROBABILITY = 5e-4
"""The reader shows a candidate token if any distribution gives it this probability."""


@dataclass(frozen=True)
class Scored:
    """A response and the scores of its tokens."""

    row: int
    sample: int
    rollout: Rollout
    scores: Mapping[str, np.ndarray]
    """Scores of `numerics.token_diagnostics`. Responses for the reader have the likeliest tokens,
    too."""
    loss_tokens: range
    """Positions of the loss tokens in the response."""
    num_thinking_tokens: int = 0
    """Length of the response's thinking span (data.spans)."""

    def loss_scores(self, name: str) -> np.ndarray:
        """Return a score of the loss tokens."""
        return self.scores[name][self.loss_tokens.start : self.loss_tokens.stop]

    def mean_gap(self, a: str, b: str) -> float:
        """Return the mean of log a - log b over the loss tokens, computed in fp64."""
        a_T, b_T = (self.loss_scores(f"logprob_{name}").astype(np.float64) for name in (a, b))
        return float((a_T - b_T).mean())


def summarize(
    scored: Sequence[Scored],
    views: Sequence[Views],
    tokenizer: "PreTrainedTokenizerBase",
    objective: ObjectiveConfig,
) -> dict[str, Any]:
    """Compute the diagnosis, except for `model`, `data`, `settings` and `predictors`.

    Raises:
        ValueError: no response has a loss token.
    """
    offset_T = torch.cat([torch.tensor(one.loss_tokens, dtype=torch.int64) for one in scored])
    if not len(offset_T):
        longest = max(len(one.rollout.response_ids) for one in scored)
        raise ValueError(
            "no response has loss tokens after objective.skip_response_tokens "
            f"{objective.skip_response_tokens} of objective.loss_span {objective.loss_span}: the "
            f"longest response has {longest} tokens"
        )
    is_thinking_T = torch.tensor(
        [offset < one.num_thinking_tokens for one in scored for offset in one.loss_tokens]
    )
    tokens = {
        name: torch.cat([torch.from_numpy(one.loss_scores(name)) for one in scored]).double()
        for name in scored[0].scores
        if not name.startswith("top_")
    }
    tokens["hindsight_token_rate"] = _hindsight(tokens, objective)
    logprobs = {name: tokens.pop(f"logprob_{name}") for name in DISTRIBUTIONS}
    residual_T = logprobs["full"] - logprobs["partial"]
    right = [_ends_with_gold(one, views, tokenizer) for one in scored]
    metrics = token_metrics(sum_by_position(tokens, offset_T, is_thinking_T))
    return {
        "schema": SCHEMA,
        "metrics": metrics | _response_metrics(scored, views, tokenizer, right),
        "residual": _residual(residual_T),
        "hindsight": _sweep_thresholds(logprobs),
        "tenths": _tenths(tokens, offset_T, scored),
        "reliability": list(_reliability(scored, views, right)),
        "response_ends": _response_ends(scored),
        **_reader(scored, views, tokenizer, objective),
    }


def _hindsight(scores: Mapping[str, Any], objective: ObjectiveConfig) -> Tensor:
    full_T, partial_T = (torch.as_tensor(scores[f"logprob_{v}"]) for v in ("full", "partial"))
    gap, floor = objective.hindsight_gap, objective.hindsight_floor
    return hindsight_tokens(full_T, partial_T, gap=gap, floor=floor)


def _ends_with_gold(
    one: Scored, views: Sequence[Views], tokenizer: "PreTrainedTokenizerBase"
) -> bool:
    return ends_with_answer(tokenizer, one.rollout.response_ids, views[one.row].row.answer)


def _response_metrics(
    scored: Sequence[Scored],
    views: Sequence[Views],
    tokenizer: "PreTrainedTokenizerBase",
    right: Sequence[bool],
) -> dict[str, Any]:
    ids = [one.rollout.response_ids for one in scored]
    lengths = np.array([len(response) for response in ids])
    premature = [
        is_premature(tokenizer, one.rollout.response_ids, views[one.row].row.answer)
        for one in scored
    ]
    return {
        "num_responses": len(scored),
        "response_length_mean": float(lengths.mean()),
        **{
            f"response_length_p{int(100 * q)}": float(np.quantile(lengths, q))
            for q in (0.1, 0.5, 0.9)
        },
        "truncation_rate": float(np.mean([not one.rollout.finished for one in scored])),
        "premature_answer_rate": float(np.mean(premature)),
        "ends_with_answer_rate": float(np.mean(right)),
    }


def _residual(residual_T: Tensor) -> dict[str, Any]:
    values = residual_T.numpy()
    edges = (-np.inf, *_EDGES[1:-1], np.inf)
    return {
        "mean": float(values.mean()),
        "quantiles": {str(q): float(np.quantile(values, q)) for q in _QUANTILES},
        "edges": list(_EDGES),
        "counts": np.histogram(values, edges)[0].tolist(),
    }


def _sweep_thresholds(logprobs: Mapping[str, Tensor]) -> dict[str, Any]:
    def rate(gap: float, floor: float) -> float:
        found_T = hindsight_tokens(logprobs["full"], logprobs["partial"], gap=gap, floor=floor)
        return float(found_T.double().mean())

    rates = [[rate(gap, floor) for floor in FLOORS] for gap in GAPS]
    return {"gaps": list(GAPS), "floors": list(FLOORS), "rates": rates}


def _tenths(
    tokens: Mapping[str, Tensor], offset_T: Tensor, scored: Sequence[Scored]
) -> dict[str, list[Any]]:
    lengths = torch.tensor([len(one.rollout.response_ids) for one in scored])
    counts = torch.tensor([len(one.loss_tokens) for one in scored])
    length_T = lengths.repeat_interleave(counts)
    tenth_T = offset_T * 10 // length_T
    counts = torch.bincount(tenth_T, minlength=10)
    names = [*BY_POSITION, *(name for name in tokens if name.startswith("support_gap"))]
    sums = {name: torch.bincount(tenth_T, tokens[name].double(), minlength=10) for name in names}
    means = {name: (values / counts).tolist() for name, values in sums.items()}
    means = {name: [v if math.isfinite(v) else None for v in row] for name, row in means.items()}
    return {"num_tokens": counts.tolist()} | means


def _reliability(
    scored: Sequence[Scored], views: Sequence[Views], right: Sequence[bool]
) -> Iterator[dict[str, Any]]:
    """Measure the reliability of the full view's teacher by the length of its privileged context.

    The responses are split into quarters by the number of tokens that the full view's prompt has
    beyond the student's. Each quarter has:

        tokens_from, tokens_to  range of this number
        responses               number of responses
        ends_with_answer        share of responses that end with the answer
        prefers_right           probability that a response that ends with the answer has a higher
                                mean of log f - log s than one that does not. 0.5 is chance. None if
                                there is no such pair
        kl_full_partial         mean of KL(f || p) over loss tokens
        entropy_full            mean entropy of f over loss tokens
        gain_full_student       mean of log f - log s over loss tokens
    """
    shown = [len(views[one.row].full_ids) - len(views[one.row].student_ids) for one in scored]
    cuts = np.quantile(shown, np.arange(1, _NUM_BUCKETS) / _NUM_BUCKETS)
    buckets = np.searchsorted(cuts, shown).tolist()
    gains = [one.loss_scores("logprob_full") - one.loss_scores("logprob_student") for one in scored]
    for bucket in sorted(set(buckets)):
        members = [i for i in range(len(scored)) if buckets[i] == bucket]
        means = [(float(gains[i].mean()), right[i]) for i in members if len(gains[i])]
        pairs = [
            (good > bad) + (good == bad) / 2
            for good, is_right in means
            if is_right
            for bad, is_right_too in means
            if not is_right_too
        ]
        lengths = [shown[i] for i in members]

        def token_mean(name: str, members: Sequence[int] = members) -> float | None:
            return _mean(np.concatenate([scored[i].loss_scores(name) for i in members]))

        yield {
            "tokens_from": min(lengths),
            "tokens_to": max(lengths),
            "responses": len(members),
            "ends_with_answer": sum(right[i] for i in members) / len(members),
            "prefers_right": sum(pairs) / len(pairs) if pairs else None,
            "kl_full_partial": token_mean("kl_full_partial"),
            "entropy_full": token_mean("entropy_full"),
            "gain_full_student": _mean(np.concatenate([gains[i] for i in members])),
        }


def _response_ends(scored: Sequence[Scored]) -> dict[str, Any]:
    """Count finished and cut responses, and compute P(EOS) at the end of the finished ones.

    The last token of a finished response is the EOS.
    """
    finished = [one.scores for one in scored if one.rollout.finished]
    return {
        "finished": len(finished),
        "cut": len(scored) - len(finished),
        "eos_prob": {
            name: _mean(np.exp([scores[f"logprob_{name}"][-1] for scores in finished]))
            for name in DISTRIBUTIONS
        },
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _reader(
    scored: Sequence[Scored],
    views: Sequence[Views],
    tokenizer: "PreTrainedTokenizerBase",
    objective: ObjectiveConfig,
) -> dict[str, Any]:
    vocabulary: dict[int, str] = {}
    rollouts = []
    for one in scored:
        if "top_ids" not in one.scores:
            continue
        row, ids = views[one.row].row, list(one.rollout.response_ids)
        scores = one.scores
        tops = [
            list(_top(*token))
            for token in zip(scores["top_ids"], scores["top_logprobs"], strict=True)
        ]
        used = {id for top in tops for id, *_ in top} | set(ids)
        vocabulary |= {id: token_text(tokenizer, id) for id in used - vocabulary.keys()}
        rollouts.append(
            {
                "row": row.id or row.origin,
                "sample": one.sample,
                "question": row.question,
                "answer": row.answer,
                "prompt": str(tokenizer.decode(list(views[one.row].student_ids))),
                "text": str(tokenizer.decode(ids)),
                "finished": one.rollout.finished,
                "premature": is_premature(tokenizer, ids, row.answer),
                "ends_with_answer": ends_with_answer(tokenizer, ids, row.answer),
                "loss_tokens": [one.loss_tokens.start, one.loss_tokens.stop],
                "num_thinking_tokens": one.num_thinking_tokens,
                "ids": ids,
                "residual": _rounded(scores["logprob_full"] - scores["logprob_partial"]),
                "hindsight": [bool(value) for value in _hindsight(scores, objective)],
                **{name: _rounded(scores[f"logprob_{name}"]) for name in DISTRIBUTIONS},
                "top": tops,
            }
        )
    return {"vocabulary": dict(sorted(vocabulary.items())), "rollouts": rollouts}


def _top(ids: np.ndarray, logprobs: np.ndarray) -> Iterator[list[Any]]:
    """Yield each candidate token once, with its probabilities, likeliest first."""
    likeliest = np.argsort(-logprobs.max(1), kind="stable")
    seen: set[int] = set()
    for place in likeliest:
        id, probabilities = int(ids[place]), np.exp(logprobs[place].astype(np.float64))
        if id not in seen and probabilities.max() >= _MIN_PROBABILITY:
            seen.add(id)
            yield [id, *(round(float(p), 4) for p in probabilities)]


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) + 0.0 for value in values]  # never -0.0


def token_text(tokenizer: "PreTrainedTokenizerBase", id: int) -> str:
    """Return a token's text, or its vocabulary entry if it has no complete character."""
    text = str(tokenizer.decode([id]))
    piece = tokenizer.convert_ids_to_tokens(id)
    if "\ufffd" in text or not text:
        return str(piece)
    # SentencePiece drops the space before the first word.
    return f" {text}" if str(piece).startswith("\u2581") and not text.startswith(" ") else text
