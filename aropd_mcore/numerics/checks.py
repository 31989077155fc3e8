"""Checks of the losses' arguments. They raise ValueErrors."""

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_matrices(tensors: dict[str, Tensor], shape: torch.Size) -> None:
    """Check that each tensor is two-dimensional, has `shape` and has one of DTYPES."""
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {tuple(shape)}, and two "
                "dimensions"
            )
        if tensor.dtype not in DTYPES:
            expected = ", ".join(map(str, DTYPES))
            raise ValueError(f"{name} is {tensor.dtype}: expected one of {expected}")


def check_ids(name: str, ids_T: Tensor, num_tokens: int, vocab_size: int) -> None:
    """Check that there is one int64 id in [0, vocab_size) per token."""
    if ids_T.dtype != torch.int64 or ids_T.shape != (num_tokens,):
        raise ValueError(
            f"{name} is {ids_T.dtype} {tuple(ids_T.shape)}: expected torch.int64 ({num_tokens},)"
        )
    bad = ids_T[(ids_T < 0) | (ids_T >= vocab_size)]
    if bad.numel():
        raise ValueError(f"{name} holds {int(bad[0])}: expected 0 <= id < vocab_size {vocab_size}")


def check_head(
    view: str, hidden_TH: Tensor, weight_VH: Tensor, student_TH: Tensor, student_weight_VH: Tensor
) -> None:
    """Check a view's hidden states and output layer against each other and the student's."""
    owner = "student" if view == "student" else "teacher"
    hidden_size = weight_VH.size(-1)
    check_matrices({f"{view}_hidden_TH": hidden_TH}, torch.Size((student_TH.size(0), hidden_size)))
    expected_shape = torch.Size((student_weight_VH.size(0), hidden_size))
    check_matrices({f"{owner}_weight_VH": weight_VH}, expected_shape)
    for name, tensor in ((f"{view}_hidden_TH", hidden_TH), (f"{owner}_weight_VH", weight_VH)):
        if tensor.dtype != student_TH.dtype:
            raise ValueError(
                f"student_hidden_TH is {student_TH.dtype} and {name} is {tensor.dtype}: "
                "expected one dtype"
            )


def check_views(hidden: Mapping[str, Tensor | None], target_view: str | None) -> None:
    """Check that no privileged view is missing: only `target_view`'s is needed if it is given."""
    for view, hidden_TH in hidden.items():
        if hidden_TH is None and target_view in (None, view):
            raise ValueError(
                f"{view}_hidden_TH is None: expected the hidden states of both views. One view is "
                "enough without metrics and sampled ids: the partial view for residual_scale 0, "
                "and the full view for residual_scale 1 without residual_clip"
            )


def check_token_weights(token_weights_T: Tensor, num_tokens: int) -> None:
    if token_weights_T.shape != (num_tokens,):
        raise ValueError(
            f"token_weights_T has shape {tuple(token_weights_T.shape)}: expected ({num_tokens},)"
        )


def check_main_grad(main_grad_VH: Tensor | None, weight_VH: Tensor, wide: torch.dtype) -> None:
    if main_grad_VH is None:
        return
    if main_grad_VH.shape != weight_VH.shape or main_grad_VH.dtype != wide:
        raise ValueError(
            f"main_grad_VH is {main_grad_VH.dtype} {tuple(main_grad_VH.shape)}: expected {wide} "
            f"{tuple(weight_VH.shape)}"
        )
