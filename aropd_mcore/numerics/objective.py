"""What is minimized: the settings of the target and of the divergence, checked."""

from dataclasses import dataclass
from typing import get_args

from aropd_mcore.config import Divergence, PrivilegedView, target_view
from aropd_mcore.numerics.residual import check_residual


@dataclass(frozen=True)
class Objective:
    """The arguments of the same names of `vocab_parallel_anchored_residual_kl`."""

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
        """The view that is the target by itself; None: it takes both."""
        return target_view(self.residual_scale, self.residual_clip)

    @property
    def student_share(self) -> float:
        """1 - beta: of the divergence from the student's side; 1 for the reverse KL."""
        return 1 - self.jsd_weight if self.divergence == "jsd" else 1.0
