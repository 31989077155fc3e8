"""Extension of vLLM's workers (--worker-extension-cls): digests of the tensors that they load.

Both kinds of sync end in the model's `load_weights`. The digests are of the tensors passed to it,
not of the model's parameters, because vLLM's kernels repack these. The module runs in vLLM's
interpreter and needs only the standard library and torch.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of dtype, shape and bytes."""
    checksum = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    checksum.update(data)
    return checksum.hexdigest()


def noted(
    tensors: Iterable[tuple[str, torch.Tensor]], digests: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors; put the digest of each into `digests` before."""
    for name, tensor in tensors:
        digests[name] = digest(tensor)
        yield name, tensor


class Digests:
    """Methods of a worker, which /collective_rpc calls."""

    aropd_digests: dict[str, str]

    def aropd_note_digests(self: Any) -> None:
        """Record digests of the tensors that the model loads from now on."""
        model, self.aropd_digests = self.get_model(), {}
        load = type(model).load_weights
        model.load_weights = lambda tensors: load(model, noted(tensors, self.aropd_digests))

    def aropd_noted_digests(self: Any) -> dict[str, str]:
        """Stop recording; return the digests by tensor name."""
        del self.get_model().load_weights
        return self.aropd_digests
