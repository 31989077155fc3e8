"""Engines over the training model, and responses that grow by a token at a time, whoever keeps the
model's keys and values."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aropd_mcore.config import SamplingConfig
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.rollout.engine import never
from aropd_mcore.rollout.sampling import sample, uniform_numbers
from aropd_mcore.types import Rollout

STOPPED = -1
"""In the place of tokens: no more of them."""


class ModelEngine:
    """What RolloutEngines over the training model itself have in common: no second copy of the
    weights, nothing to sync.

    Args:
        model: this rank's shard, without DDP around it. Its weights are read at every call.
        eos_token_ids: any of them ends a response.
        batch_size: rows decoded together at most.
        kv_cache_tokens: tokens that the KV cache holds at most, on each model replica. None: as
            many as batch_size rows can have.
        should_stop: asked at every token on the rank that samples. True: the responses so far are
            returned at once, which the caller must throw away.
    """

    def __init__(
        self,
        model: StageModel,
        runtime: Runtime,
        *,
        eos_token_ids: Sequence[int],
        batch_size: int,
        kv_cache_tokens: int | None = None,
        should_stop: Callable[[], bool] = never,
    ):
        self.model = model
        self.runtime = runtime
        self.batch_size = batch_size
        self.kv_cache_tokens = kv_cache_tokens
        self.weight_version = 0
        self._should_stop = should_stop
        self._eos_token_ids = torch.tensor(
            list(eos_token_ids), dtype=torch.int64, device=runtime.device
        )

    def sync(self, weight_version: int) -> None:
        """Note how many updates the weights have seen; they are the student's own."""
        self.weight_version = weight_version

    def close(self) -> None:
        """Nothing was started."""


class Responses:
    """What has been sampled so far of every prompt, R of them, running or not."""

    def __init__(self, seeds: Sequence[int], limit: int, eos_token_ids: Tensor):
        device, shape = eos_token_ids.device, (len(seeds), limit)
        self.tokens_RT = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs_RT = torch.zeros(shape, device=device)
        """On the rank that samples, until it shares them."""
        self.lengths = [0] * len(seeds)
        self.ended = [False] * len(seeds)
        """By EOS."""
        self._limit = limit
        self._eos_token_ids = eos_token_ids
        self._uniforms_RT = uniform_numbers(seeds, limit).to(device)

    def next_tokens(self, running: list[int]) -> Tensor:
        """int64 [B]: the last token of each running row, which the model has not read yet."""
        rows, columns = self._places(running)
        return self.tokens_RT[rows, columns - 1]

    def draw(
        self, running: list[int], logits_BV: Tensor | None, sampling: SamplingConfig
    ) -> Tensor:
        """int64 [B]: the next token of each running row; zeros where there are no logits."""
        rows, columns = self._places(running)
        if logits_BV is None:
            return torch.zeros_like(rows)
        uniforms_B = self._uniforms_RT[rows, columns]
        tokens_B, self.logprobs_RT[rows, columns] = sample(logits_BV, uniforms_B, sampling)
        return tokens_B

    def add(self, running: list[int], tokens_B: Tensor) -> set[int]:
        """Put a token behind each running row; which of them, by their places, are done."""
        self.tokens_RT[self._places(running)] = tokens_B
        done = set()
        ends = torch.isin(tokens_B, self._eos_token_ids).tolist()
        for place, (row, is_end) in enumerate(zip(running, ends, strict=True)):
            self.lengths[row] += 1
            self.ended[row] = is_end
            if is_end or self.lengths[row] == self._limit:
                done.add(place)
        return done

    def rollouts(self, weight_version: int) -> list[Rollout]:
        """All of them, at their ends.

        Raises:
            FloatingPointError: logits were not finite.
        """
        if not self.logprobs_RT.isfinite().all():
            raise FloatingPointError(
                f"the model's logits are not finite at weight version {weight_version}; its "
                f"weights must have overflowed"
            )
        columns = self.tokens_RT.tolist(), self.logprobs_RT.tolist()
        return [
            Rollout(tuple(tokens[:length]), tuple(logprobs[:length]), ended, weight_version)
            for tokens, logprobs, length, ended in zip(
                *columns, self.lengths, self.ended, strict=True
            )
        ]

    def _places(self, running: list[int]) -> tuple[Tensor, Tensor]:
        """Row and next column of each running row."""
        columns = [self.lengths[row] for row in running]
        places = torch.tensor([running, columns], dtype=torch.int64, device=self.tokens_RT.device)
        return places[0], places[1]
