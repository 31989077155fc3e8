"""AdamW in plain torch, with the interface of FusedAdam of Apex and Transformer Engine.

If neither package is installed, Megatron falls back to torch.optim.AdamW, and its checkpoint code
then silently gives wrong updates. torch keeps one `step` tensor per parameter. After a load, all
parameters share a single `step` tensor, which advances once per parameter (megatron-core 0.16.1 and
0.19, optimizer/distrib_optimizer.py, load_state_dict, "non-Apex/TE support"). This optimizer keeps
`step` in the parameter group, as FusedAdam does.
"""

# pyright: reportPrivateImportUsage=false
# torch.optim itself uses torch._foreach_*.

from collections.abc import Callable, Iterable
from typing import Any

import megatron.core.optimizer as upstream
import torch
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

        p <- p (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps)

    Source: Loshchilov and Hutter, arXiv:1711.05101. State: `exp_avg` and `exp_avg_sq` per
    parameter, `step` per parameter group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        assert adam_w_mode and not capturable, "only the decoupled, uncaptured mode is implemented"
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Megatron steps without a closure"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, [p.grad for p in params])

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        exp_avgs = [self.state[p]["exp_avg"] for p in params]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in params]
        (beta1, beta2), step, lr = group["betas"], group["step"], group["lr"]

        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)

        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr / (1 - beta1**step))


def install() -> None:
    """Make Megatron use this `AdamW` if it found neither Transformer Engine nor Apex."""
    if not upstream.USING_PYTORCH_OPTIMIZER:
        return
    upstream.Adam = distrib_optimizer.Adam = AdamW  # type: ignore[assignment,misc]
    upstream.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
