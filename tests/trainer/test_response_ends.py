"""Gradients at the end of responses, per position, compared with METHOD in plain torch.

The output head is the identity matrix, so the hidden states are the logits, and the gradient of the
hidden states is the gradient of the logits, for every token of the vocabulary. For the forward KL
it is weight * (s - q) at positions that predict a loss token, and 0 at all other positions.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from aropd_mcore.numerics.position_metrics import token_metrics
from tests.support import oracles
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_run
from tests.support.tiny_tokenizer import VOCAB_SIZE

EOS = VOCAB_SIZE - 1
SCALE, CLIP, SKIP, LIMIT = 0.8, 2.0, 3, 12
LENGTHS = {True: (8, SKIP + 1, SKIP, 5, LIMIT), False: (LIMIT, LIMIT, LIMIT)}
"""Response lengths, by whether the response ends with EOS. In one response EOS is the only loss
token, and one response ends within the skipped tokens."""
RESPONSES = [
    (tuple((31 * n + 7 * k) % 250 for k in range(length - ended)) + (EOS,) * ended, ended)
    for ended, lengths in LENGTHS.items()
    for n, length in enumerate(lengths, start=10 * ended)
]
LAYOUTS = {
    "padded": ["training.micro_batch_size=4"],
    "single": ["training.micro_batch_size=1"],
    "packed": ["training.packing=true", "training.max_tokens_per_microbatch=260"],
}


class Gradients(NamedTuple):
    """Results of one form of microbatches. Per microbatch: tokens [B, S], gradients [S, B, V]."""

    samples: list[dict[str, Any]]
    tokens: list[Tensor]
    gradients: list[Tensor]
    metrics: dict[str, Any]


def compute_gradients(path: Path) -> dict[str, Gradients]:
    from aropd_mcore.config_file import load_config
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import build_run, start_runtime

    results = {}
    for name, overrides in LAYOUTS.items():
        config = load_config(path, overrides)
        results[name] = run_gradients(build_run(config, start_runtime(config)))
        runtime.stop()
    return results


def run_gradients(run) -> Gradients:
    from aropd_mcore.data.spans import NO_THINKING
    from aropd_mcore.trainer.batch import form_batch
    from aropd_mcore.types import Rollout

    views, _ = run.source.prompts(0)
    rollouts = [Rollout(ids, (), ended, 0) for ids, ended in RESPONSES]
    # The pad token is EOS, so a padded position in the loss would count as an end.
    batch = form_batch(
        run.config, run.runtime, views, rollouts, [NO_THINKING] * len(views), pad_token_id=EOS
    )
    gradients: list[Tensor] = []

    def keep_gradient(_module, _args, output_SBH: Tensor) -> None:
        output_SBH.register_hook(lambda gradient_SBH: gradients.append(gradient_SBH.clone()))

    (stage,) = run.student.model
    stage.decoder.final_layernorm.register_forward_hook(keep_gradient)
    outputs = run.teacher.score(batch.microbatches)
    sums, _ = run.student.forward_backward(batch.microbatches, outputs)
    return Gradients(
        [
            {
                "prompts": {"student": v.student_ids, "partial": v.partial_ids, "full": v.full_ids},
                "weight": v.row.sample_weight,
            }
            for v in views
        ],
        [microbatch.student.tokens_BS for microbatch in batch.microbatches],
        [gradient_SBH[..., :VOCAB_SIZE] for gradient_SBH in gradients],
        token_metrics(sums),
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ends")
    path = write_run(
        folder,
        objective={
            "residual_scale": SCALE, "residual_clip": CLIP, "skip_response_tokens": SKIP,
        },
        rollout={"max_response_tokens": LIMIT},
        training={"global_batch_size": len(RESPONSES)},
    )  # fmt: skip
    hidden = 272  # larger than the vocabulary
    write_model(folder / "model", num_hidden_layers=2, hidden_size=hidden, eos_token_id=EOS)
    weights = load_file(folder / "model" / "model.safetensors")
    weights["lm_head.weight"] = torch.eye(VOCAB_SIZE, hidden)
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def results(path) -> dict[str, Gradients]:
    return run_ranks(compute_gradients, 1, path)[0]


@pytest.fixture(scope="module")
def expected(path, results) -> list[dict[str, Tensor]]:
    """log s, log p, log f and log q of each sample: [response tokens, V], in fp64."""
    model = AutoModelForCausalLM.from_pretrained(path.parent / "model", dtype=torch.float64).eval()
    logs = []
    for sample, (response, _) in zip(results["padded"].samples, RESPONSES, strict=True):
        logprobs = {}
        for view, prompt in sample["prompts"].items():
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
            # The position before a token predicts it.
            logprobs[view] = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        logprobs["target"] = oracles.target_logprobs(
            logprobs["partial"], logprobs["full"], SCALE, CLIP
        )
        logs.append(logprobs)
    return logs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_at_every_position_is_weight_times_s_minus_q(results, expected, layout):
    samples, tokens, gradients, _ = results[layout]
    weights = [sample["weight"] for sample in samples]
    counts = [max(len(response) - SKIP, 0) for response, _ in RESPONSES]
    total = sum(w for w, count in zip(weights, counts, strict=True) if count)
    expected_gradients = [torch.zeros_like(g, dtype=torch.float64) for g in gradients]
    at_ends = []
    for n, (response, ended) in enumerate(RESPONSES):
        prompt, logs = samples[n]["prompts"]["student"], expected[n]
        positions = list(_find((*prompt, *response), tokens))
        assert len(positions) == 1, "each sample is in one microbatch, once"
        microbatch, row, start = positions[0]
        for j in range(SKIP, len(response)):
            gradient_V = logs["student"][j].exp() - logs["target"][j].exp()
            gradient_V *= weights[n] / (counts[n] * total)
            position = start + len(prompt) - 1 + j
            expected_gradients[microbatch][position, row] = gradient_V
            if ended and j == len(response) - 1:
                assert tokens[microbatch][row, position + 1] == EOS
                at_ends.append((gradient_V, gradients[microbatch][position, row]))
    for gradient_SBV, expected_SBV in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient_SBV.double(), expected_SBV, rtol=1e-4, atol=2e-8)
        # The gradient is 0 before the first loss token, after the last one, and at padding.
        assert gradient_SBV[expected_SBV.abs().sum(-1) == 0].count_nonzero() == 0
    assert len(at_ends) == sum(len(response) > SKIP for response, ended in RESPONSES if ended)
    assert len(at_ends) > 2
    for expected_V, gradient_V in at_ends:
        assert abs(float(expected_V[EOS])) > 1e-6
        assert float(gradient_V[EOS]) == pytest.approx(float(expected_V[EOS]), rel=1e-3)


def _find(ids: tuple[int, ...], tokens: list[Tensor]):
    """Yield (microbatch, row, first position) of each occurrence of a sequence."""
    for microbatch, tokens_BS in enumerate(tokens):
        for row, tokens_S in enumerate(tokens_BS.tolist()):
            for start in range(len(tokens_S) - len(ids) + 1):
                if tuple(tokens_S[start : start + len(ids)]) == ids:
                    yield microbatch, row, start


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eos_probs_are_means_over_the_ends_that_the_loss_counts(results, expected, layout):
    metrics = results[layout].metrics
    ends = [
        logs
        for logs, (response, ended) in zip(expected, RESPONSES, strict=True)
        if ended and len(response) > SKIP
    ]
    assert metrics["num_response_ends"] == len(ends)
    for name in oracles.DISTRIBUTIONS:
        probs = [float(logs[name][-1, EOS].exp()) for logs in ends]
        assert metrics[f"eos_prob_{name}"] == pytest.approx(sum(probs) / len(probs), rel=1e-5)


def test_eos_probs_without_response_ends_are_absent():
    sums = {"num_tokens": torch.ones(5), "num_response_ends": torch.zeros(5)}
    metrics = token_metrics(sums | {"eos_prob_student": torch.zeros(5)})
    assert metrics["num_response_ends"] == 0 and "eos_prob_student" not in metrics
