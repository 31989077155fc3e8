"""PEFT folders: read, merged, written, and loaded by peft itself; bad folders and targets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from aropd_mcore.convert.adapter import PeftFolder, resolve_targets, write_peft
from aropd_mcore.convert.architecture import CheckpointError, read_architecture
from aropd_mcore.convert.import_export import export_hf
from aropd_mcore.convert.source import AdaptedSource, HFSource, open_source
from tests.support.tiny_adapters import read_adapter, write_adapter
from tests.support.tiny_models import save_tiny_model

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("adapter") / "qwen2", "qwen2")


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    return write_adapter(tmp_path / "adapter", model, targets=ALL)


def save(folder: Path, family: str) -> Path:
    save_tiny_model(family, folder)
    return folder


def logits(model: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model.to(dtype).eval()(tokens).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_merged_export_and_every_shard_equal_base_plus_adapter(tmp_path, family):
    model = save(tmp_path / family, family)
    adapter = write_adapter(tmp_path / "adapter", model, targets=("k_proj", "o_proj", "up_proj"))
    source = open_source(model, adapter=adapter)
    assert isinstance(source, AdaptedSource)
    export_hf(source, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base, (pairs, scale) = load_file(model / "model.safetensors"), read_adapter(adapter)
    for name, tensor in base.items():
        pair = pairs.pop(name.removesuffix(".weight"), None)
        expected = tensor.double() + (scale * pair[1] @ pair[0] if pair else 0)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert not pairs, "not merged"

    whole = HFSource(tmp_path / "merged")
    for weight in source.architecture.weights():
        for rank in range(2):
            # The two sum the same numbers in other orders.
            torch.testing.assert_close(source.shard(weight, 2, rank), whole.shard(weight, 2, rank))


def test_peft_computes_the_same_with_both_folders(model, adapter, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    source = open_source(model, adapter=adapter)
    assert isinstance(source, AdaptedSource)
    export_hf(source, tmp_path / "merged")
    written = tmp_path / "written"
    write_peft(written, source.architecture, source.adapter, base_model=model)
    expected = logits(load(tmp_path / "merged"))
    for folder in (adapter, written):
        found = logits(peft.PeftModel.from_pretrained(load(model), folder))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((expected - logits(load(model))).abs().max()) > 0.1

    # Folders of peft itself are read, too.
    trained = peft.PeftModel.from_pretrained(load(model), adapter)
    trained.save_pretrained(tmp_path / "by-peft")
    by_peft = PeftFolder(tmp_path / "by-peft", source.architecture)
    assert by_peft.spec == source.adapter.spec
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    assert torch.equal(by_peft.read(name), source.adapter.read(name))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_peft_computes_the_same_with_adapters_of_experts(tmp_path, family):
    """peft joins the experts' pairs, as transformers joins their weights."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    model = save(tmp_path / family, family)
    of_experts = ("w1", "w2", "w3") if family == "mixtral" else ALL[-3:]
    adapter = write_adapter(tmp_path / "adapter", model, targets=("o_proj", *of_experts))
    source = open_source(model, adapter=adapter)
    assert isinstance(source, AdaptedSource)
    export_hf(source, tmp_path / "merged")
    write_peft(tmp_path / "written", source.architecture, source.adapter, base_model=model)
    fp32 = torch.float32  # joined experts have no fp64
    expected = logits(load(tmp_path / "merged"), fp32)
    found = logits(peft.PeftModel.from_pretrained(load(model), tmp_path / "written"), fp32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - logits(load(model), fp32)).abs().max()) > 0.1


def edit(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
BAD = {
    "no LoRA": (edit(peft_type="IA3"), "peft_type: found 'IA3', expected LORA"),
    "no rank": (edit(r=0), "r: found 0, expected a positive integer"),
    "another rank": (edit(r=8), r"lora_A.weight has shape \[4, \d+\]; expected \[8, \d+\]"),
    "no alpha": (edit(lora_alpha=None), "lora_alpha: found None, expected a positive number"),
    "one name": (edit(target_modules="all-linear"), "target_modules: found 'all-linear'"),
    "unknown target": (
        edit(target_modules=["c_attn"]),
        "target_modules: c_attn: matches no linear layer of Qwen2ForCausalLM; expected some of "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ),
    "fewer targets": (edit(target_modules=["q_proj"]), "unexpected tensor .*down_proj"),
    "DoRA": (edit(use_dora=True), "use_dora: found True, expected it off"),
    "rank pattern": (edit(rank_pattern={"q_proj": 8}), "rank_pattern: found"),
    "changed base": (edit(init_lora_weights="pissa"), "init_lora_weights: found 'pissa'"),
    "missing tensor": (
        edit_tensors(lambda tensors: tensors.pop(NAME)),
        f"{NAME} is missing; Qwen2ForCausalLM with the targets in adapter_config.json needs it",
    ),
    "another model": (
        edit_tensors(lambda tensors: tensors.update({NAME: torch.zeros(4, 32)})),
        r"has shape \[4, 32\]; expected \[4, 64\]",
    ),
    "another depth": (
        edit_tensors(lambda t: t.update({NAME.replace(".1.", ".9."): t[NAME].clone()})),
        "unexpected tensor .*layers.9.*Is it an adapter of another model",
    ),
    "no tensors": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors: cannot be read",
    ),
    "no settings": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "adapter_config.json: cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_is_refused_with_file_and_key(adapter, model, name):
    damage, message = BAD[name]
    damage(adapter)
    with pytest.raises(CheckpointError, match=message) as error:
        PeftFolder(adapter, read_architecture(model))
    assert str(adapter) in str(error.value)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_family_without_adapters_is_refused(tmp_path, family):
    architecture = read_architecture(save(tmp_path / family, family))
    with pytest.raises(ValueError, match="expected a model without"):
        resolve_targets(architecture, None)


def test_adapter_beside_weights_or_on_a_run_is_refused(adapter, model):
    with pytest.raises(CheckpointError, match="a PEFT adapter"):
        open_source(adapter)
    with pytest.raises(CheckpointError, match="expected the HF folder of the base model"):
        open_source(model, role="teacher", adapter=adapter)
