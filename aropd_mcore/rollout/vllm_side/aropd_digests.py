"""An extension of vLLM's workers (--worker-extension-cls): digests of the tensors they load.

They are taken where both kinds of sync end, at the model's `load_weights`, of each tensor as it is
handed in: not of the model's parameters, which vLLM's kernels repack. Runs in vLLM's interpreter:
the standard library and torch alone.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def digest(tensor: torch.Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    found.update(data)
    return found.hexdigest()


def noted(
    tensors: Iterable[tuple[str, torch.Tensor]], digests: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors; each one's digest is put into `digests` as it passes."""
    for name, tensor in tensors:
        digests[name] = digest(tensor)
        yield name, tensor


class Digests:
    """Methods of a worker, called over /collective_rpc."""

    aropd_digests: dict[str, str]

    def aropd_note_digests(self: Any) -> None:
        """Note what the model loads from now on."""
        model, self.aropd_digests = self.get_model(), {}
        load = type(model).load_weights
        model.load_weights = lambda tensors: load(model, noted(tensors, self.aropd_digests))

    def aropd_noted_digests(self: Any) -> dict[str, str]:
        """By the tensors' names; and note no more."""
        del self.get_model().load_weights
        return self.aropd_digests
