"""Megatron checkpoints that are damaged or would run code: errors of one line, and no output."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from tests.convert.damage import Break, Evil, cut

NORM_KEY = "decoder.final_layernorm.weight"


def edit_metadata(change: Callable[[Any], Any]) -> Break:
    def rewrite(mcore: Path) -> None:
        path = mcore / "iter_0000000" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return rewrite


def norm_entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata[NORM_KEY]


def drop_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()


def drop_place(metadata: Any) -> None:
    del metadata.storage_data[MetadataIndex(NORM_KEY, torch.Size([0]))]


DISTCP, METADATA = "iter_0000000/__0_0.distcp", "iter_0000000/.metadata"


@pytest.mark.parametrize(
    ("damage", "because"),
    [
        (cut(DISTCP, -10), "__0_0.distcp: has "),
        (lambda mcore: (mcore / DISTCP).unlink(), "__0_0.distcp: is missing; .metadata requires"),
        (
            lambda mcore: (mcore / DISTCP).write_bytes(bytes((mcore / DISTCP).stat().st_size)),
            " cannot be read: ",
        ),
        (cut(METADATA, -1), ".metadata: not the metadata of a checkpoint: "),
        (cut(METADATA, 1000), ".metadata: not the metadata of a checkpoint: "),
        (cut(METADATA, 0), ".metadata: not the metadata of a checkpoint: "),
        (
            lambda mcore: (mcore / METADATA).write_bytes(pickle.dumps([1])),
            ".metadata: not the metadata of a checkpoint: it holds list",
        ),
        (
            edit_metadata(lambda m: m.state_dict_metadata.pop(NORM_KEY)),
            f"iter_0000000: {NORM_KEY} is missing; Qwen2ForCausalLM needs it",
        ),
        (
            edit_metadata(lambda m: m.state_dict_metadata.update({"decoder.own": norm_entry(m)})),
            "iter_0000000: unexpected tensor decoder.own; Qwen2ForCausalLM has no tensor of this",
        ),
        (
            edit_metadata(lambda m: setattr(norm_entry(m), "size", torch.Size([65]))),
            f"{NORM_KEY} has shape [65]; ",
        ),
        (edit_metadata(drop_chunk), "linear_fc2.weight is incomplete: 1536 of 6144 elements at"),
        (edit_metadata(drop_place), f".metadata: has no entry for {NORM_KEY}"),
        (edit_metadata(lambda m: setattr(m, "storage_data", None)), ".metadata: has no entry for"),
        (
            lambda mcore: (mcore / "latest_checkpointed_iteration.txt").write_text("7"),
            "latest_checkpointed_iteration.txt: names 7, but ",
        ),
        (
            edit_metadata(lambda m: setattr(norm_entry(m).properties, "dtype", torch.int64)),
            f"{NORM_KEY} is torch.int64; expected fp32, bf16 or fp16",
        ),
        *[
            (
                lambda mcore, text=text: (mcore / "hf" / "tensors.json").write_text(text),
                f"tensors.json: {because}",
            )
            for text, because in (("{", "not JSON"), ("5", "does not list"), ("[[]]", "does not"))
        ],
        (
            lambda mcore: (mcore / "latest_checkpointed_iteration.txt").write_bytes(b"\xff"),
            "latest_checkpointed_iteration.txt: names ",
        ),
        (
            lambda mcore: shutil.rmtree(mcore / "hf"),
            "hf/config.json is missing; pass --hf with an HF folder of the same model, which has",
        ),
    ],
)
def test_a_damaged_megatron_checkpoint_is_refused(damage, because, mcore, tmp_path, refused):
    damage(mcore)
    refused("export", mcore, tmp_path / "out", because=because)


def test_truncated_metadata_are_refused(mcore, tmp_path, refused):
    whole = (mcore / METADATA).read_bytes()
    for size in range(0, len(whole), 499):
        (mcore / METADATA).write_bytes(whole[:size])
        refused("inspect", mcore, because=".metadata: not the metadata of a checkpoint: ")


def test_metadata_that_would_run_code_are_refused(mcore, tmp_path, refused):
    (mcore / METADATA).write_bytes(pickle.dumps({"state": Evil(tmp_path / "marker")}))
    because = f"metadata of a checkpoint: {os.mkdir.__module__}.mkdir is not allowed in metadata"
    for arguments in (("export", mcore, tmp_path / "out"), ("inspect", mcore)):
        refused(*arguments, because=because)
    pickle.loads((mcore / METADATA).read_bytes())
    assert (tmp_path / "marker").exists()


def test_a_chunk_that_would_run_code_is_refused(mcore, tmp_path, refused):
    """The metadata refer to another object's pickle as the data of the final norm."""
    path = mcore / DISTCP
    start = path.stat().st_size
    with path.open("ab") as file:
        torch.save(Evil(tmp_path / "marker"), file)

    def point_there(metadata: Any) -> None:
        place = metadata.storage_data[MetadataIndex(NORM_KEY, torch.Size([0]))]
        place.relative_path, place.offset = path.name, start
        place.length = path.stat().st_size - start

    edit_metadata(point_there)(mcore)
    because = f"{NORM_KEY} cannot be read: the file calls {os.mkdir.__module__}.mkdir, which is n"
    refused("export", mcore, tmp_path / "out", because=because)
