"""The native engine against transformers, and against itself on every layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from aropd_mcore.config import SamplingConfig
from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.mcore.decode import Decoder
from aropd_mcore.mcore.model import HiddenStateGPT, build_model
from aropd_mcore.mcore.weights import load_hf_weights
from aropd_mcore.rollout.engine import RolloutEngine, rollout_seed
from aropd_mcore.rollout.native import NativeEngine
from aropd_mcore.rollout.sampling import sample as draw
from aropd_mcore.rollout.sampling import uniform_numbers
from aropd_mcore.types import Rollout
from tests.support.ranks import run_ranks
from tests.support.rollouts import sample
from tests.support.tiny_models import save_tiny_model

FAMILIES = ("qwen2", "qwen3", "llama31", "qwen2_yarn", "gpt_oss", "deepseek_v3")
LENGTHS = (7, 1, 19, 4, 12)
PROMPTS = [[(31 * i + 7 * j * j) % 509 for j in range(n)] for i, n in enumerate(LENGTHS)]
SEEDS = [rollout_seed(1, position, 0) for position in range(len(PROMPTS))]
EOS = (2, 77)
LAYOUTS = {  # by number of ranks
    2: [
        {"tensor": 2},
        {"pipeline": 2},
        {"pipeline": 2, "layers_in_first_stage": 3},
        {"pipeline": 2, "virtual_pipeline": 2},
    ],
    4: [{"tensor": 2, "pipeline": 2}, {"pipeline": 4, "pipeline_layout": "E|t*3|t|L"}],
}
GREEDY = SamplingConfig(temperature=0, max_response_tokens=24)
RANDOM = SamplingConfig(temperature=1.3, top_p=0.98, max_response_tokens=24)


@dataclass(frozen=True)
class Job:
    """A batch for an engine."""

    sampling: SamplingConfig
    rows: tuple[int, ...] = tuple(range(len(PROMPTS)))
    batch_size: int = 8
    kv_cache_tokens: int | None = None
    eos: tuple[int, ...] = EOS


# The first two are the reference; the others must repeat rows of the second.
JOBS = (
    Job(GREEDY),
    Job(RANDOM),
    Job(RANDOM, batch_size=2),
    Job(RANDOM, rows=(4, 2, 0, 1, 3), batch_size=3),
    Job(RANDOM, rows=(3,)),
    Job(RANDOM, kv_cache_tokens=2 * (19 + 24) + 42),  # two rows of the longest, and not three
)


Layout = dict[str, Any]
"""Arguments of runtime.start."""


def load(folder: Path, layout: Layout) -> tuple[HiddenStateGPT, mcore_runtime.Runtime]:
    runtime = mcore_runtime.start(**layout)
    model = build_model(folder, runtime, dtype=torch.float32)
    load_hf_weights(model, folder, runtime)
    return model, runtime


def generate_all(folder: Path, layouts: list[Layout], jobs: tuple[Job, ...]) -> list:
    """Return the rollouts of each job on each layout, on every rank."""
    results = []
    for layout in layouts:
        model, runtime = load(folder, layout)
        for job in jobs:
            engine: RolloutEngine = NativeEngine(
                model,
                runtime,
                eos_token_ids=job.eos,
                batch_size=job.batch_size,
                kv_cache_tokens=job.kv_cache_tokens,
            )
            prompts, seeds = [PROMPTS[row] for row in job.rows], [SEEDS[row] for row in job.rows]
            results.append(sample(engine, prompts, seeds, job.sampling))
        mcore_runtime.stop()
    return results


def families_on_one_rank(folders: dict[str, Path]) -> dict[str, list]:
    results = {name: generate_all(folder, [{}], JOBS[:2]) for name, folder in folders.items()}
    results["qwen2"] += generate_all(folders["qwen2"], [{}], JOBS[2:])
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny_model(family, root / family, tie=family == "qwen3")
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def on_one_rank(folders) -> dict[str, list]:
    return run_ranks(families_on_one_rank, 1, folders)[0]


def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def uncached_logits(model: PreTrainedModel, prompt: list[int], response: tuple[int, ...]) -> Tensor:
    """Return the logits of each response token, [T, V], from one forward of the whole sequence."""
    tokens = torch.tensor([[*prompt, *response]])
    return model(tokens).logits[0, len(prompt) - 1 : -1].float()


def assert_same(rollouts: list[Rollout], expected: list[Rollout]) -> None:
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in expected]
    assert [r.finished for r in rollouts] == [r.finished for r in expected]
    for ours, theirs in zip(rollouts, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_sampling_equals_transformers(folders, on_one_rank, family):
    model = reference(folders[family])
    for prompt, rollout in zip(PROMPTS, on_one_rank[family][0], strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=GREEDY.max_response_tokens,
            eos_token_id=list(EOS),
            pad_token_id=0,
        )
        assert list(rollout.response_ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_equal_those_drawn_from_uncached_logits(folders, on_one_rank, family):
    """Token for token, with the log-probs of the unmodified distribution."""
    model = reference(folders[family])
    uniforms = uniform_numbers(SEEDS, RANDOM.max_response_tokens)
    for row, rollout in enumerate(on_one_rank[family][1]):
        logits = uncached_logits(model, PROMPTS[row], rollout.response_ids)
        tokens, logprobs = draw(logits, uniforms[row, : len(logits)], RANDOM)
        assert list(rollout.response_ids) == tokens.tolist()
        assert rollout.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)
        torch.testing.assert_close(logprobs, logits.log_softmax(-1)[range(len(tokens)), tokens])


def test_samples_in_other_batches_are_the_same(on_one_rank):
    expected = on_one_rank["qwen2"][1]
    for job, rollouts in zip(JOBS[2:], on_one_rank["qwen2"][2:], strict=True):
        assert_same(rollouts, [expected[row] for row in job.rows])


def test_response_ends_at_the_first_eos_or_the_limit(folders, on_one_rank):
    free = on_one_rank["qwen2"][1]
    # Tokens that some rows sample early and others do not.
    eos = (free[0].response_ids[3], free[2].response_ids[0], free[4].response_ids[9])
    # With two places, rows leave at different times, and new rows join old ones.
    jobs = (Job(RANDOM, eos=eos), Job(RANDOM, eos=eos, batch_size=2))
    stopped, one_by_one = run_ranks(generate_all, 1, folders["qwen2"], [{}], jobs)[0]
    assert_same(one_by_one, stopped)
    for short, long in zip(stopped, free, strict=True):
        hits = [t for t, token in enumerate(long.response_ids) if token in eos]
        length = hits[0] + 1 if hits else RANDOM.max_response_tokens
        assert short.response_ids == long.response_ids[:length]
        assert len(short.logprobs) == length
        assert short.finished == bool(hits)
    assert len(stopped[2].response_ids) == 1
    assert {rollout.finished for rollout in stopped} == {True, False}


def test_samples_on_every_layout_are_the_same(folders, on_one_rank):
    expected = on_one_rank["qwen2"][:2]
    for world_size, layouts in LAYOUTS.items():
        on_ranks = run_ranks(generate_all, world_size, folders["qwen2"], layouts, JOBS[:2])
        assert all(results == on_ranks[0] for results in on_ranks)
        for index, rollouts in enumerate(on_ranks[0]):
            assert_same(rollouts, expected[index % 2])


def own_rows_on_each_replica(folder: Path) -> list[Rollout]:
    model, runtime = load(folder, {})
    engine = NativeEngine(model, runtime, eos_token_ids=EOS, batch_size=2)
    rows = slice(2 * runtime.dp_rank, None)  # five prompts in three batches, three in two
    return sample(engine, PROMPTS[rows], SEEDS[rows], RANDOM)


def test_replicas_do_not_wait_for_each_other(folders, on_one_rank):
    first, second = run_ranks(own_rows_on_each_replica, 2, folders["qwen2"])
    assert_same(first, on_one_rank["qwen2"][1])
    assert_same(second, on_one_rank["qwen2"][1][2:])


def own_rows_with_shared_experts(folder: Path, layout: Layout) -> tuple[list[Rollout], int]:
    """Return this replica's rollouts, and how often it only computed experts for the other one."""
    model, runtime = load(folder, layout)
    engine = NativeEngine(model, runtime, eos_token_ids=EOS, batch_size=2)
    rows = slice(4 * runtime.dp_rank, None)  # five prompts in three batches, one in one
    usual, calls = Decoder.cache_next, []

    def noted(*args: Any) -> None:
        calls.append(args)
        usual(*args)

    with patch.object(Decoder, "cache_next", noted):
        return sample(engine, PROMPTS[rows], SEEDS[rows], RANDOM), len(calls)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_replicas_that_share_experts_wait_for_each_other(tmp_path, pipeline):
    save_tiny_model("qwen3_moe", tmp_path)
    [expected] = run_ranks(generate_all, 1, tmp_path, [{}], JOBS[1:2])[0]
    layout = {"expert": 2, "pipeline": pipeline}
    on_ranks = run_ranks(own_rows_with_shared_experts, 2 * pipeline, tmp_path, layout)
    for rank, (rollouts, num_calls) in enumerate(on_ranks):
        is_second = rank % 2 == 1
        assert_same(rollouts, expected[4:] if is_second else expected)
        assert bool(num_calls) == is_second


def model_is_left_as_it_was(folder: Path) -> None:
    """Sampling does not change training, and samples follow the weights."""
    model, runtime = load(folder, {})
    engine = NativeEngine(model, runtime, eos_token_ids=EOS, batch_size=3)
    tokens = torch.tensor([PROMPTS[2]])
    positions = torch.arange(tokens.size(1))[None]
    modules = list(model.modules())

    def gradient() -> Tensor:
        model.zero_grad()
        model[0](tokens, positions, None).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model.train()
    before = sample(engine, PROMPTS, SEEDS, RANDOM)
    assert model.training and all(module.training for module in modules)
    assert list(model.modules()) == modules
    model.eval()
    assert sample(engine, PROMPTS, SEEDS, RANDOM) == before
    assert not model.training

    # Training uses the rotary tables that sampling left in Megatron's cache.
    sample(engine, [PROMPTS[2][:-1]], SEEDS[:1], SamplingConfig(max_response_tokens=1))
    assert not model[0].rotary_pos_emb(len(PROMPTS[2])).is_inference()
    first = gradient()
    sample(engine, PROMPTS, SEEDS, RANDOM)
    assert torch.equal(gradient(), first)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    engine.update_weights(3)
    after = sample(engine, PROMPTS, SEEDS, RANDOM)
    assert [r.response_ids for r in after] != [r.response_ids for r in before]
    assert {r.weight_version for r in before} == {0} and {r.weight_version for r in after} == {3}

    model[0].decoder.layers[1].mlp.linear_fc2.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite at weight version 3"):
        sample(engine, PROMPTS, SEEDS, RANDOM)
    assert list(model.modules()) == modules


def refusals(folder: Path) -> list[str]:
    model, runtime = load(folder, {})
    engine = NativeEngine(model, runtime, eos_token_ids=EOS, batch_size=3)
    assert sample(engine, [], [], GREEDY) == []
    longest = SamplingConfig(max_response_tokens=2, temperature=0)
    [rollout] = sample(engine, [[5] * 510], SEEDS[:1], longest)  # 512 positions, all used
    assert len(rollout.response_ids) <= 2
    messages = []
    for prompts, seeds in (
        ([[5], []], SEEDS[:2]),
        ([[5] * 511], SEEDS[:1]),
        ([[5], [6, 509]], SEEDS[:2]),
        ([[5], [6]], SEEDS[:3]),
    ):
        with pytest.raises(ValueError) as caught:
            sample(engine, prompts, seeds, longest)
        messages.append(str(caught.value))
    return messages


def test_sampling_keeps_the_model_and_follows_its_weights(folders):
    run_ranks(model_is_left_as_it_was, 1, folders["qwen2"])


def test_bad_prompts_are_refused(folders):
    assert run_ranks(refusals, 1, folders["qwen2"])[0] == [
        "prompt 1 is empty; expected at least one token",
        "prompt 0 has 511 tokens: with max_response_tokens 2 it exceeds the model's 512 positions; "
        "shorten the prompt or lower max_response_tokens",
        "prompt 1 has token ids from 6 to 509, but the model's vocabulary has 509; check "
        "that the tokenizer belongs to the model",
        "found 2 prompts and 3 seeds; expected one seed per prompt",
    ]


def rows_in_cache(folder: Path) -> list[int]:
    from aropd_mcore.rollout import native

    model, runtime = load(folder, {})
    usual, rows = native.decoding, []

    def noted(*args, num_rows: int, **kwargs):
        rows.append(num_rows)
        return usual(*args, num_rows=num_rows, **kwargs)

    native.decoding = noted
    for batch_size, kv_cache_tokens in ((64, None), (3, None), (64, 2 * (19 + 24))):
        engine = NativeEngine(
            model,
            runtime,
            eos_token_ids=EOS,
            batch_size=batch_size,
            kv_cache_tokens=kv_cache_tokens,
        )
        sample(engine, PROMPTS, SEEDS, RANDOM)
    native.decoding = usual
    return rows


def test_kv_cache_has_as_many_rows_as_needed_and_fit(folders):
    """Five prompts: all fit, batch_size limits them, and the number of cached tokens does."""
    assert run_ranks(rows_in_cache, 1, folders["qwen2"])[0] == [5, 3, 2]
