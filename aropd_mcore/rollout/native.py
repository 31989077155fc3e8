"""The native engine: the training model samples with a KV cache, in every layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from aropd_mcore.config import SamplingConfig
from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.decode import decoding, share
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.rollout.buffers import DecodeBuffers
from aropd_mcore.rollout.engine import Pending, Progress, PromptBatch, ignore, never
from aropd_mcore.types import Rollout

_STOPPED = -1
"""Token value that means: stop sampling. All ranks of a replica receive it."""


class NativeEngine:
    """RolloutEngine that samples with the training model, without a copy of its weights.

    Every rank of a model replica submits the same batch and gets the same rollouts. Replicas are
    independent and may have different prompts and numbers of prompts. Tokens depend on weights,
    prompt and seed. Tensor and pipeline sizes, batch_size and the other prompts of the batch change
    the logits by rounding only.

    `Pending.result` samples the batch, so it must be called before the next update.
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
        """
        Args:
            model: this rank's shard, without DDP around it. Every result reads its current weights.
            eos_token_ids: any of them ends a response.
            batch_size: largest number of rows decoded together.
            kv_cache_tokens: capacity of each model replica's KV cache. If it is too small for
                batch_size rows of maximum length, fewer rows are decoded together. None: room for
                batch_size rows.
            should_stop: called once per token on the sampling rank. If it returns True, the
                responses so far are returned at once, and the caller must discard them.
        """
        self.model = model
        self.runtime = runtime
        self.batch_size = batch_size
        self.kv_cache_tokens = kv_cache_tokens
        self.weight_version = 0
        self._should_stop = should_stop
        self._eos_token_ids = torch.tensor(
            list(eos_token_ids), dtype=torch.int64, device=runtime.device
        )

    def submit(self, batch: PromptBatch) -> Pending:
        """As RolloutEngine.submit. Collectives: none."""
        return _NativePending(self, batch, self.weight_version)

    def update_weights(self, version: int) -> None:
        """As RolloutEngine.update_weights; nothing is copied. Collectives: none."""
        self.weight_version = version

    def close(self) -> None:
        """As RolloutEngine.close; the engine has started nothing."""

    def _sample(self, batch: PromptBatch, on_progress: Progress) -> list[Rollout]:
        batch.check(
            vocab_size=self.model.vocab_size, max_sequence_length=self.model.max_sequence_length
        )
        group = self.runtime.cp_group
        own = slice(group.rank(), None, group.size())
        rollouts = self._sample_share(
            batch.prompts[own], batch.seeds[own], batch.sampling, on_progress
        )
        if group.size() == 1:
            return rollouts
        shares: list[list[Rollout]] = [[] for _ in range(group.size())]
        dist.all_gather_object(shares, rollouts, group=self.runtime.cp_objects_group)
        return [shares[i % group.size()][i // group.size()] for i in range(len(batch.prompts))]

    def _sample_share(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        on_progress: Progress,
    ) -> list[Rollout]:
        """Sample with continuous batching: a waiting prompt replaces each finished row."""
        limit = sampling.max_response_tokens
        max_length = max(map(len, prompts), default=1) + limit
        num_rows = max(1, min(self._rows_in_cache(max_length), len(prompts)))
        buffers = DecodeBuffers(seeds, limit, self._eos_token_ids)
        # Longest first, so that rows decoded together have similar lengths.
        waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        running: list[int] = []
        with decoding(
            self.model, self.runtime, num_rows=num_rows, max_length=max_length
        ) as decoder:
            while self._on_any_replica(bool(running or waiting)):
                free = num_rows - len(running)
                new, waiting = waiting[:free], waiting[free:]
                if not running and not new:  # other replicas still need the experts of this rank
                    decoder.forward(buffers.next_tokens([]), [(0,)])
                    decoder.drop({0})
                    continue
                logits_BV = decoder.forward(
                    buffers.next_tokens(running), [prompts[index] for index in new]
                )
                running += new
                beat()
                tokens_B = buffers.draw(running, logits_BV, sampling)
                if self._should_stop():
                    tokens_B.fill_(_STOPPED)
                share(tokens_B, self.runtime)
                if tokens_B[0] == _STOPPED:  # the sampling rank's decision
                    waiting, done = [], set(range(len(running)))
                else:
                    done = buffers.add(running, tokens_B)
                if done:
                    running = [running[row] for row in decoder.drop(done)]
                    on_progress(len(prompts) - len(running) - len(waiting), len(prompts))
            share(buffers.logprobs_RT, self.runtime)
        return buffers.rollouts(self.weight_version)

    def _rows_in_cache(self, max_length: int) -> int:
        if self.kv_cache_tokens is None:
            return self.batch_size
        if max_length > self.kv_cache_tokens:
            raise ValueError(
                f"rollout.kv_cache_tokens {self.kv_cache_tokens}: expected at least {max_length}, "
                "the tokens of the longest prompt with its response"
            )
        return min(self.batch_size, self.kv_cache_tokens // max_length)

    def _on_any_replica(self, is_here: bool) -> bool:
        """Return whether `is_here` holds on any replica that must decode in step with this one.

        Replicas that share experts decode in step, since each of their forwards is a collective.
        """
        if not self.runtime.shares_experts:
            return is_here
        is_anywhere = torch.tensor(int(is_here), device=self.runtime.device)
        dist.all_reduce(is_anywhere, dist.ReduceOp.MAX, group=self.runtime.dp_cp_group)
        return bool(is_anywhere)


@dataclass(frozen=True)
class _NativePending:
    """Pending that samples when `result` is called."""

    engine: NativeEngine
    batch: PromptBatch
    weight_version: int

    def result(self, *, on_progress: Progress = ignore) -> list[Rollout]:
        """As Pending.result; progress counts this rank's share of the prompts.

        Raises:
            ValueError: also if a prompt leaves no room for a response in kv_cache_tokens.
            FloatingPointError: the model's logits are not finite.
        Collectives: per token, the model's over tp_group and pp_group, a gather of logits and a
            broadcast of tokens. One all-gather of the rollouts over cp_objects_group, whose
            ranks divide the prompts. None over dp_group, unless replicas share experts: then all of
            them must call it together, and they decode until the last one is done.
        """
        assert self.engine.weight_version == self.weight_version, "weights changed before sampling"
        return self.engine._sample(self.batch, on_progress)
