"""Packed and padded microbatches give the same hidden states, losses and gradients.

The responses have 1 token up to the limit: one is long and many are short. With one sample per
microbatch, packed and padded forms have the same shapes and are equal bit for bit. Otherwise they
differ by rounding.
"""

from pathlib import Path

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run

LIMIT = 64
LENGTHS = [1, LIMIT, 2, 1, 3, 1, 1, 7]
BUDGET = 256 + LIMIT + 12  # tokens; no sequence can be longer


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    path = write_run(
        tmp_path_factory.mktemp("packing"),
        rollout={"max_response_tokens": LIMIT},
        # The template is so long that two samples never fit into the tightest budget.
        views={
            "max_prompt_tokens": 256,
            "teacher_template": "{question}\n" + 10 * "read this first " + "\n{trace}",
        },
        objective={"skip_response_tokens": 0, "residual_clip": 0.5},
    )
    return run_ranks(compute_padded_and_packed, 1, path)[0]


def compute_padded_and_packed(path: Path) -> list[dict]:
    """Compute with padding, 1 and 4 samples per microbatch; packed, with the tightest and a large
    budget."""
    from aropd_mcore.config_file import load_config
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import build_run, start_runtime

    results = []
    for overrides in (
        ["training.micro_batch_size=1"],
        ["training.micro_batch_size=4"],
        ["training.packing=true", f"training.max_tokens_per_microbatch={BUDGET}"],
        ["training.packing=true", "training.max_tokens_per_microbatch=2000"],
        ["training.packing=true", "training.micro_batch_size=2"],
    ):
        config = load_config(path, overrides)
        run = build_run(config, start_runtime(config))
        results.append(forward_and_backward(run))
        runtime.stop()
    return results


def forward_and_backward(run) -> dict:
    from aropd_mcore.data.spans import NO_THINKING
    from aropd_mcore.mcore.schedule import run_schedule
    from aropd_mcore.trainer.batch import form_batch
    from aropd_mcore.types import Rollout

    views, _ = run.source.prompts(0)
    # Each response consists of its own token, which identifies it in any microbatch.
    responses = [tuple([40 + i] * length) for i, length in enumerate(LENGTHS)]
    rollouts = [Rollout(ids, (), True, 0) for ids in responses]
    batch = form_batch(
        run.config, run.runtime, views, rollouts, [NO_THINKING] * len(views), run.pad_token_id
    )
    outputs = run.teacher.score(batch.microbatches)
    students = run_schedule(
        list(run.student.model),
        batch.microbatches,
        view_of=lambda m: m.student,
        on_last_stage=lambda hidden_TH, _: hidden_TH,
        forward_only=True,
    )
    hidden, sizes = {}, []
    for microbatch, output, student in zip(batch.microbatches, outputs, students, strict=True):
        sizes.append(len(microbatch.sample_T.unique()))
        rows = zip(microbatch.response_ids_T.tolist(), microbatch.offset_T.tolist(), strict=True)
        for t, token in enumerate(rows):
            views_of_token = (student[t], output.partial_hidden_TH[t], output.full_hidden_TH[t])
            hidden[token] = torch.stack(views_of_token)
    sums, _ = run.student.forward_backward(batch.microbatches, outputs)
    run.student.optimizer.inner.prepare_grads()
    return {
        "hidden": hidden,
        "sizes": sizes,
        "padding": batch.num_padding_tokens / batch.num_tokens,
        "sums": sums,
        "grads": {n: p.main_grad.clone() for n, p in run.student.model.named_parameters()},
    }


def test_packing_with_one_sample_per_microbatch_equals_padding_bitwise(results):
    single, _, packed, *_ = results
    assert single["sizes"] == packed["sizes"] == [1] * len(LENGTHS)
    for token, states in single["hidden"].items():
        assert torch.equal(packed["hidden"][token], states)


@pytest.mark.parametrize("index", [1, 2, 3, 4])
def test_packing_equals_padding_up_to_rounding(results, index):
    expected, other = results[0], results[index]
    assert other["hidden"].keys() == expected["hidden"].keys()
    assert len(expected["hidden"]) == sum(LENGTHS)
    for token, states in expected["hidden"].items():
        torch.testing.assert_close(other["hidden"][token], states, rtol=0, atol=5e-6)
    for name, values in expected["sums"].items():
        torch.testing.assert_close(other["sums"][name], values, rtol=2e-5, atol=1e-6)
    for name, grad in expected["grads"].items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(other["grads"][name], grad, rtol=0, atol=2e-5 * scale)


def test_padding_fraction_is_zero_except_with_several_padded_samples(results):
    single, by_four, packed, in_one, by_size = results
    assert [r["padding"] for r in (single, packed, in_one, by_size)] == [0] * 4
    assert by_four["padding"] > 0.1
    assert in_one["sizes"] == [len(LENGTHS)]
    assert max(by_size["sizes"]) >= 2 and len(by_size["sizes"]) > 1
