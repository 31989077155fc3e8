"""Losses whose gradients are computed in the forward."""

import torch
from torch import Tensor


class _KnownGradients(torch.autograd.Function):
    """A scalar loss whose backward scales the gradients of the forward, without a collective."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.inputs = [(x.shape, x.dtype) for x in inputs]
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, *scales: Tensor):
        refuse_second_derivative()
        scale, grads = scales[0], []
        for (shape, dtype), gradient in zip(ctx.inputs, ctx.saved_tensors, strict=True):
            if gradient is None:  # accumulated already
                # torch has no public assertion that does not block the host.
                torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                    scale == 1, "main_grad_VH holds the gradient of 1 x the loss"
                )
                grads.append(_sparse_zeros(shape, scale.device, dtype))
            else:
                grads.append((gradient * scale).to(dtype))
        return None, None, *grads


def _sparse_zeros(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros without storage. A parameter with this gradient runs its hooks, and adding it to
    a dense tensor reads and writes nothing."""
    places = torch.empty((len(shape), 0), dtype=torch.int64, device=device)
    values = torch.empty(0, dtype=dtype, device=device)
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=False)


def attach_gradients(loss: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """Make the scalar `loss` a differentiable function of each input of (input, gradient).

    Gradients are fp32 or fp64. They are rounded once, after backward has scaled them. None stands
    for a gradient of the loss that has been accumulated elsewhere: backward then raises a
    RuntimeError (on a GPU, a device-side assertion) if the incoming gradient is not 1. The input's
    own gradient is then an empty sparse tensor, which stands for zeros.
    """
    if not pairs:
        return loss
    inputs, gradients = zip(*pairs, strict=True)
    return _KnownGradients.apply(loss, list(gradients), *inputs)


def wants_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def refuse_second_derivative() -> None:
    """Raise in a backward with create_graph.

    torch's own once_differentiable silently returns 0 for some second derivatives.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "backward with create_graph=True: this loss is differentiable once; remove create_graph"
        )
