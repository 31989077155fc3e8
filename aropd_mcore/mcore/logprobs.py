"""Log-probs of given tokens, computed by the forward that training uses."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.data.collate import collate
from aropd_mcore.data.context_parallel import share_of_rank
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.schedule import run_schedule
from aropd_mcore.numerics import fused_linear_cross_entropy
from aropd_mcore.types import Microbatch, Sample


def sequence_logprobs(model: StageModel, runtime: Runtime, ids: Sequence[int]) -> Tensor:
    """Return log softmax(logits)[token] of every token of a sequence but the first.

    Args:
        model: this rank's shard, not wrapped in DDP.
        ids: two or more token ids, the same on every rank.
    Returns:
        CPU fp32 [len(ids) - 1], in nats, the same on every rank of a model replica. Without
        gradient.
    Collectives: those of the schedule and of the loss, an all-reduce over cp_group and a broadcast
        over pp_group. If replicas share experts, every rank must call it.
    """
    sample = Sample(tuple(ids[:1]), (), (), tuple(ids[1:]), 1.0)
    (microbatch,) = collate(
        [sample],
        [[0]],
        pad_token_id=ids[0],
        length_multiple=runtime.length_multiple,
        views=(),
    )
    microbatch = share_of_rank(microbatch, runtime.cp_size, runtime.cp_rank).to(runtime.device)

    def on_last_stage(hidden_TH: Tensor, item: Microbatch) -> Tensor:
        _, metrics = fused_linear_cross_entropy(
            hidden_TH,
            model.head_weight(),
            item.response_ids_T,
            item.token_weights_T,
            vocab_size=model.vocab_size,
            tp_group=runtime.tp_group if runtime.tp_size > 1 else None,
        )
        return metrics["logprob_student"]

    was_training = model.training
    model.eval()
    # The interleaved schedule needs as many microbatches as there are stages.
    count = runtime.pp_size if runtime.vp_size > 1 else 1
    results = run_schedule(
        list(model),
        [microbatch] * count,
        view_of=lambda item: item.student,
        on_last_stage=on_last_stage,
        forward_only=True,
    )
    model.train(was_training)
    logprobs_T = torch.zeros(len(ids) - 1, device=runtime.device)
    if runtime.is_last_stage:
        logprobs_T[microbatch.offset_T] = results[0].float()
        dist.all_reduce(logprobs_T, group=runtime.cp_group)
    dist.broadcast(logprobs_T, runtime.last_stage_rank, group=runtime.pp_group)
    return logprobs_T.cpu()
