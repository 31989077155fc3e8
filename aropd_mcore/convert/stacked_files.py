"""Reading of HF folders with stacked tensors, element by element."""

from collections.abc import Mapping

import torch
from torch import Tensor

from aropd_mcore.convert import mxfp4
from aropd_mcore.convert.hf_io import HFWeights
from aropd_mcore.convert.stacked import Element
from aropd_mcore.convert.tensor_bytes import Buffer, TensorInfo


class UnstackedFiles:
    """Tensors of an HF folder, with the elements of stacked tensors in place of these.

    One element is read at a time. An mxfp4 element is dequantized to bf16.
    """

    def __init__(self, files: HFWeights, elements: Mapping[str, Element]):
        """
        Args:
            elements: elements of all stacked tensors, by name.
        """
        self._files = files
        self._elements = elements
        of_tensor: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, part in elements.items():
            of_tensor.setdefault(part.tensor, {})[name] = part.shape
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in files.tensors.items():
            dtype = info.dtype
            if is_packed := name.endswith(mxfp4.BLOCKS):
                name, dtype = name.removesuffix(mxfp4.BLOCKS), torch.bfloat16
            parts = of_tensor.get(name, {})
            self.tensors |= {n: TensorInfo(dtype, shape) for n, shape in parts.items()}
            if not parts and not is_packed and not name.endswith(mxfp4.SCALES):
                self.tensors[name] = info

    def read(self, name: str, buffer: Buffer | None = None) -> Tensor:
        part = self._elements.get(name)
        if part is None:
            return self._files.read(name, buffer)
        if part.tensor + mxfp4.BLOCKS not in self._files.tensors:
            return part.from_file(self._read(part, "", buffer))
        blocks, scales = (self._read(part, end, None) for end in (mxfp4.BLOCKS, mxfp4.SCALES))
        return part.from_rows(mxfp4.dequantize(blocks, scales))

    def read_part(
        self, name: str, dim: int, start: int, end: int, buffer: Buffer | None = None
    ) -> Tensor:
        if name in self._elements:
            return self.read(name, buffer).narrow(dim, start, end - start)
        return self._files.read_part(name, dim, start, end, buffer)

    def _read(self, part: Element, ending: str, buffer: Buffer | None) -> Tensor:
        one = self._files.read_part(part.tensor + ending, 0, part.index, part.index + 1, buffer)
        return one.squeeze(0)
