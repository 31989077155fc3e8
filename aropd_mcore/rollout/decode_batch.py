"""The decode loop of a batch.

Between two reads by the host, all rows decode the same number of tokens. These steps work only on
device tensors of fixed shapes, so the host may run ahead of the device, and a CUDA graph can replay
them. At a read, finished responses leave their rows, and waiting ones take their places.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.config import SamplingConfig
from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.decode import Decoder, share
from aropd_mcore.plan.setup import KEYS_PER_BUCKET
from aropd_mcore.rollout.buffers import Responses, RowState
from aropd_mcore.rollout.engine import Progress
from aropd_mcore.rollout.graphs import StepGraphs
from aropd_mcore.rollout.sampling import sample
from aropd_mcore.rollout.schedule import Fill, Schedule
from aropd_mcore.rollout.turns import Turn, turns
from aropd_mcore.types import Rollout

TOKENS_PER_READ = 16
"""Number of tokens of every row between two reads by the host. A response that ends in between
leaves its row at the next read."""


class DecodeBatch:
    """Responses to a batch of prompts, sampled by continuous batching."""

    def __init__(
        self,
        decoder: Decoder,
        rows: RowState,
        schedule: Schedule,
        responses: Responses,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        is_end_V: Tensor,
        graphs: StepGraphs | None,
        should_stop: Callable[[], bool],
    ):
        """
        Args:
            rows: cleared, with room for the rows of the schedule.
            schedule: of these prompts.
            is_end_V: bool, whether each token of the vocabulary ends a response.
            graphs: graphs that replay the steps. None: every step launches its kernels.
            should_stop: called at every read; the sampling rank's result counts.
        """
        self._decoder = decoder
        self._runtime = decoder.runtime
        self._rows = rows
        self._schedule = schedule
        self._responses = responses
        self._prompts = prompts
        self._sampling = sampling
        self._is_end_V = is_end_V
        self._graphs = graphs
        self._should_stop = should_stop
        if graphs:
            graphs.check([*decoder.tensors, *rows.tensors, is_end_V])

    def sample(
        self, eos_token_ids: Sequence[int], weight_version: int, on_progress: Progress
    ) -> list[Rollout]:
        """Sample all responses.

        Raises:
            FloatingPointError: the model's logits are not finite.
        Collectives: as native._NativePending.result.
        """
        schedule = self._schedule
        while True:
            fill = schedule.fill()
            num_tokens = min(schedule.num_missing, TOKENS_PER_READ)
            # Replicas that share experts decode in step: their forwards are collectives.
            has_prefill, num_tokens, spare_rows = self._largest(
                [bool(fill.prefills), num_tokens, -schedule.num_rows]
            )
            if not num_tokens:
                break
            self._begin(fill, bool(has_prefill))
            self._decode(num_tokens, min(self._runtime.pp_size, -spare_rows))
            if self._keep_finished():
                on_progress(len(self._prompts) - schedule.num_unfinished, len(self._prompts))
            if moves := schedule.shrink():
                sources, targets = list(moves), list(moves.values())
                self._decoder.copy(sources, targets, schedule.num_keys)
                self._rows.move(sources, targets)
        share(self._responses.logprobs_RT, self._runtime)
        return self._responses.rollouts(eos_token_ids, weight_version)

    def _begin(self, fill: Fill, has_prefill: bool) -> None:
        """Start the responses of a fill.

        Args:
            has_prefill: whether this or another replica in step with it passes prompts.
        """
        if fill.prefills:
            prompts = [self._prompts[response][:-1] for response in fill.prefills.values()]
            self._decoder.prefill(list(fill.prefills), prompts)
        elif has_prefill:
            # A forward for the experts of this rank. It writes the keys of the next step.
            rows, every = self._rows, slice(0, self._schedule.num_rows)
            self._decoder.cache_next(
                every, rows.last_B[every], rows.positions_B[every], self._schedule.num_keys
            )
        if fill.copies:
            num_keys = max(len(self._prompts[fill.started[row]]) for row in fill.copies)
            self._decoder.copy(list(fill.copies.values()), list(fill.copies), num_keys)
        if fill.started:
            responses = list(fill.started.values())
            prompts = [self._prompts[response] for response in responses]
            uniforms_BT = self._responses.uniforms_RT[responses]
            self._rows.start(list(fill.started), prompts, uniforms_BT)

    def _decode(self, num_tokens: int, num_groups: int) -> None:
        """Decode num_tokens tokens of each row, in groups that take turns on the stages."""
        decoder, runtime, sampling = self._decoder, self._runtime, self._sampling
        num_rows, first_keys = self._schedule.num_rows, self._schedule.num_keys
        bounds = [num_rows * group // num_groups for group in range(num_groups + 1)]
        groups = [slice(*bounds[group : group + 2]) for group in range(num_groups)]
        settings = sampling.temperature, sampling.top_p, sampling.top_k
        for turn in turns(
            runtime.pp_rank,
            runtime.pp_size,
            len(decoder.chunks),
            num_tokens=num_tokens,
            num_groups=num_groups,
        ):
            beat()
            keys = first_keys + (turn.work.token if turn.work else 0)
            num_keys = -(-keys // KEYS_PER_BUCKET) * KEYS_PER_BUCKET
            step = partial(self._take, turn, groups, num_keys)
            if self._graphs is None:
                step()
            else:  # one stage, so all turns do the same
                self._graphs.run((num_rows, num_keys, settings), step)

    def _take(self, turn: Turn, groups: Sequence[slice], num_keys: int) -> None:
        """Take a turn: pass a group of rows through layers, and add the tokens of one to the rows.

        Hidden states are sent to the next stage at the beginning of the next turn. So the sends,
        receives and broadcasts of two stages have the same order on both.
        """
        rows, logits_BV = self._rows, None
        if turn.work is None:
            self._decoder.send()
        else:
            group = groups[turn.work.group]
            logits_BV = self._decoder.next_logits(
                turn.work.chunk, group, rows.last_B[group], rows.positions_B[group], num_keys
            )
        if turn.ended:
            group = groups[turn.ended.group]
            if logits_BV is None:
                tokens_B = torch.zeros_like(rows.last_B[group])
                logprobs_B = torch.zeros_like(rows.logprobs_BT[group, 0])
            else:
                uniforms_B = rows.next_uniforms(group)
                tokens_B, logprobs_B = sample(logits_BV, uniforms_B, self._sampling)
            share(tokens_B, self._runtime)
            rows.append(group, tokens_B, logprobs_B, self._is_end_V)

    def _keep_finished(self) -> bool:
        """Read the state of the rows, keep the responses that have ended and free their rows.

        Returns:
            Whether a response has ended. If the sampling rank wants to stop, all end.
        """
        rows, schedule = self._rows, self._schedule
        first = slice(schedule.num_rows)
        is_stopped = torch.tensor([int(self._should_stop())], device=self._runtime.device)
        share(is_stopped, self._runtime)
        state = torch.cat([is_stopped, rows.counts_B[first], rows.is_done_B[first].long()])
        stopped, *counts_and_ends = state.tolist()
        counts = counts_and_ends[: schedule.num_rows]
        is_done = [bool(stopped or end) for end in counts_and_ends[schedule.num_rows :]]
        if stopped:
            schedule.stop()
        ended = schedule.finish(counts, is_done)
        if ended:
            lengths = [counts[row] for row in ended]
            self._responses.keep(rows, list(ended), list(ended.values()), lengths)
        return bool(ended)

    def _largest(self, values: list[int]) -> list[int]:
        """Return the maximum of each value over the replicas that decode in step with this one.

        Collectives: an all-reduce over dp_cp_group if replicas share experts.
        """
        if not self._runtime.shares_experts:
            return values
        largest = torch.tensor(values, device=self._runtime.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._runtime.dp_cp_group)
        return largest.tolist()
