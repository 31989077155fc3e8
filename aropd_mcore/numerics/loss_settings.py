"""Validated settings of the loss."""

from dataclasses import dataclass
from typing import get_args

from aropd_mcore.config import Divergence, PrivilegedView, target_view
from aropd_mcore.numerics.residual import check_residual


@dataclass(frozen=True)
class LossSettings:
    """Settings of target and divergence: the arguments of `vocab_parallel_anchored_residual_kl`.

    Raises:
        ValueError: a setting is out of range.
    """

    residual_scale: float
    residual_clip: float | None
    divergence: Divergence
    jsd_weight: float

    def __post_init__(self) -> None:
        check_residual(self.residual_scale, self.residual_clip)
        if self.divergence not in get_args(Divergence):
            known = ", ".join(get_args(Divergence))
            raise ValueError(f"divergence {self.divergence!r}: expected one of {known}")
        if not 0 < self.jsd_weight < 1:
            raise ValueError(f"jsd_weight {self.jsd_weight}: expected 0 < jsd_weight < 1")

    @property
    def target_view(self) -> PrivilegedView | None:
        """View whose distribution is the target; None if the target needs both views."""
        return target_view(self.residual_scale, self.residual_clip)

    @property
    def student_share(self) -> float:
        """Weight of KL(s || m) in the loss: 1 - beta for `jsd`, 1 for the reverse KL."""
        return 1 - self.jsd_weight if self.divergence == "jsd" else 1.0
