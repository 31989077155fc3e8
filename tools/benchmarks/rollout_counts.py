"""Count what a token of the native engine costs besides arithmetic, on a CPU.

    python tools/benchmarks/rollout_counts.py

A random model samples two batches of prompts of different lengths, with 4 responses per prompt. The
counts explain the time on a GPU: kernels wait for launches, for the host, and for kernels that are
prepared for new shapes. Rows of the report:

- attention shapes: different shapes and strides of query and keys with one token per row;
- host reads: `.item()`, `.tolist()`, `.cpu()` and `bool()` of a tensor;
- tensors from the host: `torch.tensor` of Python values;
- operators: calls of torch's operators that launch a kernel on a GPU;
- prompt tokens: tokens that pass the model in forwards of prompts;
- allocations of the cache: allocations of at least one layer's keys.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from rollout import MODEL, random_model, random_prompts, sample
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from aropd_mcore.config import SamplingConfig
from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.rollout.native import NativeEngine

PROMPTS, SAMPLES, NEW = 2, 4, 200
LENGTHS = 40, 44
"""Prompt tokens of each batch."""


@dataclass
class Counts:
    """Counts of one batch."""

    attention_shapes: set[Any] = field(default_factory=set)
    host_reads: int = 0
    tensors_from_host: int = 0
    operators: int = 0
    prompt_tokens: int = 0
    cache_allocations: int = 0


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counts, cache_size: int):
        super().__init__()
        self.counts = counts
        self.cache_size = cache_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.counts.host_reads += 1
        elif not func.is_view:
            self.counts.operators += 1
        is_new = name in ("empty", "zeros", "new_empty", "new_zeros", "full")
        self.counts.cache_allocations += is_new and result.numel() >= self.cache_size
        return result


def count(model: StageModel, runtime: Runtime) -> list[Counts]:
    """Return the counts of each batch. One engine samples all batches."""
    rows = PROMPTS * SAMPLES
    engine = NativeEngine(model, runtime, eos_token_ids=(), batch_size=rows)
    sampling = SamplingConfig(max_response_tokens=NEW)
    config = model.config
    per_position = rows * (config.num_query_groups or 0) * (config.kv_channels or 0)
    batches = []
    for length in LENGTHS:
        counts = Counts()
        prompts = random_prompts(PROMPTS, length, model.vocab_size)
        with counting(model, counts, rows, per_position * (length + NEW)):
            sample(engine, [prompt for prompt in prompts for _ in range(SAMPLES)], sampling)
        batches.append(counts)
    return batches


@contextmanager
def counting(model: StageModel, counts: Counts, rows: int, cache_size: int) -> Iterator[None]:
    def counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(counts, name, getattr(counts, name) + 1)
            return function(*args, **kwargs)

        return call

    usual_attention = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not kwargs.get("is_causal"):
            shapes = tuple((tuple(part.shape), part.stride()) for part in (query, key))
            counts.attention_shapes.add(shapes)
        return usual_attention(query, key, *args, **kwargs)

    def note_tokens(_layer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        num_tokens = kwargs["hidden_states"].size(0)
        counts.prompt_tokens += num_tokens if num_tokens > rows else 0

    hook = model.layers[0].register_forward_pre_hook(note_tokens, with_kwargs=True)
    with ExitStack() as stack:
        stack.callback(hook.remove)
        for name in ("tolist", "cpu", "numpy"):
            reader = counted(getattr(Tensor, name), "host_reads")
            stack.enter_context(patch.object(Tensor, name, reader))
        stack.enter_context(
            patch.object(torch, "tensor", counted(torch.tensor, "tensors_from_host"))
        )
        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", attention))
        stack.enter_context(_Operators(counts, cache_size))
        yield


def report(batches: list[Counts]) -> str:
    first, last = batches[0], batches[-1]
    rows = {
        f"attention shapes per {NEW} tokens": len(last.attention_shapes),
        "attention shapes of both batches": len(
            first.attention_shapes.union(*(counts.attention_shapes for counts in batches))
        ),
        f"host reads per {NEW} tokens": last.host_reads,
        f"tensors from the host per {NEW} tokens": last.tensors_from_host,
        "operators per token": round(last.operators / NEW),
        f"prompt tokens, {PROMPTS} prompts of {LENGTHS[-1]}": last.prompt_tokens,
        "allocations of the cache, both batches": sum(c.cache_allocations for c in batches),
    }
    return "\n".join(f"{name:44}{number:7}" for name, number in rows.items())


def main() -> int:
    runtime = mcore_runtime.start()
    print(report(count(random_model(MODEL, runtime), runtime)))
    mcore_runtime.stop(leave_job=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
