"""The native engine: the student samples by its own forward, with a KV cache, where it stands."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from aropd_mcore.config import SamplingConfig
from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.decode import decoding, share
from aropd_mcore.rollout.engine import check_prompts
from aropd_mcore.rollout.responses import STOPPED, ModelEngine, Responses
from aropd_mcore.types import Rollout


class NativeEngine(ModelEngine):
    """ModelEngine by the model's own forward and a KV cache of whole rows.

    Every rank of a model replica calls `generate` with the same arguments and returns the same
    list. Replicas are independent: each may have other prompts, and other numbers of them. Tokens
    depend on weights, prompt and seed; tensor and pipeline sizes, batch_size and the other prompts
    change the logits by rounding only.

    Where kv_cache_tokens is given, fewer rows are decoded together where prompts are long.
    """

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[Rollout]:
        """As RolloutEngine.generate.

        Raises:
            ValueError: seeds and prompts differ in number; a prompt is empty, has an id that the
                model has not, or leaves no room for max_response_tokens, in the model's positions
                or in kv_cache_tokens.
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
        """Rows leave as soon as they are done, and waiting prompts take their places."""
        limit = sampling.max_response_tokens
        max_length = max(map(len, prompts), default=1) + limit
        num_rows = max(1, min(self._rows_in_cache(max_length), len(prompts)))
        made = Responses(seeds, limit, self._eos_token_ids)
        # Of similar length one after another, and the longest first: they attend together.
        waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        running: list[int] = []
        with decoding(
            self.model, self.runtime, num_rows=num_rows, max_length=max_length
        ) as decoder:
            while self._anywhere(bool(running or waiting)):
                free = num_rows - len(running)
                new, waiting = waiting[:free], waiting[free:]
                if not running and not new:  # for the experts here: other replicas go on
                    decoder.forward(made.next_tokens([]), [(0,)])
                    decoder.drop({0})
                    continue
                logits_BV = decoder.forward(
                    made.next_tokens(running), [prompts[index] for index in new]
                )
                running += new
                beat()
                tokens_B = made.draw(running, logits_BV, sampling)
                if self._should_stop():
                    tokens_B.fill_(STOPPED)
                share(tokens_B, self.runtime)
                if tokens_B[0] == STOPPED:  # so says the rank that samples
                    waiting, done = [], set(range(len(running)))
                else:
                    done = made.add(running, tokens_B)
                if done:
                    running = [running[row] for row in decoder.drop(done)]
            share(made.logprobs_RT, self.runtime)
        return made.rollouts(self.weight_version)

    def _rows_in_cache(self, max_length: int) -> int:
        if self.kv_cache_tokens is None:
            return self.batch_size
        if max_length > self.kv_cache_tokens:
            raise ValueError(
                f"a prompt with its response takes up to {max_length} tokens, and "
                f"rollout.kv_cache_tokens {self.kv_cache_tokens} holds fewer"
            )
        return min(self.batch_size, self.kv_cache_tokens // max_length)

    def _anywhere(self, here: bool) -> bool:
        """`here` on any of the replicas that have to decode in step: those that share experts,
        whose every forward is a collective."""
        if not self.runtime.shares_experts:
            return here
        found = torch.tensor(int(here), device=self.runtime.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.runtime.dp_cp_group)
        return bool(found)
