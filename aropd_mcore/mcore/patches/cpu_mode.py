"""CPU mode: megatron-core without a GPU, over gloo.

Megatron-Core uses CUDA in places where any device would work. Each patch below names the upstream
lines that need it (megatron-core 0.16.1, under megatron/core/; 0.19 has the same lines). With a GPU
nothing is patched. CPU mode can test parallel logic, checkpoints and the numerics of the local
layer spec. It cannot test NCCL, Transformer Engine or fused kernels.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch


def install() -> None:
    """Patch torch on a machine without a GPU. Call this before megatron.core is imported."""
    if torch.cuda.is_available():
        return
    _tensors()
    _streams()
    _random_state()
    _experts()
    _uneven_gather()


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _tensors() -> None:
    # pipeline_parallel/p2p_communication.py:190 device=torch.cuda.current_device()
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    # pipeline_parallel/schedules.py:596 torch.zeros([], device="cuda")
    # optimizer/clip_grads.py:90         torch.tensor([...], device="cuda")
    # transformer/utils.py:35            torch.ones(sq, sq, device="cuda")
    # dist_checkpointing/exchange_utils.py:104, 326  torch.empty_like / torch.empty on "cuda"
    with torch.device("cpu"):
        # torch.device contexts recognize factory functions by identity, from a set that is created
        # at first use (torch/utils/_device.py). Create it here, from the original functions.
        # Otherwise `with torch.device("meta")` does not affect the original functions, and
        # transformers' from_pretrained leaves rotary tables uninitialized.
        torch.empty(0)
    for name in ("zeros", "ones", "empty", "tensor", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # models/common/language_module/language_module.py:244 weight.data.cuda()
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    # optimizer/distrib_optimizer.py:361 model_param.type() in ["torch.cuda.BFloat16Tensor", ...]
    torch.Tensor.type = _type_as_on_cuda(torch.Tensor.type)  # type: ignore[method-assign]


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        # models/common/embeddings/rope_utils.py:62 torch.tensor(..., pin_memory=True).cuda(...)
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def _type_as_on_cuda(plain_type: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain_type)
    def type_as_on_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return plain_type(self).replace("torch.", "torch.cuda.")
        return plain_type(self, dtype, *args, **kwargs)

    return type_as_on_cuda


class _Stream:
    """Stand-in for torch.cuda.Stream and .Event. On a CPU, work is executed in order."""

    def __init__(self, *_args: Any, **_kwargs: Any):
        pass

    record = wait = wait_event = wait_stream = synchronize = _nothing

    def record_event(self, *_args: Any) -> "_Stream":
        return self


def _streams() -> None:
    # pipeline_parallel/p2p_communication.py:398 torch.cuda.synchronize() after batched p2p
    torch.cuda.synchronize = _nothing
    # distributed/distributed_data_parallel.py:230 torch.cuda.Stream(...)
    # distributed/param_and_grad_buffer.py:422     torch.cuda.default_stream()
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = torch.cuda.default_stream = _Stream  # type: ignore[assignment]


def _random_state() -> None:
    # tensor_parallel/random.py CudaRNGStatesTracker uses the CPU's generator instead.
    torch.cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    import megatron.core.tensor_parallel.random as upstream

    upstream._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    upstream._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    # fork() warns "CPU RNG state changed within GPU RNG context", which is intended here.
    logging.getLogger(upstream.__name__).setLevel(logging.ERROR)


def _experts() -> None:
    # transformer/moe/token_dispatcher.py:879 maybe_move_tensor_to_cpu(splits, as_numpy=True), for
    # all_to_all. It returns a CPU tensor unchanged, but all_to_all needs numpy.
    from megatron.core.transformer.moe import token_dispatcher

    def move_to_cpu(value: Any, as_numpy: bool = False, **_kwargs: Any) -> Any:
        return value.numpy() if as_numpy and torch.is_tensor(value) else value

    token_dispatcher.maybe_move_tensor_to_cpu = move_to_cpu


def _uneven_gather() -> None:
    # tensor_parallel/mappings.py:150 torch.distributed.all_gather of tensors of different lengths:
    # tokens for an expert whose matrices are sharded. gloo cannot gather different lengths.
    from megatron.core.tensor_parallel import mappings

    plain_gather = mappings._gather_along_first_dim

    def gather(local: torch.Tensor, group: Any, sizes: Any = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return plain_gather(local, group, sizes, *args)
        padded = local.new_zeros(max(sizes), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    mappings._gather_along_first_dim = gather
