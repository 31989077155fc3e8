"""The native engine: the student samples by its own forward, with a KV cache, where it stands."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.config import SamplingConfig
from aropd_mcore.mcore.decode import decoding
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.rollout.engine import check_prompts
from aropd_mcore.rollout.sampling import sample, uniform_numbers
from aropd_mcore.types import Rollout


class NativeEngine:
    """RolloutEngine over the training model itself: no second copy of the weights, nothing to sync.

    Every rank of a model replica calls `generate` with the same arguments and returns the same
    list. Replicas are independent: each may have other prompts, and other numbers of them. Tokens
    depend on weights, prompt and seed; tensor and pipeline sizes, batch_size and the other prompts
    change the logits by rounding only.

    Args:
        model: this rank's shard, without DDP around it. Its weights are read at every call.
        eos_token_ids: any of them ends a response.
        batch_size: prompts decoded together; bounds the KV cache.
    """

    def __init__(
        self,
        model: StageModel,
        runtime: Runtime,
        *,
        eos_token_ids: Sequence[int],
        batch_size: int,
    ):
        self.model = model
        self.runtime = runtime
        self.batch_size = batch_size
        self.weight_version = 0
        self._eos_token_ids = torch.tensor(
            list(eos_token_ids), dtype=torch.int64, device=runtime.device
        )

    def sync(self, weight_version: int) -> None:
        """Note how many updates the weights have seen; they are the student's own."""
        self.weight_version = weight_version

    def close(self) -> None:
        """Nothing was started."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[Rollout]:
        """As RolloutEngine.generate.

        Raises:
            ValueError: seeds and prompts differ in number; a prompt is empty, has an id that the
                model has not, or leaves no room for max_response_tokens.
            FloatingPointError: the model's logits are not finite.
        Collectives: the model's over tp_group and pp_group, a gather of logits and a broadcast of
            tokens for every token; over cp_group, whose ranks share out the prompts, an all-gather
            of the rollouts; none over dp_group, but where replicas share experts: then all of them
            must call together, and they decode until the last is done.
        """
        check_prompts(
            prompts,
            seeds,
            sampling,
            vocab_size=self.model.vocab_size,
            max_sequence_length=self.model.max_sequence_length,
        )
        group = self.runtime.cp_group
        share = slice(group.rank(), None, group.size())
        mine = self._generate_share(prompts[share], seeds[share], sampling)
        if group.size() == 1:
            return mine
        shares: list[list[Rollout]] = [[] for _ in range(group.size())]
        dist.all_gather_object(shares, mine, group=group)
        return [shares[i % group.size()][i // group.size()] for i in range(len(prompts))]

    def _generate_share(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[Rollout]:
        starts = range(0, len(prompts), self.batch_size)
        rollouts = []
        for start in starts:
            batch = slice(start, start + self.batch_size)
            rollouts += self._generate_batch(prompts[batch], seeds[batch], sampling)
        for _ in range(self._over_replicas(len(starts), dist.ReduceOp.MAX) - len(starts)):
            self._generate_batch([(0,)], [0], sampling)  # for the experts here: others' go on
        return rollouts

    def _over_replicas(self, value: int, op: dist.ReduceOp.RedOpType) -> int:
        """`value` reduced over the replicas that have to decode in step: those that share experts,
        whose every forward is a collective."""
        if self.runtime.ep_size == 1:
            return value
        reduced = torch.tensor(value, device=self.runtime.device)
        dist.all_reduce(reduced, op, group=self.runtime.dp_cp_group)
        return int(reduced)

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[Rollout]:
        device, limit = self.runtime.device, sampling.max_response_tokens
        uniforms_TB = uniform_numbers(seeds, limit).T.to(device)
        tokens_TB = torch.zeros((limit, len(prompts)), dtype=torch.int64, device=device)
        logprobs_TB = torch.zeros((limit, len(prompts)), device=device)
        is_last_TB = torch.zeros_like(tokens_TB, dtype=torch.bool)
        with decoding(self.model, self.runtime, prompts, limit) as decoder:
            logits_BV = decoder.prefill()
            done_B = is_last_TB[0]
            for t in range(limit):
                if logits_BV is not None:
                    tokens_TB[t], logprobs_TB[t] = sample(logits_BV, uniforms_TB[t], sampling)
                decoder.share(tokens_TB[t])
                is_last_TB[t] = torch.isin(tokens_TB[t], self._eos_token_ids)
                done_B = done_B | is_last_TB[t]
                is_done = self._over_replicas(int(done_B.all()), dist.ReduceOp.MIN)
                if t + 1 == limit or is_done:
                    break
                logits_BV = decoder.step(tokens_TB[t])
            decoder.share(logprobs_TB)
        return self._rollouts(tokens_TB.T, logprobs_TB.T, is_last_TB.T)

    def _rollouts(
        self, tokens_BT: Tensor, logprobs_BT: Tensor, is_last_BT: Tensor
    ) -> list[Rollout]:
        finished_B = is_last_BT.any(1)
        lengths_B = torch.where(finished_B, is_last_BT.int().argmax(1) + 1, tokens_BT.size(1))
        if not logprobs_BT.isfinite().all():
            raise FloatingPointError(
                f"the model's logits are not finite at weight version {self.weight_version}; "
                f"its weights must have overflowed"
            )
        return [
            Rollout(tuple(tokens[:length]), tuple(logprobs[:length]), finished, self.weight_version)
            for tokens, logprobs, length, finished in zip(
                tokens_BT.tolist(),
                logprobs_BT.tolist(),
                lengths_B.tolist(),
                finished_B.tolist(),
                strict=True,
            )
        ]
