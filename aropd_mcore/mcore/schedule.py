"""A thin wrapper around Megatron's pipeline schedules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.pipeline_hops import KnownShapes
from aropd_mcore.types import ViewBatch

_GROUPS = ["tp", "cp", "pp", "embd", "pos_embd", "dp", "dp_cp", "tp_dp_cp"]
"""Groups that Megatron's schedules read if they get a communicator."""


def run_schedule(
    chunks: Sequence[Any],
    inputs: Sequence[Any],
    view_of: Callable[[Any], ViewBatch],
    on_last_stage: Callable[[Tensor, Any], Any],
    *,
    forward_only: bool,
    gather_over: dist.ProcessGroup | None = None,
) -> list[Any]:
    """Run microbatches through the pipeline: 1F1B with backward, or forward only.

    Args:
        chunks: this stage's model chunks, each wrapped in DDP if there is a backward. With several
            chunks the schedule is interleaved.
        inputs: one item per microbatch, the same on every stage.
        view_of: returns the sequences of an item that the model reads.
        on_last_stage: called as (hidden_TH, item) on the last stage, with the final hidden states
            at the view's loss positions, [T, H]. With a backward it returns (loss, report). The
            loss is a scalar that is summed over microbatches.
        forward_only: run no backward. on_last_stage may then return any value.
        gather_over: the context group, if the view's loss positions index the hidden states of all
            its ranks. Forward only.
    Returns:
        On the last stage, the reports of on_last_stage (forward only: its results), in the order of
        the inputs. On other stages [].
    Collectives: sends and receives between stages. Under sequence parallelism an all-gather of the
        final hidden states over tp_group, and an all-gather over gather_over. With a backward also
        Megatron's gradient reductions.
    """

    def forward_step(iterator: Any, stage: Any) -> tuple[Tensor, Callable[..., Any]]:
        beat()
        item = next(iterator)
        view = view_of(item)
        # Under a causal mask real tokens never see padding on the right, so no mask is needed.
        # Positions count from the start of each row or packed sample, as in rollouts.
        position_ids = torch.arange(view.tokens_BS.size(1), device=view.tokens_BS.device)
        hidden_SBH = stage(
            view.tokens_BS,
            position_ids.expand_as(view.tokens_BS),
            None,
            packed_seq_params=_packed_seq_params(view),
            padding_mask=view.padding_BS,
        )

        def finish(output_SBH: Tensor, non_loss_data: bool = False) -> Any:
            if stage.config.sequence_parallel:
                # Every tensor rank gets the whole gradient from the loss and keeps its own tokens'
                # part.
                output_SBH = gather_from_sequence_parallel_region(
                    output_SBH, tensor_parallel_output_grad=False
                )
            if gather_over is not None and gather_over.size() > 1:
                output_SBH = gather_from_sequence_parallel_region(output_SBH, group=gather_over)
            hidden_TH = output_SBH.flatten(0, 1).index_select(0, view.hidden_index_T)
            result = on_last_stage(hidden_TH, item)
            if non_loss_data:
                return result
            loss, report = result
            # The token count is for Megatron's normalization, which is disabled.
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), report

        return hidden_SBH, finish

    config, pipeline = chunks[0].config, {}
    if config.pipeline_model_parallel_size > 1:
        groups = ProcessGroupCollection.use_mpu_process_groups(_GROUPS)
        shapes = [_stage_output(view_of(item), config) for item in inputs]
        hops = KnownShapes(groups.pp, config, shapes)
        pipeline = {"p2p_communicator": hops, "pg_collection": groups}
    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            # Each chunk iterates over all items.
            data_iterator=[iter(inputs) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(inputs),
            # Megatron requires these two sizes but does not use them with variable_seq_lengths.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            **pipeline,
        )


def _stage_output(view: ViewBatch, config: TransformerConfig) -> tuple[int, int, int]:
    """Return the shape of a stage's output, [S, B, H], or [S / tp, B, H] with sequence parallelism.

    Only shapes are read, so the host does not wait for the device.
    """
    num_rows, length = view.tokens_BS.shape
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return length // ranks, num_rows, config.hidden_size


def _packed_seq_params(view: ViewBatch) -> PackedSeqParams | None:
    if view.bounds is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=view.bounds,
        cu_seqlens_kv=view.bounds,
        max_seqlen_q=view.longest,
        max_seqlen_kv=view.longest,
    )
