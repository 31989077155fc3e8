"""Verdicts of the guards on given numbers. test_loop.py tests that training obeys them."""

import json
import math
import random

import pytest

from aropd_mcore.config import GuardsConfig
from aropd_mcore.trainer.guards import Guards, Verdict

CALM = [(1.0 + 0.01 * (-1) ** i, 2.0 + 0.1 * (-1) ** i, 100.0) for i in range(4)]
"""Loss, gradient norm and length of a full window: deviations 0.01 and 0.1."""


def build_guards(**settings) -> Guards:
    return Guards(GuardsConfig.model_validate({"window": 4, **settings}), max_skipped_steps=3)


def judge(guards: Guards, *steps: tuple[float, float, float]) -> list[Verdict]:
    return [
        guards.judge(loss=loss, grad_norm=grad_norm, length=length)
        for loss, grad_norm, length in steps
    ]


@pytest.mark.parametrize(
    ("name", "step", "text", "count"),
    [
        ("loss_spike", (1.07, 2.0, 100), "loss 1.07 is 7.0 standard deviations", "num_loss_spikes"),
        ("loss_spike", (1.0, 2.7, 100), "gradient norm 2.7 is 7.0 above", "num_loss_spikes"),
        ("length_collapse", (1.0, 2.0, 20), "20.0 loss tokens", "num_length_collapses"),
    ],
)
def test_guard_with_each_action_warns_skips_or_stops(name, step, text, count):
    for action in ("off", "warn", "skip", "stop"):
        *calm, verdict = judge(build_guards(**{name: action}), *CALM, step)
        assert all(v.apply and not v.findings and v.metrics[count] == 0 for v in calm)
        assert verdict.apply == (action in ("off", "warn")), action
        assert any(text in line for line in verdict.findings) == (action != "off")
        assert (verdict.stop is not None and text in verdict.stop) == (action == "stop")
        assert verdict.metrics[count] == (action != "off")


@pytest.mark.parametrize("step", [(1.05, 2.5, 26), (0.5, 0.1, 1000)])
def test_guards_on_small_rises_and_large_improvements_apply_the_update(step):
    """Lower losses and longer responses are no problem."""
    [*_, verdict] = judge(build_guards(loss_spike="stop", length_collapse="stop"), *CALM, step)
    assert verdict.apply and not verdict.findings


def test_guards_before_the_window_is_full_apply_only_the_length_floor():
    [*_, verdict] = judge(build_guards(loss_spike="stop"), *CALM[:3], (50.0, 50.0, 1))
    assert verdict.apply and "loss_zscore" not in verdict.metrics
    [verdict] = judge(
        build_guards(length_collapse="stop", length_collapse_floor=5), (1.0, 1.0, 4.9)
    )
    assert verdict.stop and "4.9 loss tokens" in verdict.stop, "the floor holds from the start"


def test_loss_spike_after_constant_losses_ignores_tiny_changes():
    still = [(1.0, 1.0, 10.0)] * 4
    assert judge(build_guards(loss_spike="stop"), *still, (1.005, 1.005, 10.0))[-1].apply
    assert not judge(build_guards(loss_spike="stop"), *still, (1.007, 1.0, 10.0))[-1].apply


def test_skipped_steps_stay_out_of_the_window_and_too_many_stop_the_run():
    spike = (9.0, 2.0, 100.0)
    verdicts = judge(build_guards(loss_spike="skip"), *CALM, spike, spike, CALM[0], *[spike] * 3)
    assert [v.apply for v in verdicts[4:]] == [False, False, True, False, False, False]
    assert [v.stop is None for v in verdicts[4:]] == [True] * 5 + [False]
    assert "3 updates in a row were skipped" in str(verdicts[-1].stop)
    warned = judge(build_guards(loss_spike="warn"), *CALM, *[spike] * 5)
    assert [bool(v.findings) for v in warned[4:]] == [True] + [False] * 4, (
        "a new level is one spike"
    )


@pytest.mark.parametrize("step", [(math.nan, 1.0, 100.0), (1.0, math.inf, 100.0)])
def test_non_finite_step_is_never_applied(step):
    [verdict] = judge(build_guards(), step)
    assert not verdict.apply and verdict.stop is None
    assert verdict.metrics["num_non_finite_steps"] == 1
    [verdict] = judge(build_guards(non_finite="stop"), step)
    assert not verdict.apply and "non-finite loss or gradient" in str(verdict.stop)


def test_steps_without_loss_are_skipped_and_counted_and_stop_the_run():
    guards = build_guards(loss_spike="stop")
    verdicts = [
        guards.judge(loss=0.0, grad_norm=0.0, length=length, has_loss=False)
        for length in (0.0, 5.0, 0.0)  # without loss tokens, or with tokens of weight 0
    ]
    assert not any(verdict.apply for verdict in verdicts)
    assert [v.metrics["num_steps_without_loss_tokens"] for v in verdicts] == [1, 2, 3]
    assert all("objective.skip_response_tokens" in str(verdict.findings) for verdict in verdicts)
    assert [verdict.stop is None for verdict in verdicts] == [True, True, False]
    assert "3 updates in a row were skipped" in str(verdicts[-1].stop)
    assert "optimizer.lr" not in str(verdicts[-1].stop), "a lower learning rate would not help"
    assert judge(guards, *CALM)[-1].apply


DRIFT = [2, 3, 3, 3, 4, 3, 5, 4, 5, 6, 6, 5, 7, 7, 8, 7, 9, 9, 10, 9, 11, 11, 12, 12]
"""Number of cut responses of 16 in each of 24 steps: 17 % at first, 75 % at last."""


def judge_cut(guards: Guards, num_cut: list[int], num_sampled: int = 16) -> list[Verdict]:
    return [
        guards.judge(loss=1.0, grad_norm=1.0, length=50.0, num_cut=n, num_sampled=num_sampled)
        for n in num_cut
    ]


def test_truncation_that_rises_slowly_warns_well_before_the_end():
    """The default window of 32 steps is longer than this run."""
    guards = Guards(GuardsConfig(), max_skipped_steps=3)
    verdicts = judge_cut(guards, DRIFT)
    warned = [step for step, verdict in enumerate(verdicts) if verdict.findings]
    assert 12 <= warned[0] <= 17 and len(warned) <= 2, "a level is reported once"
    (line,) = verdicts[warned[0]].findings
    assert "responses stop ending" in line and "(guards.truncation_rise 0.2)" in line
    share = sum(DRIFT[warned[0] - 7 : warned[0] + 1]) / 128
    assert f"{share:.0%} of the last responses were cut" in line
    assert f"{sum(DRIFT[:8]) / 128:.0%} at the start of the run" in line
    assert "eos_prob_student" in line and "docs/troubleshooting.md" in line
    assert all(verdict.apply for verdict in verdicts)
    last = verdicts[-1].metrics
    assert last["num_truncation_rises"] == len(warned)
    assert last["truncation_rise"] == pytest.approx((sum(DRIFT[-8:]) - sum(DRIFT[:8])) / 128)


@pytest.mark.parametrize(("num_sampled", "mean"), [(16, 5), (4, 1.5), (256, 200)])
def test_truncation_that_only_fluctuates_does_not_warn(num_sampled, mean):
    """With 4 responses per step, shares differ by 0.2 and more by chance."""
    draws, cut = random.Random(5), []
    for _ in range(200):
        cut.append(sum(draws.random() < mean / num_sampled for _ in range(num_sampled)))
    assert max(cut) - min(cut) > 0.1 * num_sampled
    guards = Guards(GuardsConfig(truncation="stop"), max_skipped_steps=3)
    assert not any(verdict.findings for verdict in judge_cut(guards, cut, num_sampled))


def test_truncation_above_the_ceiling_warns_once_from_the_first_step_on():
    verdicts = judge_cut(Guards(GuardsConfig(), max_skipped_steps=3), [15] * 20)
    assert [bool(verdict.findings) for verdict in verdicts] == [True] + [False] * 19
    assert "(guards.truncation_ceiling 0.9)" in verdicts[0].findings[0]
    no_ceiling = GuardsConfig(truncation_ceiling=1.0)
    assert not judge_cut(Guards(no_ceiling, max_skipped_steps=3), [16])[0].findings


def test_truncation_with_each_action_warns_skips_or_stops():
    steps = [4] * 8 + [14] * 6
    for action in ("off", "warn", "skip", "stop"):
        guards = Guards(GuardsConfig(truncation=action), max_skipped_steps=2)
        verdicts = judge_cut(guards, steps)
        first = next((step for step, verdict in enumerate(verdicts) if verdict.findings), None)
        assert (first is None) == (action == "off")
        if first is not None:
            verdict, following = verdicts[first : first + 2]
            assert verdict.apply == (action == "warn")
            assert (verdict.stop is not None) == (action == "stop")
            # A skipped step does not hide the next one.
            assert bool(following.findings) == (action != "warn")
            assert (following.stop is not None) == (action in ("skip", "stop"))


def test_truncation_of_reference_responses_is_not_judged():
    verdicts = judge_cut(build_guards(truncation="stop"), [16] * 20, num_sampled=0)
    assert not any(verdict.findings or "truncation_rise" in verdict.metrics for verdict in verdicts)


def test_truncation_after_a_restart_is_compared_with_the_start_of_the_run():
    uninterrupted = Guards(GuardsConfig(), max_skipped_steps=3)
    expected = judge_cut(uninterrupted, DRIFT)
    for cut in (3, 8, 12, 20):
        first, second = (Guards(GuardsConfig(), max_skipped_steps=3) for _ in range(2))
        verdicts = judge_cut(first, DRIFT[:cut])
        second.load_state(json.loads(json.dumps(first.state())))
        assert verdicts + judge_cut(second, DRIFT[cut:]) == expected
        assert second.state() == uninterrupted.state()


def test_state_of_an_older_checkpoint_without_counts_and_truncation_is_loaded():
    old = build_guards().state()
    del old["counts"]["steps_without_loss_tokens"], old["counts"]["truncation_rises"]
    del old["truncation"]
    guards = build_guards()
    guards.load_state(old)
    [verdict] = judge_cut(guards, [3])
    assert verdict.metrics["num_steps_without_loss_tokens"] == 0
    assert verdict.metrics["num_truncation_rises"] == 0


def test_state_after_a_json_round_trip_gives_the_same_verdicts():
    steps = [*CALM, (9.0, 2.0, 100.0), (math.nan, 1.0, 100.0), *CALM, (1.2, 2.0, 3.0)]
    uninterrupted = build_guards(loss_spike="skip")
    expected = judge(uninterrupted, *steps)
    for cut in range(len(steps)):
        first, second = build_guards(loss_spike="skip"), build_guards(loss_spike="skip")
        verdicts = judge(first, *steps[:cut])
        second.load_state(json.loads(json.dumps(first.state())))
        assert verdicts + judge(second, *steps[cut:]) == expected
        assert second.state() == uninterrupted.state()
