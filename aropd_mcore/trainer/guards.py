"""Steps that look wrong, judged before their update is applied.

Source: METHOD section 7. All that is looked at is the same on every rank, and so is the verdict.
"""

import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from aropd_mcore.config import GuardAction, GuardsConfig

_SMALLEST_DEVIATION = 1e-3
"""Of the mean: losses that hardly move at all make no spike of a small change."""
_TRUNCATION_STEPS = 8
"""Number of steps at the run's start, and of last steps, whose truncation is compared. Shorter than
a window, since responses can stop ending within 20 steps."""
_TRUNCATION_DEVIATIONS = 3.0
"""Standard errors that a rise must exceed: the shares of a few responses differ by chance."""


@dataclass(frozen=True)
class Verdict:
    """What is to become of a step."""

    apply: bool = True
    """Whether its update may be applied."""
    said: tuple[str, ...] = ()
    """What was seen, a line each."""
    stop: str | None = None
    """Why the run should end, if it should."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The step's, and the counts over the run."""


class Guards:
    """The run's memory of what its steps look like.

    A step whose update is left out does not enter the window, so that it does not hide the next.
    """

    def __init__(self, config: GuardsConfig, *, max_skipped_steps: int):
        self.config = config
        self.max_skipped_steps = max_skipped_steps
        self._window: dict[str, list[float]] = {"loss": [], "grad_norm": [], "length": []}
        self._counts = {
            "non_finite_steps": 0,
            "steps_without_loss_tokens": 0,
            "loss_spikes": 0,
            "length_collapses": 0,
            "truncation_rises": 0,
        }
        self._truncation = _Truncation()
        self._num_skipped_in_a_row = 0

    def judge(
        self,
        *,
        loss: float,
        grad_norm: float,
        length: float,
        has_loss: bool = True,
        num_cut: int = 0,
        num_sampled: int = 0,
    ) -> Verdict:
        """Judge a step between its backward and its update, and remember it.

        Args:
            loss, grad_norm: of the global batch.
            length: mean loss tokens of its responses.
            has_loss: whether any of them has a weight above 0. Without, loss and gradient are 0
                whatever the model does.
            num_cut, num_sampled: number of responses cut at the limit, of how many sampled ones;
                without sampled responses truncation is not judged.
        """
        config, actions, said = self.config, set[GuardAction](), []
        metrics = {}
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._counts["non_finite_steps"] += 1
            actions |= {config.non_finite, "skip"}
            said.append(f"no finite loss and gradient (loss {loss}, gradient norm {grad_norm})")
        elif not has_loss:
            self._counts["steps_without_loss_tokens"] += 1
            actions.add("skip")
            said.append(
                "there is no loss: each response ends within objective.skip_response_tokens, or "
                "its row's sample_weight is 0"
            )
        else:
            metrics = self._compared(loss, grad_norm, length)
            if config.loss_spike != "off" and self._spikes(metrics):
                self._counts["loss_spikes"] += 1
                actions.add(config.loss_spike)
                said.append(
                    f"a spike: loss {loss:.4g}, {metrics['loss_zscore']:.1f} standard deviations "
                    f"above the last {config.window} steps', gradient norm {grad_norm:.4g}, "
                    f"{metrics['grad_norm_zscore']:.1f} above (guards.loss_spike_zscore "
                    f"{config.loss_spike_zscore:g})"
                )
        if config.length_collapse != "off" and self._collapses(metrics, length):
            self._counts["length_collapses"] += 1
            actions.add(config.length_collapse)
            ratio = metrics.get("length_ratio")
            beside = "" if ratio is None else f", {ratio:.2f} x the last {config.window} steps'"
            said.append(
                f"responses collapse: {length:.1f} loss tokens on the average{beside} "
                f"(guards.length_collapse_ratio {config.length_collapse_ratio:g}, "
                f"length_collapse_floor {config.length_collapse_floor:g})"
            )
        truncation = self._truncation.with_step(num_cut, num_sampled)
        if num_sampled and truncation.rise is not None:
            metrics |= {"truncation_rise": truncation.rise}
        is_judged = num_sampled > 0 and config.truncation != "off"
        growth = self._growth(truncation) if is_judged else None
        if growth:
            self._counts["truncation_rises"] += 1
            actions.add(config.truncation)
            said.append(growth)
        apply = not actions & {"skip", "stop"}
        if apply:
            self._remember(loss=loss, grad_norm=grad_norm, length=length)
            reported = truncation.share if growth else truncation.reported
            self._truncation = replace(truncation, reported=reported)
        self._num_skipped_in_a_row = 0 if apply else self._num_skipped_in_a_row + 1
        counts = {f"num_{name}": count for name, count in self._counts.items()}
        stop = self._why_stop(actions, said, has_loss=has_loss)
        return Verdict(apply, tuple(said), stop, metrics | counts)

    def _compared(self, loss: float, grad_norm: float, length: float) -> dict[str, float]:
        """The step beside the window; nothing before that is full."""
        if len(self._window["loss"]) < self.config.window:
            return {}
        mean_length = statistics.fmean(self._window["length"])
        return {
            "loss_zscore": _zscore(loss, self._window["loss"]),
            "grad_norm_zscore": _zscore(grad_norm, self._window["grad_norm"]),
            "length_ratio": length / mean_length if mean_length else 1.0,
        }

    def _spikes(self, metrics: dict[str, float]) -> bool:
        scores = [metrics[name] for name in ("loss_zscore", "grad_norm_zscore") if name in metrics]
        return any(score > self.config.loss_spike_zscore for score in scores)

    def _collapses(self, metrics: dict[str, float], length: float) -> bool:
        is_short = metrics.get("length_ratio", 1.0) < self.config.length_collapse_ratio
        return is_short or length < self.config.length_collapse_floor

    def _growth(self, truncation: "_Truncation") -> str | None:
        """Describe the growth of truncation, if there is any that has not been reported.

        A share that stays at a reported level is not reported again: it has to rise further.
        """
        config, share, rise = self.config, truncation.share, truncation.rise
        found = f"{share:.0%} of the last responses were cut at rollout.max_response_tokens"
        is_above = share - truncation.reported > config.truncation_rise
        is_real = rise is not None and rise > _TRUNCATION_DEVIATIONS * truncation.error
        if rise is not None and rise > config.truncation_rise and is_real and is_above:
            found += f", {share - rise:.0%} at the run's start"
            setting = f"guards.truncation_rise {config.truncation_rise:g}"
        elif share > config.truncation_ceiling >= truncation.reported:
            setting = f"guards.truncation_ceiling {config.truncation_ceiling:g}"
        else:
            return None
        return (
            f"responses stop ending: {found} ({setting}). The student unlearns to end a response, "
            "or the limit is too low: compare eos_prob_student with eos_prob_target in the steps "
            "of metrics.jsonl that have them, and see Troubleshooting (docs/troubleshooting.md)"
        )

    def _remember(self, **values: float) -> None:
        for name, value in values.items():
            self._window[name] = [*self._window[name], value][-self.config.window :]

    def _why_stop(
        self, actions: set[GuardAction], said: list[str], *, has_loss: bool
    ) -> str | None:
        if "stop" in actions:
            return "; ".join(said)
        if self._num_skipped_in_a_row >= self.max_skipped_steps:
            remedy = (
                "A lower optimizer.lr or a residual_clip often helps; the" if has_loss else "The"
            )
            return (
                f"{self._num_skipped_in_a_row} steps in a row were left out, the last for "
                f"{'; '.join(said)}. {remedy} limit is training.max_skipped_steps"
            )
        return None

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "window": {name: list(values) for name, values in self._window.items()},
            "counts": dict(self._counts),
            "num_skipped_in_a_row": self._num_skipped_in_a_row,
            "truncation": asdict(self._truncation),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over `state`, as a checkpoint of any version has it.

        Missing counts are 0. Without a record of truncation its start is the next step. A window
        that the settings have made shorter forgets its start.
        """
        for name, values in state["window"].items():
            self._window[name] = list(values)[-self.config.window :]
        self._counts |= state["counts"]
        self._num_skipped_in_a_row = state["num_skipped_in_a_row"]
        self._truncation = _Truncation(**state.get("truncation", {}))


@dataclass(frozen=True)
class _Truncation:
    """Record of cut responses, in steps of [number cut, number sampled]."""

    first: list[list[int]] = field(default_factory=list)
    """The run's first _TRUNCATION_STEPS steps. A window that slides would follow a slow drift."""
    last: list[list[int]] = field(default_factory=list)
    """The last _TRUNCATION_STEPS steps."""
    reported: float = 0.0
    """Share at the last report."""

    def with_step(self, num_cut: int, num_sampled: int) -> "_Truncation":
        """The record with one more step; the same where the step has sampled nothing."""
        if not num_sampled:
            return self
        step = [num_cut, num_sampled]
        first = [*self.first, step][:_TRUNCATION_STEPS]
        return replace(self, first=first, last=[*self.last, step][-_TRUNCATION_STEPS:])

    @property
    def share(self) -> float:
        """Share of responses cut over the last steps."""
        return _share(self.last)

    @property
    def rise(self) -> float | None:
        """Rise of `share` over the first steps; None before there are so many."""
        is_full = len(self.first) == _TRUNCATION_STEPS
        return self.share - _share(self.first) if is_full else None

    @property
    def error(self) -> float:
        """Standard error of the rise of a share that stays.

        sqrt(p (1 - p) (1 / n + 1 / m)),  p the share over both, n and m their responses
        """
        p = _share([*self.first, *self.last])
        n, m = (sum(num for _, num in steps) for steps in (self.first, self.last))
        return math.sqrt(p * (1 - p) * (1 / n + 1 / m))


def _share(steps: list[list[int]]) -> float:
    return sum(cut for cut, _ in steps) / sum(num for _, num in steps)


def _zscore(value: float, window: list[float]) -> float:
    mean = statistics.fmean(window)
    deviation = statistics.pstdev(window, mean)
    smallest = max(_SMALLEST_DEVIATION * abs(mean), 1e-12)
    return (value - mean) / max(deviation, smallest)
