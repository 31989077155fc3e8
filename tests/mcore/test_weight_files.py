"""HF folders that all ranks write together: every tensor once, and nothing after a failure."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny_model

# (family, layout, settings of the model, number of ranks that write)
LAYOUTS = (
    ("qwen2", {"tensor": 2, "pipeline": 2}, {}, 4),
    ("glm4_moe", {"expert": 2}, {"dtype": torch.bfloat16}, 2),  # with buffers in fp32
    pytest.param(
        ("qwen2", {"pipeline": 2, "virtual_pipeline": 2}, {"tie": True}, 4),
        marks=pytest.mark.rest,
    ),
    pytest.param(
        ("mixtral", {"tensor": 2, "sequence_parallel": True, "expert_tensor": 2}, {}, 4),
        marks=pytest.mark.rest,
    ),
)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_write_weight_files_writes_each_tensor_once_over_all_ranks(tmp_path, case):
    family, layout, settings, num_ranks = case
    save_tiny_model(family, tmp_path / "hf", **settings)
    run_ranks(write_and_compare, num_ranks, tmp_path, layout)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == num_ranks, "every rank must write a part"
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 0.6 * sum(sizes), sizes
    names = Counter()
    for file in files:
        with safe_open(file, "pt") as opened:
            names.update(opened.keys())
    assert set(names.values()) == {1}


def build(folder: Path, layout: dict[str, Any]) -> tuple[Any, Any]:
    from aropd_mcore.convert.hf_io import HFWeights
    from aropd_mcore.mcore import runtime as mcore_runtime
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.weights import load_hf_weights

    runtime = mcore_runtime.start(**layout)
    dtype = HFWeights(folder / "hf").tensors["model.embed_tokens.weight"].dtype
    model = build_model(folder / "hf", runtime, dtype=dtype)
    load_hf_weights(model, folder / "hf", runtime)
    return model, runtime


def write_and_compare(folder: Path, layout: dict[str, Any]) -> None:
    from aropd_mcore.convert.hf_io import HFWeights
    from aropd_mcore.mcore import weight_buckets
    from aropd_mcore.mcore.weight_files import write_weight_files
    from aropd_mcore.rollout.vllm_side.aropd_worker import digest

    model, runtime = build(folder, layout)
    usual, weight_buckets.BUCKET_BYTES = weight_buckets.BUCKET_BYTES, 20_000  # several per rank
    try:
        digests = write_weight_files(model, runtime, folder / "out", folder / "hf", digest=digest)
    finally:
        weight_buckets.BUCKET_BYTES = usual
    actual, expected = HFWeights(folder / "out"), HFWeights(folder / "hf")
    actual.check(model.architecture)
    for name in model.architecture.hf_shapes:
        assert actual.read(name).dtype == expected.read(name).dtype, name
        assert torch.equal(actual.read(name), expected.read(name)), name
        assert digests[name] == digest(expected.read(name))
    assert digests.keys() == model.architecture.hf_shapes.keys()


def test_write_weight_files_with_a_failing_rank_leaves_nothing_and_names_it(tmp_path):
    save_tiny_model("qwen2", tmp_path / "hf")
    run_ranks(fail_half_way, 4, tmp_path)


def fail_half_way(folder: Path) -> None:
    from aropd_mcore.mcore import weight_files

    model, runtime = build(folder, {"tensor": 2, "pipeline": 2})
    weight_files.write_weight_files(model, runtime, folder / "old", folder / "hf")
    before = contents(folder / "old")

    def write_at(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        if runtime.rank == 2:
            patch.setattr(weight_files, "write_at", write_at)
        with pytest.raises(OSError, match=r"rank 2 could not write its part of .*No space left"):
            weight_files.write_weight_files(model, runtime, folder / "new", folder / "hf")
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "old"]
    assert contents(folder / "old") == before
    dist.barrier()
    weight_files.write_weight_files(model, runtime, folder / "new", folder / "hf")
    assert contents(folder / "new") == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
