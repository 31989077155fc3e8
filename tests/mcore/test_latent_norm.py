"""The norm of latent vectors, against transformers'."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from aropd_mcore.mcore.latent_attention import LatentNorm


def test_norm_of_small_latent_vectors_has_the_epsilon_of_transformers():
    """Squares of the size of the epsilon. Those of random models hide it."""
    latent_SBC = 1e-3 * torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(0))
    config = cast(Any, SimpleNamespace(sequence_parallel=False))
    norm = LatentNorm(config, 24, eps=1e-3)  # the model's other norms have another epsilon
    torch.testing.assert_close(norm(latent_SBC), DeepseekV3RMSNorm(24)(latent_SBC))
