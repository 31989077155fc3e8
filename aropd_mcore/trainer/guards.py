"""Guards: checks of a step's loss, gradient norm and responses before its update is applied.

Source: METHOD section 7. All inputs are bitwise the same on every rank, and so is the verdict.
"""

import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from aropd_mcore.config import GuardAction, GuardsConfig

_SMALLEST_DEVIATION = 1e-3
"""Lower bound of the standard deviation, relative to the mean. Without it, a small change of an
almost constant loss would be a spike."""
_TRUNCATION_STEPS = 8
"""Number of first and of most recent steps whose truncation is compared. Less than a window, since
responses can stop ending within 20 steps."""
_TRUNCATION_DEVIATIONS = 3.0
"""Number of standard errors that a rise must exceed. Shares of few responses differ by chance."""


@dataclass(frozen=True)
class Verdict:
    """Decision of the guards about one step."""

    apply: bool = True
    """Whether its update may be applied."""
    findings: tuple[str, ...] = ()
    """Descriptions of the problems that were found, one line each."""
    stop: str | None = None
    """Reason to stop the run. None: do not stop."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of this step, and counts since the start of the run."""


class Guards:
    """Statistics of recent steps, and the judgement of new steps by them.

    Steps whose update is skipped do not enter the window, so one spike does not hide the next.
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
        """Judge a step between its backward and its update, and record it.

        Args:
            loss, grad_norm: loss and gradient norm of the global batch.
            length: mean number of loss tokens per response.
            has_loss: whether any loss token has a weight above 0. If not, loss and gradient are 0
                for every model.
            num_cut: number of sampled responses that were cut at the limit.
            num_sampled: number of sampled responses. 0: truncation is not judged.
        """
        config, actions, findings = self.config, set[GuardAction](), []
        metrics = {}
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._counts["non_finite_steps"] += 1
            actions |= {config.non_finite, "skip"}
            findings.append(f"non-finite loss or gradient (loss {loss}, gradient norm {grad_norm})")
        elif not has_loss:
            self._counts["steps_without_loss_tokens"] += 1
            actions.add("skip")
            findings.append(
                "no loss tokens: each response ends within objective.skip_response_tokens, has no "
                "objective.loss_span, or its row's sample_weight is 0"
            )
        else:
            metrics = self._compare_with_window(loss, grad_norm, length)
            if config.loss_spike != "off" and self._spikes(metrics):
                self._counts["loss_spikes"] += 1
                actions.add(config.loss_spike)
                findings.append(
                    f"loss spike: loss {loss:.4g} is {metrics['loss_zscore']:.1f} standard "
                    f"deviations above the mean of the last {config.window} steps, gradient norm "
                    f"{grad_norm:.4g} is {metrics['grad_norm_zscore']:.1f} above "
                    f"(guards.loss_spike_zscore {config.loss_spike_zscore:g})"
                )
        if config.length_collapse != "off" and self._collapses(metrics, length):
            self._counts["length_collapses"] += 1
            actions.add(config.length_collapse)
            ratio = metrics.get("length_ratio")
            relative = (
                f", {ratio:.2f} times the mean of the last {config.window} steps"
                if ratio is not None
                else ""
            )
            findings.append(
                f"responses collapse: {length:.1f} loss tokens on average{relative} "
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
            findings.append(growth)
        apply = not actions & {"skip", "stop"}
        if apply:
            self._remember(loss=loss, grad_norm=grad_norm, length=length)
            reported = truncation.share if growth else truncation.reported
            self._truncation = replace(truncation, reported=reported)
        self._num_skipped_in_a_row = 0 if apply else self._num_skipped_in_a_row + 1
        counts = {f"num_{name}": count for name, count in self._counts.items()}
        stop = self._reason_to_stop(actions, findings, has_loss=has_loss)
        return Verdict(apply, tuple(findings), stop, metrics | counts)

    def _compare_with_window(
        self, loss: float, grad_norm: float, length: float
    ) -> dict[str, float]:
        """Compare the step with the window. Empty until the window is full."""
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
        """Describe a growth of truncation that has not been reported. None: there is none.

        A share that stays at the reported level is not reported again until it rises further.
        """
        config, share, rise = self.config, truncation.share, truncation.rise
        text = f"{share:.0%} of the last responses were cut at rollout.max_response_tokens"
        is_above = share - truncation.reported > config.truncation_rise
        is_real = rise is not None and rise > _TRUNCATION_DEVIATIONS * truncation.error
        if rise is not None and rise > config.truncation_rise and is_real and is_above:
            text += f", {share - rise:.0%} at the start of the run"
            setting = f"guards.truncation_rise {config.truncation_rise:g}"
        elif share > config.truncation_ceiling >= truncation.reported:
            setting = f"guards.truncation_ceiling {config.truncation_ceiling:g}"
        else:
            return None
        return (
            f"responses stop ending: {text} ({setting}). Either the student unlearns to end a "
            "response, or the limit is too low: compare eos_prob_student with eos_prob_target in "
            "the steps of metrics.jsonl that have them, and see docs/troubleshooting.md"
        )

    def _remember(self, **values: float) -> None:
        for name, value in values.items():
            self._window[name] = [*self._window[name], value][-self.config.window :]

    def _reason_to_stop(
        self, actions: set[GuardAction], findings: list[str], *, has_loss: bool
    ) -> str | None:
        if "stop" in actions:
            return "; ".join(findings)
        if self._num_skipped_in_a_row >= self.max_skipped_steps:
            remedy = "A lower optimizer.lr or a residual_clip often helps. " if has_loss else ""
            return (
                f"{self._num_skipped_in_a_row} updates in a row were skipped, the last because of: "
                f"{'; '.join(findings)}. {remedy}The limit is training.max_skipped_steps"
            )
        return None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain values."""
        return {
            "window": {name: list(values) for name, values in self._window.items()},
            "counts": dict(self._counts),
            "num_skipped_in_a_row": self._num_skipped_in_a_row,
            "truncation": asdict(self._truncation),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load a state from a checkpoint of any version.

        Missing counts are 0. A missing record of truncation starts at the next step. If
        guards.window is smaller than before, the oldest steps are dropped.
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
    """First _TRUNCATION_STEPS steps of the run. A sliding window would follow a slow drift."""
    last: list[list[int]] = field(default_factory=list)
    """Last _TRUNCATION_STEPS steps."""
    reported: float = 0.0
    """Share at the last report."""

    def with_step(self, num_cut: int, num_sampled: int) -> "_Truncation":
        """Return the record with one more step. A step without sampled responses is ignored."""
        if not num_sampled:
            return self
        step = [num_cut, num_sampled]
        first = [*self.first, step][:_TRUNCATION_STEPS]
        return replace(self, first=first, last=[*self.last, step][-_TRUNCATION_STEPS:])

    @property
    def share(self) -> float:
        """Share of the responses of the last steps that were cut."""
        return _share(self.last)

    @property
    def rise(self) -> float | None:
        """Difference between `share` and the share of the first steps. None in the first steps."""
        is_full = len(self.first) == _TRUNCATION_STEPS
        return self.share - _share(self.first) if is_full else None

    @property
    def error(self) -> float:
        """Standard error of `rise` if the share is constant.

        sqrt(p (1 - p) (1 / n + 1 / m)), with n and m responses in the first and last steps, and p
        the share over both.
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
