"""What travels between the rooms: plain, frozen records.

    Row -> Views -> Rollout -> Sample -> Microbatch -> TeacherOutput

Shape letters: B samples of a microbatch, S padded sequence, T loss tokens of a microbatch
(flattened over its samples), H hidden.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One training example: a question and its oracle solution."""

    question: str
    reasoning: str
    answer: str
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    """Earlier chat turns as (role, content), between the system turn and the question."""
    sample_weight: float = 1.0
    id: str = ""
    origin: str = ""
    """Where it came from, as `file:line`; errors name it."""


@dataclass(frozen=True)
class Views:
    """The three prompts of a row, as token ids; the response is spliced behind each of them."""

    row: Row
    student_ids: tuple[int, ...]
    partial_ids: tuple[int, ...]
    full_ids: tuple[int, ...]
    num_cut_tokens: int = 0
    """Tokens cut to fit views.max_prompt_tokens, over the three views together."""


@dataclass(frozen=True)
class Rollout:
    """One sampled response."""

    response_ids: tuple[int, ...]
    """The sampled ids, with the EOS that ended it; never decoded and encoded again."""
    logprobs: tuple[float, ...]
    """Natural log-prob of each sampled token under the sampling weights, before temperature,
    top-k and top-p."""
    finished: bool
    """True when it ended by EOS, False when the limit cut it off."""
    weight_version: int
    """The sampling weights: the number of training steps behind their last update."""


@dataclass(frozen=True)
class Sample:
    """What training needs of a rollout: its three prompts, the response and its weight."""

    student_ids: tuple[int, ...]
    partial_ids: tuple[int, ...]
    full_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    token_weight: float
    """Of each of its loss tokens; globally normalized."""
    logprobs: tuple[float, ...] = ()
    """Of the response's tokens under the weights that sampled it, where they are wanted."""
    finished: bool = False
    """Whether the response ended by EOS, which is then its last token."""


class ViewBatch(NamedTuple):
    """One of a microbatch's three views: prompts and responses, padded on the right, or packed."""

    tokens_BS: Tensor
    """int64 [B, S]; [1, S] where samples are packed one behind another."""
    hidden_index_T: Tensor
    """int64 [T]: index into the flattened [S * B] hidden states (Megatron's [S, B, H] order) of
    the position that predicts each loss token."""
    bounds: Tensor | None = None
    """int32 [B + 1]: where each packed sample begins, and where the last one ends; over all context
    ranks. None where samples are padded."""
    longest: int = 0
    """Tokens of the longest packed sample, for which the device need not be asked."""
    padding_BS: Tensor | None = None
    """bool [B, S]: True where there is no real token; where routers have losses (mcore.router)."""

    def to(self, device: torch.device) -> "ViewBatch":
        moved = {
            name: part.to(device, non_blocking=True)
            for name, part in self._asdict().items()
            if isinstance(part, Tensor)
        }
        return self._replace(**moved)


@dataclass(frozen=True)
class Microbatch:
    """B samples under three views, and the T response tokens that the loss counts.

    The T tokens come in the same (sample, response offset) order for every view, so that row t of
    the student's, the partial view's and the full view's hidden states speak of the same token.
    """

    student: ViewBatch
    partial: ViewBatch | None
    """None where the objective does not read this view (ObjectiveConfig.views)."""
    full: ViewBatch | None
    """Likewise."""
    response_ids_T: Tensor
    """int64 [T]: the sampled token at each loss position."""
    sample_T: Tensor
    """int64 [T]: index of the sample within the microbatch."""
    offset_T: Tensor
    """int64 [T]: position in the response, counted from 0."""
    token_weights_T: Tensor
    """fp32 [T]: globally normalized; the weighted sum of per-token losses over all microbatches
    and data-parallel ranks is the loss."""
    is_end_T: Tensor
    """bool [T]: True at the EOS of a response that ended by itself."""
    engine_logprobs_T: Tensor | None = None
    """fp32 [T]: of the sampled tokens under the weights that sampled them, where they are wanted:
    for importance weights."""

    @property
    def num_samples(self) -> int:
        bounds = self.student.bounds
        return self.student.tokens_BS.size(0) if bounds is None else bounds.numel() - 1

    def to(self, device: torch.device) -> "Microbatch":
        """The same microbatch with every tensor on `device`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: part.to(device) for name, part in parts.items() if part is not None}
        return replace(self, **moved)


class TeacherOutput(NamedTuple):
    """The teacher's final hidden states at a microbatch's loss tokens; last stage only.

    None for a view that the microbatch does not have.
    """

    partial_hidden_TH: Tensor | None
    full_hidden_TH: Tensor | None

    def to(self, device: torch.device) -> "TeacherOutput":
        return TeacherOutput(*(h if h is None else h.to(device, non_blocking=True) for h in self))

    def divided_by(self, number: float) -> "TeacherOutput":
        return TeacherOutput(*(h if h is None else h / number for h in self))
