"""The engine `megatron`: the training model samples in Megatron's own dynamic inference engine."""

from collections.abc import Sequence, Set
from contextlib import suppress

from torch import Tensor

from aropd_mcore.config import SamplingConfig
from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.decode import share
from aropd_mcore.mcore.dynamic import PAGE_TOKENS, decode_dynamically
from aropd_mcore.rollout.engine import check_prompts
from aropd_mcore.rollout.responses import STOPPED, ModelEngine, Responses
from aropd_mcore.types import Rollout


class _Stopped(Exception):
    """No more tokens are wanted; raised on every rank of the replica alike."""


class MegatronEngine(ModelEngine):
    """ModelEngine by Megatron's dynamic engine: on GPUs, by flash-attn over a paged KV cache. Not
    interleaved, nor context- or expert-parallel, nor in fp8 (config.check_engine_layout).

    Every rank of a model replica calls `generate` with the same arguments and returns the same
    list. Tokens are drawn as NativeEngine draws them, so that weights, prompt and seed give the
    same response in either, up to rounding in the logits.

    kv_cache_tokens holds whole pages of PAGE_TOKENS: rows wait, or are computed again, where they
    are full.
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
        Collectives: those of mcore.dynamic.decode_dynamically, and a broadcast of tokens over
            tp_group and pp_group for every token; none over dp_group.
        """
        check_prompts(
            prompts,
            seeds,
            sampling,
            vocab_size=self.model.vocab_size,
            max_sequence_length=self.model.max_sequence_length,
        )
        if not prompts:
            return []
        limit = sampling.max_response_tokens
        made = Responses(seeds, limit, self._eos_token_ids)

        def draw(running: list[int], logits_BV: Tensor | None) -> tuple[Tensor, Set[int]]:
            beat()
            tokens_B = made.draw(running, logits_BV, sampling)
            if self._should_stop():
                tokens_B.fill_(STOPPED)
            share(tokens_B, self.runtime)
            if tokens_B[0] == STOPPED:  # so says the rank that samples
                raise _Stopped
            return tokens_B, {running[place] for place in made.add(running, tokens_B)}

        batch_size = min(self.batch_size, len(prompts))
        with suppress(_Stopped):
            decode_dynamically(
                self.model,
                self.runtime,
                prompts,
                draw,
                max_response_tokens=limit,
                batch_size=batch_size,
                num_pages=self._num_pages(max(map(len, prompts)) + limit, batch_size),
            )
        share(made.logprobs_RT, self.runtime)
        return made.rollouts(self.weight_version)

    def _num_pages(self, max_length: int, batch_size: int) -> int:
        of_a_row = -(-max_length // PAGE_TOKENS)
        if self.kv_cache_tokens is None:
            return of_a_row * batch_size
        num_pages = self.kv_cache_tokens // PAGE_TOKENS
        if num_pages < of_a_row:
            raise ValueError(
                f"a prompt with its response takes up to {max_length} tokens, {of_a_row} pages of "
                f"{PAGE_TOKENS}, and rollout.kv_cache_tokens {self.kv_cache_tokens} holds "
                f"{num_pages}"
            )
        return min(num_pages, of_a_row * batch_size)
