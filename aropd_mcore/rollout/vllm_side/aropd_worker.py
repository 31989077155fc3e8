"""Extension of vLLM's workers (--worker-extension-cls).

It reloads weights, computes digests of tensors, and receives from several senders.

Both kinds of sync end in the model's `load_weights`. The digests are of the tensors passed to it,
not of the model's parameters, because vLLM's kernels repack these.

vLLM's transfer engine has one communicator. A sync needs one per sender, so this extension keeps
all of them and puts one at a time into the engine.

The module runs in vLLM's interpreter and needs only the standard library and torch.
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


class Extension:
    """Methods of a worker, which /collective_rpc calls."""

    aropd_digests: dict[str, str]
    aropd_senders: tuple[str, dict[int, Any]]
    """Name of the communicators that the worker has joined, and each sender's communicator."""

    def aropd_reload_weights(self: Any, weights_path: str) -> None:
        """Load an HF folder into the model."""
        if self.device.type == "cpu":
            # vLLM 0.32 packs experts for its CPU kernels with the first weights only, when it
            # builds the kernel (UnquantizedFusedMoEMethod._setup_kernel).
            for module in self.get_model().modules():
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None
        self.reload_weights(weights_path=weights_path)

    def aropd_keep_sender(self: Any, name: str, sender: int) -> None:
        """Keep the engine's communicator as that of a sender. Others than of `name` are closed."""
        held, communicators = getattr(self, "aropd_senders", (None, {}))
        if held != name:
            for communicator in communicators.values():
                communicator.destroy()
            communicators = {}
        communicators[sender] = self.weight_transfer_engine.model_update_group
        self.aropd_senders = (name, communicators)

    def aropd_choose_sender(self: Any, sender: int) -> None:
        """Receive from this sender."""
        self.weight_transfer_engine.model_update_group = self.aropd_senders[1][sender]

    def aropd_senders_name(self: Any) -> str | None:
        """Return the name of the communicators, None if there are none."""
        return getattr(self, "aropd_senders", (None, {}))[0]

    def aropd_note_digests(self: Any) -> None:
        """Record digests of the tensors that the model loads from now on."""
        model, self.aropd_digests = self.get_model(), {}
        load = type(model).load_weights
        model.load_weights = lambda tensors: load(model, noted(tensors, self.aropd_digests))

    def aropd_noted_digests(self: Any) -> dict[str, str]:
        """Stop recording; return the digests by tensor name."""
        del self.get_model().load_weights
        return self.aropd_digests
