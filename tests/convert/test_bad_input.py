"""Bad input: one line that names the file and the tensor or key, exit status 2, no output."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aropd_mcore.convert.hf_io import INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE
from tests.convert.damage import NORM, Break, Evil, cut, edit_tensors
from tests.support.tiny_models import save_tiny_model

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def edit_header(**entries: dict[str, Any]) -> Break:
    """Change entries of the header. The data stay unchanged."""

    def change(folder: Path) -> None:
        content = (folder / SINGLE).read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        for name, entry in entries.items():
            header[name.replace("__", ".")].update(entry)
        write_header(json.dumps(header).encode(), content[start:])(folder)

    return change


def write_header(header: bytes, data: bytes = b"") -> Break:
    content = len(header).to_bytes(8, "little") + header + data
    return lambda folder: (folder / SINGLE).write_bytes(content)


def edit_index(**weight_map: str) -> Break:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"].update({k.replace("__", "."): v for k, v in weight_map.items()})
        (folder / INDEX).write_text(json.dumps(index))

    return change


def edit_config(**values: Any) -> Break:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


INVALID = "model.safetensors: not a valid safetensors file: "


@pytest.mark.parametrize(
    ("damage", "because"),
    [
        (cut(SINGLE, -10), INVALID + "found "),
        (cut(SINGLE, 0), INVALID + "a header of 0 bytes in a file of 0"),
        (cut(SINGLE, 5), "bytes in a file of 5"),
        (cut(SINGLE, 100), "bytes in a file of 100"),
        (
            lambda folder: (folder / SINGLE).write_bytes(b"\xff" * 100),
            INVALID + f"a header of {2**64 - 1} bytes in a file of 100",
        ),
        (write_header(b"{not json"), INVALID + "JSONDecodeError"),
        (write_header(b"\xff" * 20), INVALID + "UnicodeDecodeError"),
        (write_header(b"[]"), INVALID + "TypeError"),
        (write_header(b'{"a": 1}'), INVALID + "TypeError"),
        (write_header(b'{"a": {}}'), INVALID + "KeyError"),
        (write_header(b"[" * 200_000), INVALID + "RecursionError"),
        (edit_header(model__norm__weight={"shape": [63]}), "model.norm.weight has 128 bytes for"),
        (edit_header(model__norm__weight={"shape": [64.0]}), INVALID + "TypeError"),
        (edit_header(model__norm__weight={"dtype": "F32"}), "model.norm.weight has 128 bytes for"),
        (edit_header(model__norm__weight={"data_offsets": [0, 128]}), " starts at byte "),
        (
            lambda folder: (folder / SINGLE).open("ab").write(bytes(8)),
            " by its header",
        ),
    ],
)
def test_a_damaged_safetensors_file_is_refused(damage: Break, because: str, hf, tmp_path, refused):
    damage(hf)
    refused("import", hf, tmp_path / "out", because=because)
    refused("inspect", hf, because=because)


def test_a_gap_between_tensors_is_refused(hf, tmp_path, refused):
    """The middle of the file has data of a tensor that the header does not name."""
    content = (hf / SINGLE).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    del header[K]
    write_header(json.dumps(header).encode(), content[start:])(hf)
    refused("import", hf, tmp_path / "out", because=" starts at byte ")


@pytest.mark.parametrize(
    ("damage", "because"),
    [
        (
            lambda folder: next(folder.glob("*-of-*.safetensors")).unlink(),
            ".safetensors: missing, but model.safetensors.index.json names it",
        ),
        (edit_index(x="model-00001-of-{}.safetensors"), ".safetensors, which does not have it"),
        (edit_index(model__norm__weight="../x.safetensors"), "'../x.safetensors', outside the"),
        (edit_index(model__norm__weight="/x.safetensors"), "'/x.safetensors', outside the"),
        (cut(INDEX, 100), "index.json: not an index of weights: JSONDecodeError"),
        (lambda folder: (folder / INDEX).write_text("{}"), "not an index of weights: KeyError"),
        (lambda folder: (folder / INDEX).write_text("[]"), "not an index of weights: TypeError"),
    ],
)
def test_shards_that_do_not_match_their_index_are_refused(
    damage, because, shards, tmp_path, refused
):
    first = next(iter(json.loads((shards / INDEX).read_text())["weight_map"].values()))
    save_file({"x": torch.ones(1), NORM: torch.ones(64).bfloat16()}, tmp_path / "x.safetensors")
    damage(shards)
    (shards / INDEX).write_text(
        (shards / INDEX).read_text().replace("model-00001-of-{}.safetensors", first)
    )
    refused("import", shards, tmp_path / "out", because=because)


def test_folders_of_another_kind_are_refused(hf, mcore, tmp_path, refused):
    refused("export", hf, tmp_path / "out", because="hf: found an HF folder, expected a Megatron")
    refused(
        "import",
        mcore,
        tmp_path / "out",
        because="mcore: found a Megatron checkpoint",
    )
    (hf / SINGLE).unlink()
    because = "hf: holds no weights; expected model.safetensors or model.safetensors.index.json"
    refused("import", hf, tmp_path / "out", because=because)
    (tmp_path / "empty").mkdir()
    because = "empty: not a checkpoint; expected config.json (HF), or "
    refused("import", tmp_path / "empty", tmp_path / "out", because=because)


@pytest.mark.parametrize(
    ("damage", "because"),
    [
        (edit_config(architectures=["MambaForCausalLM"]), "'MambaForCausalLM' is not supported"),
        (edit_config(quantization_config={"quant_method": "fp8"}), "quantized weights (fp8)"),
        (edit_config(quantization_config={"quant_method": "awq"}), "quantized weights (awq)"),
        (edit_config(quantization_config={"quant_method": "gptq"}), "quantized weights (gptq)"),
        (edit_config(hidden_size=128), "] by config.json"),
        (edit_config(architectures=5), "config.json: architectures is 5; expected a list"),
        (edit_config(quantization_config="fp8"), "quantization_config is 'fp8'; expected an obj"),
        (edit_config(layer_types=[["x"]]), "expected full_attention, with one entry per layer"),
        (edit_config(rope_parameters=[1]), "rope_parameters is [1]; expected an object"),
        (edit_tensors(lambda t: t.update(x=torch.ones(1))), "model.safetensors: unexpected tens"),
        (
            edit_tensors(lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(1)})),
            "unexpected tensor model.layers.9.mlp.up_proj.weight",
        ),
        (edit_tensors(lambda t: t.pop(K)), f"hf: {K} is missing; expected all tensors of Qwen2For"),
        (
            edit_tensors(lambda t: t.update({Q: t[Q][:-1].clone()})),
            f"{Q} has shape [63, 64]; expected [64, 64] by config.json",
        ),
        (
            edit_tensors(lambda t: t.update({Q.replace(".weight", ".qweight"): t[K].clone()})),
            "self_attn.q_proj.qweight belongs to a quantized checkpoint",
        ),
        (
            edit_tensors(lambda t: t.update({Q + "_scale_inv": torch.ones(1, 1)})),
            "self_attn.q_proj.weight_scale_inv belongs to a quantized checkpoint",
        ),
        (
            edit_tensors(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})),
            f"{Q} has dtype F8_E4M3; expected one of F32, BF16, F16 (quantized checkpoints",
        ),
        (
            edit_tensors(lambda t: t.update({Q: t[Q].to(torch.int32)})),
            f"{Q} has dtype I32; expected one of F32, BF16, F16",
        ),
        (
            edit_tensors(lambda t: t.update({K: t[K].float()})),
            f"hf: {Q} is torch.bfloat16 and {K} is torch.float32; expected one dtype, since",
        ),
        (
            edit_tensors(lambda t: t.update({NORM: t[NORM], **in_fp32(t, "1.mlp.down_proj")})),
            "model.layers.0.mlp.down_proj.weight is torch.bfloat16 and "
            "model.layers.1.mlp.down_proj.weight is torch.float32; expected one dtype, since",
        ),
    ],
)
def test_a_folder_that_does_not_match_its_config_is_refused(damage, because, hf, tmp_path, refused):
    damage(hf)
    refused("import", hf, tmp_path / "out", because=because)


def in_fp32(tensors: dict[str, Tensor], word: str) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items() if word in name}


def test_dtypes_that_can_be_kept_are_kept_bit_for_bit(hf, tmp_path, convert):
    edit_tensors(lambda tensors: tensors.update(in_fp32(tensors, "norm")))(hf)
    convert("import", hf, tmp_path / "mcore")
    convert("export", tmp_path / "mcore", tmp_path / "back")
    convert("verify", hf, tmp_path / "mcore")
    before, after = load_file(hf / SINGLE), load_file(tmp_path / "back" / SINGLE)
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32, torch.bfloat16}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)


def test_custom_code_in_a_folder_is_never_run(hf, tmp_path, refused, convert):
    """The code would create the marker in tmp_path, where nothing may change."""
    (hf / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Own: pass\n")
    auto_map = {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Own"}
    edit_config(auto_map=auto_map)(hf)
    convert("import", hf, tmp_path / "known")  # a supported architecture does not need the map
    assert not (tmp_path / "marker").exists() and not (tmp_path / "known/hf/own.py").exists()
    edit_config(architectures=["Own"])(hf)
    because = "'Own' is not supported (auto_map names custom code, which is never run)"
    for arguments in (("import", hf, tmp_path / "out"), ("inspect", hf), ("verify", hf, hf)):
        refused(*arguments, because=because)


def as_pickles(folder: Path, *, indexed: bool = False) -> dict[str, Tensor]:
    """Replace the weights by files of torch.save: one file, or two files if indexed."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = list(tensors)
    files = {PICKLE_SINGLE: names}
    if indexed:
        files = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        weight_map = {name: file for file, held in files.items() for name in held}
        (folder / PICKLE_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for file, held in files.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    return tensors


@pytest.mark.parametrize("indexed", [False, True])
def test_pickles_are_read_on_request_only(indexed, hf, tmp_path, refused, convert):
    tensors = as_pickles(hf, indexed=indexed)
    refused("import", hf, tmp_path / "mcore", because=".bin: a pickle, which can run code when")
    convert("import", hf, tmp_path / "mcore", "--allow-pickle")
    convert("verify", hf, tmp_path / "mcore", "--allow-pickle")
    convert("export", tmp_path / "mcore", tmp_path / "back")
    back = load_file(tmp_path / "back" / SINGLE)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("content", "because"),
    [
        ([1, 2], "pytorch_model.bin: holds list; expected a dict of tensors"),
        ({NORM: [1.0]}, f"{NORM} is list; expected a tensor of F32, BF16, F16"),
        ({NORM: torch.ones(64, dtype=torch.int8)}, f"{NORM} is torch.int8; expected a tensor"),
        ({NORM: torch.ones(64)}, " more are missing; expected all tensors of Qwen2ForCausalLM"),
    ],
)
def test_pickles_of_other_objects_are_refused(content, because, hf, tmp_path, refused):
    as_pickles(hf)
    torch.save(content, hf / PICKLE_SINGLE)
    refused("import", hf, tmp_path / "out", "--allow-pickle", because=because)


@pytest.mark.parametrize("size", [0, 100, -1000])
def test_truncated_pickles_are_refused(size, hf, tmp_path, refused):
    as_pickles(hf)
    cut(PICKLE_SINGLE, size)(hf)
    because = "pytorch_model.bin: cannot be read as weights: "
    refused("import", hf, tmp_path / "out", "--allow-pickle", because=because)


@pytest.mark.parametrize("in_zip", [True, False])
def test_pickles_that_would_run_code_are_refused(in_zip, hf, tmp_path, refused):
    as_pickles(hf)
    content = {NORM: Evil(tmp_path / "marker")}
    torch.save(content, hf / PICKLE_SINGLE, _use_new_zipfile_serialization=in_zip)
    because = "pytorch_model.bin: cannot be read as weights: "
    because += f"the file calls {os.mkdir.__module__}.mkdir, which is not" if in_zip else "mmap"
    refused("import", hf, tmp_path / "out", "--allow-pickle", because=because)
    torch.load(hf / PICKLE_SINGLE, weights_only=False)
    assert (tmp_path / "marker").exists()  # an unrestricted loader runs the code


@pytest.mark.parametrize(
    ("family", "options", "because"),
    [
        (
            "qwen2",
            ("--tensor", 3),
            "parallel.tensor 3: expected a divisor of the model's 4 key/value",
        ),
        ("qwen2", ("--tensor", 8), "4 key/value heads; sizes that work: 1, 2, 4"),
        ("qwen2", ("--pipeline", 3), "pipeline-parallel size 3 does not divide the model's 4"),
        ("qwen2", ("--pipeline", 2, "--virtual-pipeline", 3), "3 chunks on each stage does not"),
        ("qwen2", ("--expert", 2), "parallel.expert 2: expected 1 for a dense model; sizes"),
        (
            "mixtral",
            ("--expert", 3),
            "expected a divisor of the model's 4 experts; sizes that work: 1, 2",
        ),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused(
    family, options, because, tmp_path, refused
):
    save_tiny_model(family, tmp_path / "hf")
    refused("import", tmp_path / "hf", tmp_path / "out", *options, because=because)
