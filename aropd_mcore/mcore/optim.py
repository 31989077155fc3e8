"""Megatron's DDP and distributed optimizer, with clipping and the learning-rate schedule."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    ChainedOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from aropd_mcore.config import OptimizerConfig
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.patches import adam
from aropd_mcore.mcore.patches.bucket_padding import count_padding

adam.install()


@dataclass(frozen=True)
class UpdateResult:
    """Result of one optimizer update, the same on every rank."""

    grad_norm: float
    """Global L2 norm before clipping."""
    applied: bool
    """Whether the update was applied. If not, weights, optimizer state and schedule are unchanged.
    """
    lr: float
    """Learning rate of this update."""


class Optimizer:
    """AdamW over the student's shards, with its state sharded over the data-parallel ranks.

    Gradients arrive already normalized, because token weights contain the global divisor
    (numerics.reduce). Megatron sums them over microbatches and data-parallel ranks and does not
    divide.
    """

    def __init__(
        self,
        model: StageModel,
        config: OptimizerConfig,
        *,
        num_steps: int,
        overlap_grad_reduce: bool = False,
        shares_gpu: bool = False,
    ):
        """
        Args:
            model: the student; its parameters become views into DDP's buffers.
            num_steps: number of updates of the whole run, for the schedule.
            overlap_grad_reduce: reduce gradients during the last microbatch's backward.
            shares_gpu: another process uses the GPU between the steps. The gradients have no memory
                from `step` to the next `zero_grad`.
        """
        self.clip_grad = config.clip_grad
        self.ddp_chunks = [
            DistributedDataParallel(
                model.config,
                DistributedDataParallelConfig(
                    use_distributed_optimizer=True,
                    grad_reduce_in_fp32=True,
                    overlap_grad_reduce=overlap_grad_reduce,
                    average_in_collective=False,
                ),
                chunk,
            )
            for chunk in model
        ]
        for chunk in self.ddp_chunks:
            count_padding(chunk)
        for module in model.modules():
            is_trained = any(p.requires_grad for p in module.parameters(recurse=False))
            if is_trained and hasattr(module, "fuse_wgrad_accumulation"):
                # Transformer Engine's layers then add weight gradients to main_grad in the matrix
                # product itself. Otherwise each is rounded to bf16 first, and added afterwards.
                cast(Any, module).fuse_wgrad_accumulation = True
        bf16 = model.config.params_dtype == torch.bfloat16
        megatron_config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=True,
        )
        # An fp32 model's shards are views of its parameters. With a graph, their grad_fn would join
        # the optimizer, DDP and its groups in a cycle that Python cannot collect.
        with torch.no_grad():
            inner = get_megatron_optimizer(
                megatron_config,
                list(self.ddp_chunks),
                config_overrides=get_standard_config_overrides(megatron_config),
                use_gloo_process_groups=False,  # mcore.groups creates none
            )
        assert isinstance(inner, ChainedOptimizer)
        self.inner = inner
        for part in self.inner.chained_optimizers:
            # Create the state now, so that a checkpoint can be written before the first update.
            part.init_state_fn(part.optimizer, part.config)
        model.config.grad_scale_func = self.inner.scale_loss
        model.config.finalize_model_grads_func = _finalize_summed_grads
        if overlap_grad_reduce:
            model.config.no_sync_func = self._no_sync
        warmup_steps = min(int(config.warmup_ratio * num_steps), num_steps - 1)
        self.scheduler = OptimizerParamScheduler(
            self.inner,
            # With Megatron's default, a start at 0, the first step would have no effect.
            init_lr=config.lr / (warmup_steps + 1),
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=warmup_steps,
            lr_decay_steps=num_steps,
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=num_steps,
            wd_incr_style="constant",
            # A run that resumes with another num_steps or lr follows its new schedule.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self._shares_gpu = shares_gpu
        self._release_gradients()

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        """Context for the backward of all microbatches but the last: gradients are not reduced."""
        with ExitStack() as stack:
            for chunk in self.ddp_chunks:
                stack.enter_context(chunk.no_sync())
            yield

    def _release_gradients(self) -> None:
        if self._shares_gpu:
            on_gpu = torch.cuda.is_available()
            for chunk in self.ddp_chunks:
                chunk.offload_grad_buffers(synchronize=on_gpu, empty_cache=on_gpu)

    def zero_grad(self) -> None:
        for chunk in self.ddp_chunks:
            if self._shares_gpu:
                chunk.restore_grad_buffers(synchronize=False)
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    @torch.no_grad()
    def grad_norm(self) -> float:
        """Return the global L2 norm of the last forward-backward's gradients. Call `step` next.

        Collectives: one all-reduce over the model's ranks.
        """
        self.inner.prepare_grads()
        return float(self.inner.get_grad_norm())

    @torch.no_grad()
    def step(self, grad_norm: float, *, apply: bool) -> UpdateResult:
        """Clip and apply the gradients, and advance the schedule.

        Args:
            grad_norm: global norm of the gradients, from the method `grad_norm`.
            apply: the same on every rank. False leaves weights, optimizer state and schedule
                unchanged.
        Collectives: the all-gather of updated parameters over the data-parallel ranks.
        """
        lr = self.lr
        if apply:
            for part in self.inner.chained_optimizers:
                parameters: list[Tensor] = [*part.get_parameters()]
                if self.clip_grad > 0 and parameters:
                    clip_grad_by_total_norm_fp32(parameters, self.clip_grad, grad_norm)
            self.inner.step_with_ready_grads()
            self.scheduler.step(increment=1)
        self._release_gradients()
        return UpdateResult(grad_norm, apply, lr)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.inner.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the schedule's position.

        The tensors are not included (checkpoint/shards.py), and neither are settings, which belong
        to the run.
        """
        groups = [
            group
            for part in self.inner.chained_optimizers
            for group in cast(dict[str, Any], part.state_dict())["optimizer"]["param_groups"]
        ]
        return {
            # Transformer Engine's optimizer does not count in groups without a tensor on this rank.
            "num_updates": max(int(group.get("step", 0)) for group in groups),
            "opt_param_scheduler": self.scheduler.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what state_dict returns. Call after the tensors have been loaded."""
        for part in self.inner.chained_optimizers:
            own = cast(dict[str, Any], part.state_dict())
            for group in own["optimizer"]["param_groups"]:
                group["step"] = state["num_updates"]
            part.load_state_dict(own)
        self.scheduler.load_state_dict(state["opt_param_scheduler"])


def _finalize_summed_grads(
    model: list[Any], _num_tokens: Any = None, *args: Any, **kwargs: Any
) -> None:
    """Run Megatron's gradient reductions without its division by a token count."""
    finalize_model_grads(model, None, *args, **kwargs)
