"""Decode buffers: responses that grow by one token per forward pass.

Shape letters: R responses, T response tokens, B rows, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aropd_mcore.rollout.sampling import uniform_numbers
from aropd_mcore.types import Rollout


class RowState:
    """State of the rows that are decoded together, on the device.

    A row is done if it has no response, or if its response has ended. Later forwards do not change
    it. `append` neither reads values on the host nor copies any from there. The tensors keep their
    addresses until a batch needs more rows or longer responses.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._allocate(0, 0)

    def _allocate(self, num_rows: int, num_tokens: int) -> None:
        def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        # One more column, in which finished rows of full length write.
        self.tokens_BT = numbers(num_rows, num_tokens + 1)
        self.logprobs_BT = numbers(num_rows, num_tokens + 1, dtype=torch.float32)
        """Log-probs on the sampling rank, zeros on the others."""
        self.uniforms_BT = numbers(num_rows, num_tokens + 1, dtype=torch.float64)
        self.last_B = numbers(num_rows)
        self.positions_B = numbers(num_rows)
        """Last token of each row, which is the model's next input, and its position."""
        self.counts_B = numbers(num_rows)
        self.limits_B = numbers(num_rows)
        """Number of tokens of each response, and its largest allowed number."""
        self.is_done_B = numbers(num_rows, dtype=torch.bool)

    @property
    def tensors(self) -> list[Tensor]:
        return [
            self.tokens_BT,
            self.logprobs_BT,
            self.uniforms_BT,
            self.last_B,
            self.positions_B,
            self.counts_B,
            self.limits_B,
            self.is_done_B,
        ]

    def clear(self, num_rows: int, limit: int) -> None:
        """Make all rows done, with room for num_rows responses of `limit` tokens."""
        rows, columns = self.tokens_BT.shape
        if num_rows > rows or limit >= columns:
            self._allocate(max(num_rows, rows), max(limit, columns - 1))
        for tensor in self.tensors:
            tensor.zero_()
        self.is_done_B.fill_(True)

    def start(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], uniforms_BT: Tensor
    ) -> None:
        """Begin a response to a prompt in each of these rows. All prompt tokens but the last one
        are in the KV cache.

        Args:
            uniforms_BT: fp64 [len(rows), limit] on the device.
        """
        limit = uniforms_BT.size(1)
        state = [(row, p[-1], len(p) - 1) for row, p in zip(rows, prompts, strict=True)]
        indices_B, last_B, positions_B = torch.tensor(state, device=self._device).T
        self.uniforms_BT[indices_B, :limit] = uniforms_BT
        self.last_B[indices_B], self.positions_B[indices_B] = last_B, positions_B
        self.counts_B[indices_B], self.limits_B[indices_B] = 0, limit
        self.is_done_B[indices_B] = False

    def next_uniforms(self, rows: slice) -> Tensor:
        """Return the uniform number of the next token of each of the rows, fp64 [B]."""
        columns_B1 = self.counts_B[rows, None]
        return self.uniforms_BT[rows].gather(1, columns_B1).squeeze(1)

    def append(self, rows: slice, tokens_B: Tensor, logprobs_B: Tensor, is_end_V: Tensor) -> None:
        """Append a token to each of the B rows that is not done.

        Args:
            tokens_B, logprobs_B: int64 and fp32, on the device.
            is_end_V: bool, whether each token of the vocabulary ends a response.
        """
        counts_B, is_done_B = self.counts_B[rows], self.is_done_B[rows]
        columns_B1 = counts_B[:, None]
        self.tokens_BT[rows].scatter_(1, columns_B1, tokens_B[:, None])
        self.logprobs_BT[rows].scatter_(1, columns_B1, logprobs_B[:, None])
        self.last_B[rows].copy_(tokens_B)
        self.positions_B[rows] += ~is_done_B
        counts_B += ~is_done_B
        is_done_B |= is_end_V[tokens_B] | (counts_B >= self.limits_B[rows])

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move rows. The sources are done afterwards."""
        for tensor in self.tensors:
            tensor[targets] = tensor[sources]
        self.is_done_B[sources] = True


class Responses:
    """Finished responses of a batch."""

    def __init__(self, seeds: Sequence[int], limit: int, device: torch.device):
        """
        Args:
            seeds: one per prompt.
            limit: largest number of tokens of a response.
        """
        shape = (len(seeds), limit)
        self.uniforms_RT = uniform_numbers(seeds, limit).to(device)
        self.tokens_RT = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs_RT = torch.zeros(shape, device=device)
        """Log-probs on the sampling rank. Zeros on other ranks until they are shared."""
        self.lengths = [0] * len(seeds)

    def keep(
        self, state: RowState, rows: Sequence[int], responses: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Copy the responses of these rows."""
        limit = self.tokens_RT.size(1)
        places = torch.tensor([rows, responses], device=self.tokens_RT.device)
        self.tokens_RT[places[1]] = state.tokens_BT[places[0], :limit]
        self.logprobs_RT[places[1]] = state.logprobs_BT[places[0], :limit]
        for response, length in zip(responses, lengths, strict=True):
            self.lengths[response] = length

    def rollouts(self, eos_token_ids: Sequence[int], weight_version: int) -> list[Rollout]:
        """Return all R responses.

        Args:
            eos_token_ids: a response is finished if it ends with any of them.
        Raises:
            FloatingPointError: a logit was not finite.
        """
        columns = self.tokens_RT.tolist(), self.logprobs_RT.tolist(), self.lengths
        rows = [(t[:length], p[:length]) for t, p, length in zip(*columns, strict=True)]
        if any(not math.isfinite(logprob) for _, logprobs in rows for logprob in logprobs):
            raise FloatingPointError(
                f"the model's logits are not finite at weight version {weight_version}; expected "
                "finite logits: check the loss and the learning rate of the steps before"
            )
        return [
            Rollout(
                tuple(tokens),
                tuple(logprobs),
                bool(tokens) and tokens[-1] in eos_token_ids,
                weight_version,
            )
            for tokens, logprobs in rows
        ]
