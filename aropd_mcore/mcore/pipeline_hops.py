"""Sends and receives of hidden states between pipeline stages, without an exchange of shapes."""

from collections.abc import Sequence
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch import Tensor
from torch.distributed import ProcessGroup

Shape = tuple[int, ...]


class KnownShapes(P2PCommunicator):
    """P2PCommunicator of one run of a schedule, in which every stage knows all microbatches.

    Microbatches differ in length. Megatron therefore sends the shape before each tensor, and the
    host waits for it. Here a stage takes the shape of each receive from its own list.
    """

    def __init__(self, group: ProcessGroup, config: Any, shapes: Sequence[Shape]):
        """
        Args:
            group: the pipeline stages.
            config: the model's TransformerConfig, with variable_seq_lengths.
            shapes: shape of the tensor between stages, for each microbatch in order.
        """
        super().__init__(group, config)
        num_chunks = config.virtual_pipeline_model_parallel_size or 1
        table = get_schedule_table(len(shapes), num_chunks, group.size())
        # Gradients are received in the order of the forward passes, with the chunks reversed. The
        # first chunk of each direction receives nothing on its end of the pipeline.
        is_first, is_last = group.rank() == 0, group.rank() == group.size() - 1
        self._hidden = iter([shapes[m] for m, chunk in table if chunk or not is_first])
        self._gradients = iter([shapes[m] for m, chunk in table if chunk or not is_last])

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> Any:
        """Return the shapes of the next tensors from the previous and from the next stage, or None.

        Collectives: none, unlike Megatron's method of this name.
        """
        return (
            next(self._hidden) if recv_prev else None,
            next(self._gradients) if recv_next else None,
        )
