"""The gradient at the end of a response, position by position, against METHOD in plain torch.

The output head is the identity: the hidden states are the logits, so the gradient that arrives at
the hidden states is the gradient at the logits, of every token of the vocabulary. For the forward
KL it is weight * (s - q) where a loss token is predicted, and 0 everywhere else.
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
"""By whether a response ended by EOS: among these, one whose EOS is its only loss token, and one
that ends within the skipped tokens."""
RESPONSES = [
    (tuple((31 * n + 7 * k) % 250 for k in range(length - ended)) + (EOS,) * ended, ended)
    for ended, lengths in LENGTHS.items()
    for n, length in enumerate(lengths, start=10 * ended)
]
LAYOUTS = {
    "padded": ["training.micro_batch_size=4"],
    "one by one": ["training.micro_batch_size=1"],
    "packed": ["training.packing=true", "training.max_tokens_per_microbatch=260"],
}


class Found(NamedTuple):
    """What one layout of the samples has done; the gradients are [S, B, V], by microbatch."""

    samples: list[dict[str, Any]]
    tokens: list[Tensor]
    gradients: list[Tensor]
    metrics: dict[str, Any]


def gradients(path: Path) -> dict[str, Found]:
    from aropd_mcore.config_file import load_config
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import build_run, start_runtime

    found = {}
    for name, overrides in LAYOUTS.items():
        config = load_config(path, overrides)
        found[name] = gradients_of(build_run(config, start_runtime(config)))
        runtime.stop()
    return found


def gradients_of(run) -> Found:
    from aropd_mcore.trainer.batch import form_batch
    from aropd_mcore.types import Rollout

    views, _ = run.source.prompts(0)
    rollouts = [Rollout(ids, (), ended, 0) for ids, ended in RESPONSES]
    # Padding is the EOS here: a padded position that were counted would be an end.
    batch = form_batch(run.config, run.runtime, views, rollouts, pad_token_id=EOS)
    arrived: list[Tensor] = []

    def keep_gradient(_module, _args, output_SBH: Tensor) -> None:
        output_SBH.register_hook(lambda gradient_SBH: arrived.append(gradient_SBH.clone()))

    (stage,) = run.student.model
    stage.decoder.final_layernorm.register_forward_hook(keep_gradient)
    outputs = run.teacher.score(batch.microbatches)
    sums = run.student.forward_backward(batch.microbatches, outputs)
    return Found(
        [
            {
                "prompts": {"student": v.student_ids, "partial": v.partial_ids, "full": v.full_ids},
                "weight": v.row.sample_weight,
            }
            for v in views
        ],
        [microbatch.student.tokens_BS for microbatch in batch.microbatches],
        [gradient_SBH[..., :VOCAB_SIZE] for gradient_SBH in arrived],
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
    hidden = 272  # more than the vocabulary has
    write_model(folder / "model", num_hidden_layers=2, hidden_size=hidden, eos_token_id=EOS)
    weights = load_file(folder / "model" / "model.safetensors")
    weights["lm_head.weight"] = torch.eye(VOCAB_SIZE, hidden)
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def found(path) -> dict[str, Found]:
    return run_ranks(gradients, 1, path)[0]


@pytest.fixture(scope="module")
def expected(path, found) -> list[dict[str, Tensor]]:
    """Of each sample log s, log p, log f, log q [n, V] of all its response tokens, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(path.parent / "model", dtype=torch.float64).eval()
    logs = []
    for sample, (response, _) in zip(found["padded"].samples, RESPONSES, strict=True):
        own = {}
        for view, prompt in sample["prompts"].items():
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
            # The position before a token predicts it.
            own[view] = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        own["target"] = oracles.target_logprobs(own["partial"], own["full"], SCALE, CLIP)
        logs.append(own)
    return logs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_at_every_position_is_weight_times_s_minus_q(found, expected, layout):
    samples, tokens, arrived, _ = found[layout]
    weights = [sample["weight"] for sample in samples]
    counts = [max(len(response) - SKIP, 0) for response, _ in RESPONSES]
    total = sum(w for w, count in zip(weights, counts, strict=True) if count)
    wanted = [torch.zeros_like(gradient, dtype=torch.float64) for gradient in arrived]
    at_ends = []
    for n, (response, ended) in enumerate(RESPONSES):
        prompt, logs = samples[n]["prompts"]["student"], expected[n]
        places = list(_places((*prompt, *response), tokens))
        assert len(places) == 1, "each sample is in one microbatch, once"
        microbatch, row, start = places[0]
        for j in range(SKIP, len(response)):
            gradient_V = logs["student"][j].exp() - logs["target"][j].exp()
            gradient_V *= weights[n] / (counts[n] * total)
            position = start + len(prompt) - 1 + j
            wanted[microbatch][position, row] = gradient_V
            if ended and j == len(response) - 1:
                assert tokens[microbatch][row, position + 1] == EOS
                at_ends.append((gradient_V, arrived[microbatch][position, row]))
    for gradient_SBV, wanted_SBV in zip(arrived, wanted, strict=True):
        torch.testing.assert_close(gradient_SBV.double(), wanted_SBV, rtol=1e-4, atol=2e-8)
        # Nothing arrives before the first loss token, behind the last, or at padding.
        assert gradient_SBV[wanted_SBV.abs().sum(-1) == 0].count_nonzero() == 0
    assert len(at_ends) == sum(len(response) > SKIP for response, ended in RESPONSES if ended)
    assert len(at_ends) > 2
    for gradient_V, found_V in at_ends:
        assert abs(float(gradient_V[EOS])) > 1e-6
        assert float(found_V[EOS]) == pytest.approx(float(gradient_V[EOS]), rel=1e-3)


def _places(ids: tuple[int, ...], tokens: list[Tensor]):
    """(microbatch, row, first position) of a sequence, wherever it starts."""
    for microbatch, tokens_BS in enumerate(tokens):
        for row, tokens_S in enumerate(tokens_BS.tolist()):
            for start in range(len(tokens_S) - len(ids) + 1):
                if tuple(tokens_S[start : start + len(ids)]) == ids:
                    yield microbatch, row, start


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eos_probs_are_means_over_the_ends_that_the_loss_counts(found, expected, layout):
    metrics = found[layout].metrics
    ends = [
        logs
        for logs, (response, ended) in zip(expected, RESPONSES, strict=True)
        if ended and len(response) > SKIP
    ]
    assert metrics["num_response_ends"] == len(ends)
    for name in oracles.DISTRIBUTIONS:
        probs = [float(logs[name][-1, EOS].exp()) for logs in ends]
        assert metrics[f"eos_prob_{name}"] == pytest.approx(sum(probs) / len(probs), rel=1e-5)


def test_without_an_end_there_is_no_eos_prob():
    sums = {"num_tokens": torch.ones(5), "num_response_ends": torch.zeros(5)}
    metrics = token_metrics(sums | {"eos_prob_student": torch.zeros(5)})
    assert metrics["num_response_ends"] == 0 and "eos_prob_student" not in metrics
