"""Losses whose gradients are there before backward asks for them."""

import torch
from torch import Tensor


class _KnownGradients(torch.autograd.Function):
    """A scalar loss: backward scales what the forward has found, without a collective."""

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
            if gradient is None:  # accumulated already; zeros keep the parameter's hooks running
                # torch has no public assertion that lets the host go on.
                torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                    scale == 1, "main_grad_VH holds the gradient of 1 x the loss"
                )
                grads.append(scale.new_zeros((), dtype=dtype).expand(shape))
            else:
                grads.append((gradient * scale).to(dtype))
        return None, None, *grads


def attach_gradients(loss: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """The scalar `loss` as a differentiable function of each input of (input, gradient).

    Gradients are wide and stay so until the incoming gradient has scaled them: one rounding. None
    stands for a gradient that has been accumulated elsewhere, of the loss itself: backward then
    raises a RuntimeError (on a GPU, a device-side assertion) if anything but 1 comes in.
    """
    if not pairs:
        return loss
    inputs, gradients = zip(*pairs, strict=True)
    return _KnownGradients.apply(loss, list(gradients), *inputs)


def wants_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def refuse_second_derivative() -> None:
    """In a backward: torch's own once_differentiable lets some second derivatives be 0."""
    if torch.is_grad_enabled():
        raise RuntimeError("this loss is differentiable once: no create_graph=True")
