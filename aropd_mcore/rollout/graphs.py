"""CUDA graphs of decode steps."""

import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime

Step = Callable[[], None]
"""A step that reads and writes only tensors, which keep their addresses."""


def can_capture(model: StageModel, runtime: Runtime) -> bool:
    """Return whether a CUDA graph can capture the model's forward of one token per row.

    Not captured are collectives between tensor ranks and stages, experts, which read the number of
    their tokens on the host, and FP8, which changes its scales in Python.
    """
    config = model.config
    is_alone = runtime.tp_size * runtime.pp_size == 1
    is_plain = config.num_moe_experts is None and config.fp8 is None
    return runtime.device.type == "cuda" and is_alone and is_plain


class StepGraphs:
    """CUDA graphs of decode steps, captured at their second use.

    The first use runs the step plainly, so that libraries allocate their workspaces outside of the
    graph. All graphs share one memory pool. This is safe because every result of a step is in
    tensors that were allocated before.
    """

    def __init__(self) -> None:
        self._replays: dict[Hashable, Step] = {}
        self._steps_run: set[Hashable] = set()
        self._addresses: tuple[tuple[int, torch.Size], ...] = ()
        self._pool: Any = None
        self._can_capture = True

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Drop all graphs if a tensor that steps use has another address or shape than before."""
        addresses = tuple((tensor.data_ptr(), tensor.shape) for tensor in tensors)
        if addresses != self._addresses:
            self._replays, self._steps_run, self._addresses = {}, set(), addresses

    def run(self, key: Hashable, step: Step) -> None:
        """Run a step, by its graph if there is one.

        If the capture fails, one line on stderr reports it, and this and all later steps run
        plainly.

        Args:
            key: equal for steps that launch the same kernels on the same tensors.
        """
        if key in self._steps_run and key not in self._replays and self._can_capture:
            try:
                self._replays[key] = self._capture(step)
            except RuntimeError as error:
                self._can_capture, self._replays = False, {}
                print(
                    f"rollouts run without CUDA graphs, which is slower: {error}; set "
                    "rollout.cuda_graphs to false to skip the attempt",
                    file=sys.stderr,
                )
        self._steps_run.add(key)
        self._replays.get(key, step)()

    def _capture(self, step: Step) -> Step:
        """Capture the kernels of a step, without running them."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # `thread_local`: other threads, such as NCCL's watchdog, may call CUDA meanwhile. The outer
        # context restores the stream even if the capture fails.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            step()
        return graph.replay
