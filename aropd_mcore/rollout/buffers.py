"""Decode buffers: responses that grow by one token per forward pass.

Shape letters: R responses, T response tokens, B running rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aropd_mcore.config import SamplingConfig
from aropd_mcore.rollout.sampling import sample, uniform_numbers
from aropd_mcore.types import Rollout


class DecodeBuffers:
    """Sampled tokens and log-probs of R responses, both running and finished."""

    def __init__(self, seeds: Sequence[int], limit: int, eos_token_ids: Tensor):
        """
        Args:
            seeds: one per prompt.
            limit: largest number of tokens of a response.
            eos_token_ids: int64; any of them ends a response. The buffers are on its device.
        """
        device, shape = eos_token_ids.device, (len(seeds), limit)
        self.tokens_RT = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs_RT = torch.zeros(shape, device=device)
        """Log-probs on the sampling rank. Zeros on other ranks until they are shared."""
        self.lengths = [0] * len(seeds)
        self.ended = [False] * len(seeds)
        """Whether each response ended by EOS."""
        self._limit = limit
        self._eos_token_ids = eos_token_ids
        self._uniforms_RT = uniform_numbers(seeds, limit).to(device)

    def next_tokens(self, running: list[int]) -> Tensor:
        """Return the last token of each running row, int64 [B]: the model's next input."""
        rows, columns = self._next_columns(running)
        return self.tokens_RT[rows, columns - 1]

    def draw(
        self, running: list[int], logits_BV: Tensor | None, sampling: SamplingConfig
    ) -> Tensor:
        """Sample the next token of each running row.

        Args:
            logits_BV: fp32; None on ranks that do not sample.
        Returns:
            int64 [B]; zeros where there are no logits.
        """
        rows, columns = self._next_columns(running)
        if logits_BV is None:
            return torch.zeros_like(rows)
        uniforms_B = self._uniforms_RT[rows, columns]
        tokens_B, self.logprobs_RT[rows, columns] = sample(logits_BV, uniforms_B, sampling)
        return tokens_B

    def add(self, running: list[int], tokens_B: Tensor) -> set[int]:
        """Append a token to each running row.

        Returns:
            Indices into `running` of the rows that are finished, by EOS or at the limit.
        """
        self.tokens_RT[self._next_columns(running)] = tokens_B
        done = set()
        ends = torch.isin(tokens_B, self._eos_token_ids).tolist()
        for place, (row, is_end) in enumerate(zip(running, ends, strict=True)):
            self.lengths[row] += 1
            self.ended[row] = is_end
            if is_end or self.lengths[row] == self._limit:
                done.add(place)
        return done

    def rollouts(self, weight_version: int) -> list[Rollout]:
        """Return all R responses as they are now.

        Raises:
            FloatingPointError: a logit was not finite.
        """
        if not self.logprobs_RT.isfinite().all():
            raise FloatingPointError(
                f"the model's logits are not finite at weight version {weight_version}; expected "
                "finite logits: check the loss and the learning rate of the steps before"
            )
        columns = self.tokens_RT.tolist(), self.logprobs_RT.tolist()
        return [
            Rollout(tuple(tokens[:length]), tuple(logprobs[:length]), ended, weight_version)
            for tokens, logprobs, length, ended in zip(
                *columns, self.lengths, self.ended, strict=True
            )
        ]

    def _next_columns(self, running: list[int]) -> tuple[Tensor, Tensor]:
        """Return row and next column of each running row, int64 [B] each."""
        columns = [self.lengths[row] for row in running]
        places = torch.tensor([running, columns], dtype=torch.int64, device=self.tokens_RT.device)
        return places[0], places[1]
