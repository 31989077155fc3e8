"""torch_dist files, compared with torch.distributed.checkpoint, which Megatron uses for loading."""

import io
import math
import pickle
import random
from enum import Enum
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from aropd_mcore.convert import torch_dist_write
from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.tensor_bytes import TensorInfo
from aropd_mcore.convert.torch_dist import METADATA, TorchDistReader
from aropd_mcore.convert.torch_dist_write import TorchDistWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tensor.dtype, tuple(tensor.shape))


def grid_boxes(cuts: list[list[int]]):
    """Yield (offset, slices) of every chunk of a grid with the given cuts on each axis."""
    for spans in product(*(pairwise(cut) for cut in cuts)):
        yield tuple(start for start, _ in spans), tuple(slice(*span) for span in spans)


def read_whole(reader: TorchDistReader, key: str) -> Tensor:
    shape = reader.tensors[key].shape
    return reader.read(key, (), (0,) * len(shape), shape).clone()


@st.composite
def tensors_chunks_and_boxes(draw):
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    cuts = [sorted({0, size, *draw(st.sets(st.integers(0, size)))}) for size in shape]
    lead = draw(st.integers(0, len(shape) - 1))
    boxes = []
    for _ in range(3):
        spans = [draw(st.integers(0, size - 1)) for size in shape]
        ends = [
            start + 1 if axis < lead else draw(st.integers(start, size))
            for axis, (start, size) in enumerate(zip(spans, shape, strict=True))
        ]
        boxes.append((spans, ends))
    return draw(st.sampled_from(DTYPES)), shape, cuts, lead, boxes


@given(tensors_chunks_and_boxes())
def test_any_box_is_read_from_any_chunks(drawn):
    dtype, shape, cuts, lead, boxes = drawn
    tensor = torch.arange(math.prod(shape), dtype=dtype).view(shape)
    with TemporaryDirectory() as name:
        folder = Path(name)
        with TorchDistWriter(folder, max_file_bytes=1000) as writer:
            for offset, part in grid_boxes(cuts):
                writer.add("t", info(tensor), offset, tensor[part].clone())
            writer.finish({})
        reader = TorchDistReader(folder)
        for start, end in boxes:
            sizes = tuple(e - s for s, e in zip(start, end, strict=True))
            part = reader.read("t", tuple(start[:lead]), tuple(start[lead:]), sizes[lead:])
            box = tuple(slice(s, e) for s, e in zip(start, end, strict=True))
            assert part.dtype == dtype and torch.equal(part, tensor[box].view(sizes[lead:]))


STATE = {
    "layers": torch.randn(3, 4, 6),
    "bf16": torch.randn(5, 7).bfloat16(),
    "vector": torch.randn(9).half(),
    "scalar": torch.tensor(1.5),
}


@pytest.fixture(params=[(10**9, 1), (300, 4)], ids=["one file", "several files"])
def written(request, tmp_path: Path) -> Path:
    """Write STATE, an object and a common state. Tensors are cut in two along their last axis."""
    max_file_bytes, num_files = request.param
    with TorchDistWriter(tmp_path, max_file_bytes=max_file_bytes) as writer:
        for key, tensor in STATE.items():
            cuts = [[0, size] for size in tensor.shape]
            if cuts:
                cuts[-1].insert(1, 2)
            for offset, part in grid_boxes(cuts):
                writer.add(key, info(tensor), offset, tensor[part].clone())
        writer.add_object("module._extra_state/shard_0_1", {"state": [1, "two"]})
        writer.finish({"iteration": 3, "dtype": torch.bfloat16})
    assert len(list(tmp_path.glob("*.distcp"))) >= num_files
    return tmp_path


def test_torch_loads_written_checkpoints(written: Path):
    state: dict[str, Any] = {key: torch.empty_like(tensor) for key, tensor in STATE.items()}
    state["module._extra_state/shard_0_1"] = None
    dcp.load(state, storage_reader=dcp.FileSystemReader(written), no_dist=True)
    assert state.pop("module._extra_state/shard_0_1") == [{"state": [1, "two"]}]
    for key, tensor in STATE.items():
        assert torch.equal(state[key], tensor)
    common = {"iteration": 3, "dtype": torch.bfloat16}
    assert torch.load(written / "common.pt", weights_only=True) == common
    assert TorchDistReader(written).read_common() == common


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_during_a_write_is_raised_unchanged(error, tmp_path: Path, monkeypatch):
    """Each of torch.save's writes fails in turn. torch.save may raise another error afterwards."""
    write, num_writes = torch_dist_write._InPieces.write, 0

    def fail_at_last(file: Any, data: bytes) -> int:
        nonlocal num_writes
        num_writes -= 1
        if num_writes == 0:
            raise error
        return write(file, data)

    monkeypatch.setattr(torch_dist_write._InPieces, "write", fail_at_last)
    for first in range(1, 1000):
        num_writes = first
        try:
            with TorchDistWriter(tmp_path) as writer:
                writer.add("t", info(torch.ones(9)), (0,), torch.ones(9))
        except type(error) as raised:
            assert raised is error
        else:
            break
    assert 5 < first < 999


def test_chunks_of_a_layer_may_omit_the_layer_axis(tmp_path: Path):
    layers = torch.randn(3, 4, 6)
    with TorchDistWriter(tmp_path) as writer:
        for layer in range(3):
            writer.add("layers", info(layers), (layer, 0, 0), layers[layer].clone())
        writer.finish({})
    state = {"layers": torch.empty_like(layers)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(state["layers"], layers)


def test_checkpoints_that_torch_saved_are_read(tmp_path: Path):
    """The tensors are parameters, transposed or expanded, or parts of a larger tensor."""
    base = torch.randn(6, 8)
    state = STATE | {
        "transposed": base.T,
        "part": base[1:3, 2:5],
        "row": base[2],
        "expanded": torch.randn(1, 5).expand(3, 5),
        "parameter": nn.Parameter(torch.randn(3, 3)),
        "empty": torch.empty(0, 3),
    }
    dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    reader = TorchDistReader(tmp_path)
    assert reader.tensors == {key: info(tensor) for key, tensor in state.items()}
    for key, tensor in state.items():
        assert torch.equal(read_whole(reader, key), tensor)


@pytest.mark.parametrize(
    "chunk",
    [
        torch.arange(12.0).view(4, 3).T,
        torch.arange(24.0).view(6, 4)[2:5],
        torch.arange(4.0).expand(3, 4),
        nn.Parameter(torch.arange(12.0).view(3, 4)),
    ],
    ids=["transposed", "with the storage around it", "expanded", "parameter"],
)
def test_chunks_that_are_not_one_plain_block_are_read(chunk: Tensor, tmp_path: Path):
    """Other programs may pass any tensors to torch.save."""
    with TorchDistWriter(tmp_path) as writer:
        writer.add("t", info(chunk), (0, 0), torch.zeros(chunk.shape))
        writer._append(MetadataIndex("t", torch.Size([0, 0])), chunk)  # replaces the zeros
        writer.finish({})
    assert torch.equal(read_whole(TorchDistReader(tmp_path), "t"), chunk)


def edit_metadata(folder: Path, change) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def write_one(folder: Path, tensor: Tensor) -> None:
    with TorchDistWriter(folder) as writer:
        writer.add("t", info(tensor), (0,) * tensor.dim(), tensor)
        writer.finish({})


def test_a_chunk_of_another_dtype_than_its_metadata_is_converted(tmp_path: Path):
    write_one(tmp_path, torch.randn(4, 4))
    before = read_whole(TorchDistReader(tmp_path), "t")
    edit_metadata(
        tmp_path,
        lambda m: setattr(m.state_dict_metadata["t"].properties, "dtype", torch.bfloat16),
    )
    assert torch.equal(read_whole(TorchDistReader(tmp_path), "t"), before.bfloat16())


@pytest.mark.parametrize(
    ("size", "chunk_size", "message"),
    [
        ([4, 3], [4, 3], r"__0_0\.distcp: t cannot be read: shape"),
        ([4, 4], [4, 2**45], r"\.metadata: not the metadata .*: t has a chunk outside of its bou"),
        ([4, 4], [4, 4, 1], r"\.metadata: not the metadata of a checkpoint: zip"),
    ],
)
def test_a_chunk_of_another_size_than_its_metadata_is_refused(size, chunk_size, message, tmp_path):
    write_one(tmp_path, torch.randn(4, 4))

    def resize(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["t"]
        entry.size = torch.Size(size)
        entry.chunks[0] = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size(chunk_size))

    edit_metadata(tmp_path, resize)
    with pytest.raises(CheckpointError, match=message):
        read_whole(TorchDistReader(tmp_path), "t")


class OtherPickler(pickle.Pickler):
    """Pickler that writes enums like Python 3.11.0 to 3.11.3."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Enum):
            return getattr, (type(obj), obj.name)
        return NotImplemented


def test_metadata_of_other_python_versions_are_read(tmp_path: Path):
    state = {"t": torch.randn(4, 4)}
    dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    metadata = pickle.loads((tmp_path / METADATA).read_bytes())
    assert isinstance(metadata.storage_meta.checkpoint_id, Path)
    pickled = io.BytesIO()
    OtherPickler(pickled, protocol=2, fix_imports=False).dump(metadata)
    assert pickled.getvalue().count(b"getattr") == 1
    # Protocol 2 writes a class as one line for its module and one line for its name. Python 3.13
    # has another module name for paths.
    content = pickled.getvalue().replace(b"cpathlib\n", b"cpathlib._local\n")
    (tmp_path / METADATA).write_bytes(content)
    assert torch.equal(read_whole(TorchDistReader(tmp_path), "t"), state["t"])


def test_getattr_in_metadata_is_allowed_for_enums_only(tmp_path: Path):
    (tmp_path / METADATA).write_bytes(pickle.dumps(Reduced(getattr, (torch.Size, "__add__"))))
    with pytest.raises(CheckpointError, match=r"getattr of .*Size.* is not allowed in metadata"):
        TorchDistReader(tmp_path)


class Reduced:
    """Object that pickles as a call."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("name", ["__0_0.distcp", METADATA])
def test_any_damaged_byte_gives_a_checkpoint_error_or_numbers(name: str, tmp_path: Path):
    write_one(tmp_path, torch.randn(2, 3))
    whole = (tmp_path / name).read_bytes()
    generator = random.Random(0)
    refused = 0
    for place in range(0, len(whole), 2):
        broken = bytearray(whole)
        broken[place] ^= 1 << generator.randrange(8)
        (tmp_path / name).write_bytes(broken)
        try:
            reader = TorchDistReader(tmp_path)
            reader.read_common()
            if "t" in reader.tensors:
                read_whole(reader, "t")
        except CheckpointError:
            refused += 1
    assert refused > 50
