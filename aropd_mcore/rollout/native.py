"""The native engine: the training model samples with a KV cache, in every layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from aropd_mcore.config import SamplingConfig
from aropd_mcore.mcore.cached_attention import KVCache
from aropd_mcore.mcore.decode import decoding
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.plan.setup import KEYS_PER_BUCKET
from aropd_mcore.rollout.buffers import Responses, RowState
from aropd_mcore.rollout.decode_batch import DecodeBatch
from aropd_mcore.rollout.engine import Pending, Progress, PromptBatch, ignore, never
from aropd_mcore.rollout.graphs import StepGraphs, can_capture
from aropd_mcore.rollout.schedule import Schedule
from aropd_mcore.types import Rollout


class NativeEngine:
    """RolloutEngine that samples with the training model, without a copy of its weights.

    Every rank of a model replica submits the same batch and gets the same rollouts. Replicas are
    independent and may have different prompts and numbers of prompts. Tokens depend on weights,
    prompt and seed. Tensor and pipeline sizes, batch_size and the other prompts of the batch change
    the logits by rounding only.

    `Pending.result` samples the batch, so it must be called before the next update. The KV cache
    stays allocated between batches.
    """

    def __init__(
        self,
        model: StageModel,
        runtime: Runtime,
        *,
        eos_token_ids: Sequence[int],
        batch_size: int,
        kv_cache_tokens: int | None = None,
        cuda_graphs: bool = False,
        cache: KVCache | None = None,
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
            cuda_graphs: replay decode steps as CUDA graphs where graphs.can_capture permits it.
            cache: memory of the KV cache, if other engines use it, too. None: the engine's own.
            should_stop: called every decode_batch.TOKENS_PER_READ tokens. If it returns
                True, the responses so far are returned at once, and the caller must discard them.
        """
        self.model = model
        self.runtime = runtime
        self.batch_size = batch_size
        self.kv_cache_tokens = kv_cache_tokens
        self.weight_version = 0
        self._should_stop = should_stop
        self._eos_token_ids = tuple(eos_token_ids)
        self._is_end_V = torch.zeros(model.vocab_size, dtype=torch.bool)
        self._is_end_V[[token for token in eos_token_ids if 0 <= token < model.vocab_size]] = True
        self._is_end_V = self._is_end_V.to(runtime.device)
        self._cache = cache or KVCache()
        self._rows = RowState(runtime.device)
        self._graphs = StepGraphs() if cuda_graphs and can_capture(model, runtime) else None

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
        limit = sampling.max_response_tokens
        max_length = max(map(len, prompts), default=1) + limit
        num_rows = max(1, min(self._rows_in_cache(max_length), len(prompts)))
        self._rows.clear(num_rows, limit)
        with decoding(
            self.model,
            self.runtime,
            num_rows=num_rows,
            max_length=self._row_length(max_length, num_rows),
            cache=self._cache,
        ) as decoder:
            batch = DecodeBatch(
                decoder,
                self._rows,
                Schedule(prompts, num_rows, limit),
                Responses(seeds, limit, self.runtime.device),
                prompts,
                sampling,
                is_end_V=self._is_end_V,
                graphs=self._graphs,
                should_stop=self._should_stop,
            )
            return batch.sample(self._eos_token_ids, self.weight_version, on_progress)

    def _rows_in_cache(self, max_length: int) -> int:
        if self.kv_cache_tokens is None:
            return self.batch_size
        if max_length > self.kv_cache_tokens:
            raise ValueError(
                f"rollout.kv_cache_tokens {self.kv_cache_tokens}: expected at least {max_length}, "
                "the tokens of the longest prompt with its response"
            )
        return min(self.batch_size, self.kv_cache_tokens // max_length)

    def _row_length(self, max_length: int, num_rows: int) -> int:
        """Return the cached tokens of a row: few different lengths, so that memory is reused."""
        length = -(-max_length // KEYS_PER_BUCKET) * KEYS_PER_BUCKET
        if self.kv_cache_tokens is None:
            return length
        return min(length, self.kv_cache_tokens // num_rows)


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
