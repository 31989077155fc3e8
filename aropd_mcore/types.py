"""Frozen records that the packages hand to each other.

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
    """Source of the row, as `file:line`, for error messages."""
    teacher: str = ""
    """Name of the teacher that scores the row's responses. Empty unless the run has `teachers`."""
    domain: str = ""
    """Domain for metrics by domain. Empty: none."""


@dataclass(frozen=True)
class Views:
    """The three prompts of a row, as token ids. The response is appended to each of them."""

    row: Row
    student_ids: tuple[int, ...]
    partial_ids: tuple[int, ...]
    full_ids: tuple[int, ...]
    num_cut_tokens: int = 0
    """Number of tokens cut to fit views.max_prompt_tokens, summed over the three views."""


@dataclass(frozen=True)
class Rollout:
    """One sampled response."""

    response_ids: tuple[int, ...]
    """Sampled token ids, including the final EOS if there is one. The ids are never decoded and
    encoded again."""
    logprobs: tuple[float, ...]
    """Natural log-prob of each sampled token under the sampling weights, before temperature,
    top-k and top-p."""
    finished: bool
    """True if the response ended by EOS, False if the length limit cut it off."""
    weight_version: int
    """Version of the sampling weights: the number of training steps done at their last update."""


@dataclass(frozen=True)
class Sample:
    """The parts of a rollout that training uses: three prompts, the response and its weight."""

    student_ids: tuple[int, ...]
    partial_ids: tuple[int, ...]
    full_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    token_weight: float
    """Loss weight of each loss token of the sample, normalized over the global batch."""
    logprobs: tuple[float, ...] = ()
    """Log-probs of the response tokens under the sampling weights. Empty if they are not used."""
    finished: bool = False
    """Whether the response ended by EOS, which is then its last token."""
    loss_range: range | None = None
    """Positions of the loss tokens in the response. None: all."""
    num_thinking_tokens: int = 0
    """Length of the thinking span (data.spans), with which the response begins."""
    index: int = 0
    """Index in the global batch."""
    teacher: str = ""
    """Name of the teacher (Row.teacher)."""
    groups: tuple[int, ...] = ()
    """Indices of the sample's groups, by which metrics are reported (numerics.group_metrics)."""


class ViewBatch(NamedTuple):
    """One of a microbatch's three views: prompts and responses, padded on the right or packed."""

    tokens_BS: Tensor
    """int64 [B, S]; [1, S] if the samples are packed into one sequence."""
    hidden_index_T: Tensor
    """int64 [T]: index into the flattened [S * B] hidden states (Megatron's [S, B, H] order) of
    the position that predicts each loss token."""
    bounds: Tensor | None = None
    """int32 [B + 1]: start of each packed sample and end of the last one, as positions in the
    whole sequence of all context-parallel ranks. None if samples are padded."""
    longest: int = 0
    """Number of tokens of the longest packed sample, kept on the host to avoid a device sync."""
    padding_BS: Tensor | None = None
    """bool [B, S]: True for padding tokens. Set only if routers have losses (mcore.router)."""

    def to(self, device: torch.device) -> "ViewBatch":
        moved = {
            name: part.to(device, non_blocking=True)
            for name, part in self._asdict().items()
            if isinstance(part, Tensor)
        }
        return self._replace(**moved)


@dataclass(frozen=True)
class Microbatch:
    """B samples of one teacher under three views, and the T response tokens that the loss counts.

    The T tokens have the same (sample, response offset) order in every view. Row t of the student,
    partial-view and full-view hidden states therefore belongs to the same token.
    """

    student: ViewBatch
    partial: ViewBatch | None
    """Partial view. None if the objective does not read it (ObjectiveConfig.views)."""
    full: ViewBatch | None
    """Full view. None if the objective does not read it."""
    response_ids_T: Tensor
    """int64 [T]: the sampled token at each loss position."""
    sample_T: Tensor
    """int64 [T]: index of the sample within the microbatch."""
    offset_T: Tensor
    """int64 [T]: position in the response, counted from 0."""
    token_weights_T: Tensor
    """fp32 [T]: loss weights, normalized over the global batch. The loss is the weighted sum of
    per-token losses over all microbatches and data-parallel ranks."""
    is_thinking_T: Tensor
    """bool [T]: True for the tokens of the thinking span."""
    is_end_T: Tensor
    """bool [T]: True at the EOS of a response that ended by EOS."""
    batch_index_B: Tensor
    """int64 [B]: index of each sample in the global batch."""
    engine_logprobs_T: Tensor | None = None
    """fp32 [T]: log-probs of the tokens under the sampling weights, for importance weights. None
    if they are not used."""
    teacher: str = ""
    """Name of the teacher of all samples (Row.teacher)."""
    is_in_group_BG: Tensor | None = None
    """bool [B, G]: whether each sample is in each of G groups (Sample.groups). None without
    groups."""

    @property
    def num_samples(self) -> int:
        bounds = self.student.bounds
        return self.student.tokens_BS.size(0) if bounds is None else bounds.numel() - 1

    def to(self, device: torch.device) -> "Microbatch":
        """Return the same microbatch with every tensor on `device`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {n: p.to(device) for n, p in parts.items() if isinstance(p, Tensor | ViewBatch)}
        return replace(self, **moved)


class TeacherOutput(NamedTuple):
    """The teacher's final hidden states at a microbatch's loss tokens. Last pipeline stage only.

    The states of a view that the microbatch does not have are None.
    """

    partial_hidden_TH: Tensor | None
    full_hidden_TH: Tensor | None

    def to(self, device: torch.device) -> "TeacherOutput":
        return TeacherOutput(*(h if h is None else h.to(device, non_blocking=True) for h in self))

    def divided_by(self, number: float) -> "TeacherOutput":
        return TeacherOutput(*(h if h is None else h / number for h in self))
