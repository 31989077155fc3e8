"""Tests of learning-rate schedules, and of gradients whose memory is released between the steps.

tests/trainer/test_step.py tests the updates.
"""

import math
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny_model

NUM_STEPS, NUM_WARMUP = 10, 2
LR, MIN_LR = 1e-3, 0.0
DECAY = {  # fraction of the decay that is done -> position from min_lr (0) to lr (1)
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


@pytest.fixture(scope="module")
def learning_rates(tmp_path_factory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", folder, num_hidden_layers=1)
    return run_ranks(take_steps, 1, folder, list(DECAY))[0]


def take_steps(folder: Path, schedules: list[str]) -> dict[str, list[float]]:
    import torch

    from aropd_mcore.config import OptimizerConfig
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.optim import Optimizer

    rt = runtime.start()
    rates = {}
    for schedule in schedules:
        config = OptimizerConfig.model_validate(
            {"schedule": schedule, "lr": LR, "min_lr": MIN_LR, "warmup_ratio": 0.2}
        )
        model = build_model(folder, rt, dtype=torch.float32)
        optimizer = Optimizer(model, config, num_steps=NUM_STEPS)
        optimizer.zero_grad()
        # The gradients are zero. Every second update is skipped, which must not advance the
        # schedule.
        rates[schedule] = []
        for _ in range(NUM_STEPS):
            grad_norm = optimizer.grad_norm()
            skipped = optimizer.step(grad_norm, apply=False)
            applied = optimizer.step(grad_norm, apply=True)
            assert skipped.lr == applied.lr
            rates[schedule].append(applied.lr)
    return rates


@pytest.mark.parametrize("schedule", DECAY)
def test_learning_rate_warms_up_then_decays(learning_rates, schedule):
    decaying = NUM_STEPS - NUM_WARMUP
    expected = [LR * n / (NUM_WARMUP + 1) for n in range(1, NUM_WARMUP + 1)] + [
        MIN_LR + (LR - MIN_LR) * DECAY[schedule](n / decaying) for n in range(decaying)
    ]
    assert learning_rates[schedule] == pytest.approx(expected)
    assert min(learning_rates[schedule]) > 0


def updates_with_released_gradients(folder: Path) -> None:
    import torch

    from aropd_mcore.config import OptimizerConfig
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.optim import Optimizer

    rt = runtime.start(tensor=2)
    config = OptimizerConfig(lr=LR)
    weights = []
    for shares_gpu in (False, True):
        model = build_model(folder, rt, dtype=torch.bfloat16)
        torch.manual_seed(rt.tp_rank)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        optimizer = Optimizer(model, config, num_steps=NUM_STEPS, shares_gpu=shares_gpu)
        gradients = [parameter.main_grad for parameter in model.parameters()]
        for _ in range(3):
            released = [not gradient.untyped_storage().nbytes() for gradient in gradients]
            assert released == [shares_gpu] * len(gradients)
            optimizer.zero_grad()
            assert not any(gradient.any() for gradient in gradients)
            for gradient in gradients:
                gradient.copy_(torch.randn(gradient.shape))
            optimizer.step(optimizer.grad_norm(), apply=True)
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(own, other) for own, other in zip(*weights, strict=True))


def test_gradients_without_memory_between_steps_give_the_same_updates(tmp_path):
    save_tiny_model("llama", tmp_path, num_hidden_layers=1)
    run_ranks(updates_with_released_gradients, 2, tmp_path)
