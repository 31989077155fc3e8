"""Tokens from logits: the distribution that the settings ask for, and nothing outside it."""

import math

import pytest
import torch
from torch import Tensor

from aropd_mcore.config import SamplingConfig
from aropd_mcore.rollout.engine import rollout_seed
from aropd_mcore.rollout.sampling import sample, uniform_numbers

NUM_DRAWS = 100_000
LOGITS_V = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 1.2, 1.2, 0.1, -2.5, -torch.inf])


def draw(sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs of LOGITS_V at evenly spread u: counts are probabilities, exactly."""
    uniforms = (torch.arange(NUM_DRAWS, dtype=torch.float64) + 0.5) / NUM_DRAWS
    return sample(LOGITS_V.expand(NUM_DRAWS, -1), uniforms, sampling)


def expected_probs(temperature: float, top_k: int, top_p: float) -> list[float]:
    """The definition, token by token, in Python floats."""
    weights = [math.exp(logit / temperature) for logit in LOGITS_V.tolist()]
    order = sorted(range(len(weights)), key=lambda v: -weights[v])[: top_k or None]
    total, held, kept = sum(weights[v] for v in order), 0.0, []
    for v in order:
        if held / total < top_p:
            kept.append(v)
            held += weights[v]
    return [weights[v] / held if v in kept else 0.0 for v in range(len(weights))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (3.0, 0, 1.0),
        (1.0, 1, 1.0),
        (1.0, 4, 1.0),
        (1.0, 99, 1.0),
        (1.0, 0, 0.8),
        (1.0, 0, 1e-9),
        (2.0, 5, 0.7),
    ],
)
def test_sample_frequencies_equal_the_probabilities(temperature, top_k, top_p):
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, logprobs = draw(sampling)
    frequencies = torch.bincount(tokens, minlength=LOGITS_V.numel()) / NUM_DRAWS
    expected = torch.tensor(expected_probs(temperature, top_k, top_p))
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=2 / NUM_DRAWS)
    assert not frequencies[expected == 0].any()
    # With all settings, the log-prob is that of the unmodified distribution.
    torch.testing.assert_close(logprobs, LOGITS_V.log_softmax(-1)[tokens])


def test_random_streams_sample_the_distribution_too():
    seeds = [rollout_seed(7, position, 0) for position in range(2_000)]
    uniforms = uniform_numbers(seeds, 10).flatten()
    tokens, _ = sample(LOGITS_V.expand(len(uniforms), -1), uniforms, SamplingConfig())
    frequencies = torch.bincount(tokens, minlength=LOGITS_V.numel()) / len(uniforms)
    # Four standard deviations of a frequency near 1/2.
    torch.testing.assert_close(frequencies, LOGITS_V.softmax(-1), rtol=0, atol=0.014)


def test_ends_of_the_unit_interval_give_the_ends_of_the_support():
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for temperature in (1.0, 1e-6):
        support = [0, 7] if temperature == 1 else [2, 2]
        tokens, _ = sample(
            LOGITS_V.expand(2, -1), uniforms, SamplingConfig(temperature=temperature)
        )
        assert tokens.tolist() == support
    # u = 0 must not choose a first column of probability 0.
    assert sample(LOGITS_V[None, 3:], uniforms[:1], SamplingConfig())[0].item() == 1


def test_greedy_is_the_argmax_and_rows_do_not_mix():
    logits = torch.randn(50, 301)
    greedy, logprobs = sample(logits, torch.zeros(50).double(), SamplingConfig(temperature=0))
    assert torch.equal(greedy, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))

    uniforms, settings = torch.rand(50).double(), SamplingConfig(top_k=40, top_p=0.9)
    together, _ = sample(logits, uniforms, settings)
    apart = [sample(logits[b : b + 1], uniforms[b : b + 1], settings)[0] for b in range(50)]
    assert torch.equal(together, torch.cat(apart))


def test_logits_that_are_not_finite_show_in_the_logprob():
    logits = torch.tensor([[0.0, torch.nan], [0.0, 1.0]])
    for settings in (SamplingConfig(), SamplingConfig(temperature=0), SamplingConfig(top_p=0.5)):
        tokens, logprobs = sample(logits, torch.tensor([0.5, 0.5]).double(), settings)
        assert tokens.max() < 2
        assert logprobs.isnan().tolist() == [True, False]


def test_streams_depend_only_on_their_seed():
    seeds = [3, 2**62 + 3, 3 + 2**32]  # all are 3 modulo 2^32
    short, long = uniform_numbers(seeds, 5), uniform_numbers(seeds[::-1], 50)
    assert torch.equal(short, long.flip(0)[:, :5])
    assert len(set(short[:, 0].tolist())) == 3
    assert long.min() >= 0 and long.max() < 1


def test_rollout_seeds_are_fixed_distinct_and_in_range():
    assert rollout_seed(1234, 0, 0) == 0x18965ED0C903B73B
    seeds = {rollout_seed(s, p, n) for s in range(12) for p in range(120) for n in range(12)}
    assert len(seeds) == 12 * 120 * 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
