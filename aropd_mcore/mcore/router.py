"""Auxiliary losses of the experts' routers, over real tokens only.

Shape letters: T tokens of a microbatch on this rank, including padding; E experts.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from aropd_mcore.config import ObjectiveConfig
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.types import ViewBatch


class RouterLosses:
    """Two losses of each router's logits, whose gradient joins the student's backward.

        load balancing: L_m = E sum_e f_e P_e,  f_e = (choices of e) / (k n_m),  P_e = mean_t p_te
        z-loss:         Z_m = mean_t (logsumexp_e logits_te)^2

    Here, microbatch m has n_m real tokens, p is the softmax of their logits, and each token takes k
    experts. A step's losses are sum_m (n_m / N) L_m and sum_m (n_m / N) Z_m, with N = sum_m n_m
    over the microbatches of all data-parallel ranks. Each loss, summed over layers and multiplied
    by its coefficient, is added to the minimized loss. There is no gradient through f.

    Padding is routed like any token, but counts in neither loss. Experts have no capacity limit, so
    padding does not displace real tokens.

    Source: METHOD section 3, Routers; Switch Transformer, arXiv:2101.03961; ST-MoE,
    arXiv:2202.08906. Megatron has both losses, but weights microbatches by the tokens of each
    tensor and context rank. If padding is spread unevenly, this weight depends on the layout. Its
    factor also differs between megatron-core 0.16 and 0.19 (transformer/moe/router.py,
    attach_and_log_load_balancing_loss).
    """

    NAMES = ("router_aux_loss", "router_z_loss")

    def __init__(self, model: StageModel, objective: ObjectiveConfig, runtime: Runtime):
        coefficients = (objective.router_aux_loss_coeff, objective.router_z_loss_coeff)
        routing = model.architecture.routing
        assert routing is not None and objective.has_router_losses
        self._num_chosen = routing.experts_per_token
        self._num_layers = model.architecture.num_expert_layers
        self._runtime = runtime
        self._coefficients = torch.tensor(coefficients, device=runtime.device)
        self._reported = [name for name, c in zip(self.NAMES, coefficients, strict=True) if c > 0]
        self._num_tokens = torch.ones((), device=runtime.device)
        self._totals = torch.zeros(len(self.NAMES), dtype=torch.float64, device=runtime.device)
        for layer in model.layers:
            if hasattr(layer.mlp, "router"):
                # Here the router has the logits and the mask of its tokens in matching shapes.
                layer.mlp.router.apply_z_loss = self._attach

    def start_step(self, views: Sequence[ViewBatch]) -> None:
        """Count the global batch's real tokens.

        Args:
            views: this context rank's parts of this data-parallel rank's student views.
        Collectives: one all-reduce of a number over dp_cp_group.
        """
        num_real = torch.zeros((), dtype=torch.int64, device=self._runtime.device)
        for view in views:
            assert view.padding_BS is not None
            num_real += (~view.padding_BS).sum()
        dist.all_reduce(num_real, group=self._runtime.dp_cp_group)
        self._num_tokens = num_real.float()
        self._totals.zero_()

    def finish_step(self) -> dict[str, Tensor]:
        """Return the step's losses as means over the layers, without their coefficients.

        Returns:
            name -> fp64 number, the same on every rank, for losses whose coefficient is not 0.
        Collectives: three all-reduces, one each over tp_group, dp_cp_group and pp_group.
        """
        runtime = self._runtime
        # With tensor parallelism, experts require sequence parallelism, so each tensor rank has its
        # own tokens.
        for group in (runtime.tp_group, runtime.dp_cp_group, runtime.pp_group):
            dist.all_reduce(self._totals, group=group)
        means = (self._totals / self._num_layers).cpu()
        return {
            name: mean
            for name, mean in zip(self.NAMES, means, strict=True)
            if name in self._reported
        }

    def _attach(self, logits_TE: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return the logits unchanged, with the losses' gradient attached to their backward.

        Args:
            padding_mask: bool [T], True for padding.
        Collectives: one all-reduce of E counts over the microbatch's tensor and context ranks.
        """
        # No gradient: a teacher's view, a rollout, or a forward that will be recomputed.
        if not torch.is_grad_enabled():
            return logits_TE
        assert padding_mask is not None
        real_T = ~padding_mask
        chosen_Tk = logits_TE.detach().topk(self._num_chosen, dim=-1).indices
        chosen_TE = torch.zeros_like(logits_TE).scatter_(-1, chosen_Tk, 1.0)
        counts_E = (chosen_TE * real_T[:, None]).sum(0)
        dist.all_reduce(counts_E, group=self._runtime.tp_cp_group)
        # The count is 0 for a microbatch that consists of padding, which packing may add.
        num_real = (counts_E.sum() / self._num_chosen).clamp(min=1.0)
        probs_E = (logits_TE.softmax(-1) * real_T[:, None]).sum(0)
        scale = logits_TE.size(-1) / (self._num_chosen * num_real)
        balance = scale * (counts_E * probs_E).sum()
        z = (logits_TE.logsumexp(-1).square() * real_T).sum()
        # n_m / N times this rank's part of the microbatch's loss.
        losses = torch.stack([balance, z]) / self._num_tokens
        self._totals += losses.detach()
        # Megatron scales this gradient like that of the loss.
        return MoEAuxLossAutoScaler.apply(logits_TE, (self._coefficients * losses).sum())
