"""One fact in two places: values that agree are read, values that disagree give an error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from aropd_mcore.convert.architecture import CheckpointError, read_architecture
from aropd_mcore.convert.folders import copy_companions
from aropd_mcore.convert.hf_io import INDEX, PICKLE_SINGLE, SINGLE
from aropd_mcore.convert.source import HFSource
from aropd_mcore.convert.windows import Windows
from tests.convert.test_architecture import (
    LLAMA,
    MISTRAL_7B,
    MIXTRAL_8X7B,
    QWEN3_30B_A3B,
    QWEN25_7B,
)
from tests.support.tiny_models import LLAMA31_ROPE, save_tiny_model

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA31 = {**LLAMA31_ROPE, "rope_theta": 500000.0}


@pytest.mark.parametrize(
    ("config", "places"),
    [
        # transformers 5 applies rope_scaling and ignores rope_parameters.
        (
            {**LLAMA, "rope_parameters": DEFAULT_ROPE, "rope_scaling": YARN},
            ("rope_scaling is {'factor': 4.0", "'yarn'", "rope_parameters is {", "'default'"),
        ),
        (
            {**LLAMA, "rope_parameters": LLAMA31, "rope_scaling": LLAMA31_ROPE},  # without theta
            ("rope_scaling is {", "rope_parameters is {", "10000.0", "500000.0"),
        ),
        (
            {**LLAMA, "rope_parameters": DEFAULT_ROPE, "rope_theta": 500000.0},
            ("rope_parameters.rope_theta is 10000.0 and rope_theta is 500000.0",),
        ),
        (
            {**LLAMA, "rope_parameters": DEFAULT_ROPE, "rope_theta": None},
            ("rope_parameters.rope_theta is 10000.0 and rope_theta is None",),
        ),
        (
            {**LLAMA, "rope_scaling": {**LLAMA31_ROPE, "rope_theta": 1.0}, "rope_theta": 2.0},
            ("rope_scaling.rope_theta is 1.0 and rope_theta is 2.0",),
        ),
        (
            {**LLAMA, "rope_scaling": {**LLAMA31_ROPE, "type": "yarn"}},
            ("rope_scaling.rope_type is 'llama3' and rope_scaling.type is 'yarn'",),
        ),
        (
            {**LLAMA, "rope_parameters": LLAMA31, "original_max_position_embeddings": 4096},
            (
                "original_max_position_embeddings is 4096 and "
                "rope_parameters.original_max_position_embeddings is 8192",
            ),
        ),
        ({**LLAMA, "rope_theta": None}, ("rope_theta is None; expected a positive number",)),
        (
            {**LLAMA, "rope_parameters": {**DEFAULT_ROPE, "factor": 4.0}},
            ("rope_parameters has the key 'factor', which is not supported with rope_type ",),
        ),
        (
            {**LLAMA, "rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
            ("rope_parameters.partial_rotary_factor is 0.5; only 1.0 is supported",),
        ),
        (
            {**LLAMA, "model_type": "mistral"},
            ("the model_type of architectures is 'llama' and model_type is 'mistral'",),
        ),
        (
            {**QWEN3_30B_A3B, "num_local_experts": 64},
            ("num_experts is 128 and num_local_experts is 64",),
        ),
        (
            {**MIXTRAL_8X7B, "num_experts": 64},
            ("num_local_experts is 8 and num_experts is 64",),
        ),
        (
            {**LLAMA, "dtype": "float32", "torch_dtype": "bfloat16"},
            ("dtype is 'float32' and torch_dtype is 'bfloat16'",),
        ),
        (
            {**LLAMA, "text_config": LLAMA},
            ("found key text_config, which describes a model inside",),
        ),
        ({**LLAMA, "per_layer_config": {"0": {}}}, ("found key per_layer_config",)),
        (
            {**LLAMA, "configuration_files": ["config.4.0.0.json"]},
            ("found key configuration_files",),
        ),
        ({**LLAMA, "transformers_weights": "x.safetensors"}, ("found key transformers_weights",)),
        (
            {**MISTRAL_7B, "layer_types": ["full_attention"] * 32},
            ("found key layer_types, which makes transformers 5 build a Ministral model",),
        ),
        ({**LLAMA, "is_causal": False}, ("is_causal is False; only True is supported",)),
        ({**LLAMA, "tie_word_embeddings": "false"}, ("tie_word_embeddings is 'false'",)),
    ],
)
def test_places_of_config_json_that_disagree_are_refused(config: dict, places: tuple[str, ...]):
    with pytest.raises(CheckpointError, match=r"^config\.json: ") as error:
        read_architecture(config)
    for place in places:
        assert place in str(error.value)


def test_places_of_config_json_that_agree_are_read():
    plain = read_architecture(LLAMA)
    for more in (
        {"rope_theta": 10000, "rope_parameters": DEFAULT_ROPE, "rope_scaling": None},
        {"rope_parameters": DEFAULT_ROPE, "rope_scaling": {"type": "default", "rope_theta": 1e4}},
        {
            "rope_parameters": {"rope_type": "default", "type": "default"},
            "partial_rotary_factor": 1,
        },
        {"rope_parameters": {}, "dtype": None, "torch_dtype": "bfloat16"},
        {"sliding_window": 16, "layer_types": ["full_attention"] * 32},  # Llama has no window
    ):
        assert read_architecture({**LLAMA, **more}) == plain
    scaled = read_architecture({**LLAMA, "rope_parameters": LLAMA31, "rope_scaling": LLAMA31})
    assert (scaled.rope.theta, scaled.rope.factor) == (500000.0, 8.0)
    both = read_architecture({**QWEN3_30B_A3B, "num_local_experts": 128})
    assert both == read_architecture(QWEN3_30B_A3B)


def test_a_sliding_window_is_read_by_the_rules_of_the_family():
    """Qwen enables the window by use_sliding_window. Mistral always has one, with a default."""
    config = {**MISTRAL_7B, "use_sliding_window": False}
    assert read_architecture(config).windows == Windows(4096, (True,) * 32)
    del config["sliding_window"]
    assert read_architecture(config).windows == Windows(4096, (True,) * 32)
    config["sliding_window"] = None
    assert read_architecture(config).windows is None
    moe = {**QWEN3_30B_A3B, "sliding_window": 16}
    assert read_architecture(moe).windows is None
    on = {"use_sliding_window": True}
    assert read_architecture({**moe, **on}).windows == Windows(16, (True,) * 48)
    qwen = {**QWEN25_7B, **on, "max_window_layers": 26}
    expected = Windows(131072, (False,) * 26 + (True,) * 2)
    assert read_architecture(qwen).windows == expected
    types = ["full_attention"] * 26 + ["sliding_attention"] * 2
    assert read_architecture({**QWEN25_7B, **on, "layer_types": types}).windows == expected


def test_a_key_with_two_values_is_refused(tmp_path: Path):
    text = json.dumps(LLAMA)
    (tmp_path / "config.json").write_text(f'{text[:-1]}, "rms_norm_eps": 1e-06}}')
    with pytest.raises(CheckpointError, match="'rms_norm_eps' occurs twice, as 1e-05 and as 1e-06"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text(f'{text[:-1]}, "rms_norm_eps": 1e-05}}')
    assert read_architecture(tmp_path) == read_architecture(LLAMA)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model("qwen2", tmp_path / "hf", num_hidden_layers=1)
    return tmp_path / "hf"


def store(folder: Path, files: dict[str, dict[str, torch.Tensor]], index: dict[str, str]) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def halved(folder: Path) -> dict[str, torch.Tensor]:
    return {name: 0.5 * tensor for name, tensor in load_file(folder / SINGLE).items()}


def single_file_and_old_index(folder: Path) -> None:
    old = halved(folder)
    store(folder, {"old.safetensors": old}, dict.fromkeys(old, "old.safetensors"))


def shards_of_one_model(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    names = sorted(tensors := load_file(folder / SINGLE))
    (folder / SINGLE).unlink()
    return tuple({name: tensors[name] for name in part} for part in (names[::2], names[1::2]))  # type: ignore[return-value]


def tensor_in_two_shards(folder: Path) -> None:
    first, second = shards_of_one_model(folder)
    name = min(first)
    index = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    store(
        folder,
        {"a.safetensors": first, "b.safetensors": {**second, name: 2 * first[name]}},
        index,
    )


def unlisted_tensor(folder: Path) -> None:
    first, second = shards_of_one_model(folder)
    index = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    del index["lm_head.weight"]
    store(folder, {"a.safetensors": first, "b.safetensors": second}, index)


def different_head_although_tied(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def adapter_in_the_folder(folder: Path) -> None:
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}
    save_file(lora, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))


def key_twice_in_the_index(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    store(folder, {"a.safetensors": tensors}, dict.fromkeys(tensors, "a.safetensors"))
    (folder / SINGLE).unlink()
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace("}}", ', "lm_head.weight": "b.safetensors"}}'))


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (single_file_and_old_index, f"holds {SINGLE} and {INDEX}, which names other files"),
        (tensor_in_two_shards, "both a.safetensors and b.safetensors hold lm_head.weight"),
        (unlisted_tensor, "does not list lm_head.weight, which a.safetensors holds"),
        (
            different_head_although_tied,
            "lm_head.weight has other values than model.embed_tokens.weight",
        ),
        (adapter_in_the_folder, "adapter_config.json: a PEFT adapter, which transformers applies"),
        (key_twice_in_the_index, "'lm_head.weight' occurs twice, as 'a.safetensors' and as 'b."),
    ],
)
def test_weights_in_two_places_are_refused_by_every_command(
    make: Callable[[Path], Any], because: str, folder: Path, tmp_path: Path, refused
):
    shutil.copytree(folder, tmp_path / "good")
    make(folder)
    refused("import", folder, tmp_path / "out", because=because)
    refused("verify", tmp_path / "good", folder, because=because)
    with pytest.raises(CheckpointError):
        HFSource(folder)


def test_weights_that_transformers_does_not_read_are_ignored(folder: Path):
    """Published folders have the same model in other formats in addition to safetensors."""
    (folder / "original").mkdir()
    for name in (PICKLE_SINGLE, "pytorch_model.bin.index.json", "consolidated.safetensors"):
        (folder / name).write_bytes(b"other weights")
    (folder / "model.fp16.safetensors").write_bytes(b"a variant")
    (folder / "original" / "consolidated.00.pth").write_bytes(b"other weights")
    tensors = load_file(folder / SINGLE)
    assert HFSource(folder).tensors.keys() == tensors.keys()
    store(folder, {}, dict.fromkeys(tensors, SINGLE))  # an index of the single file
    assert HFSource(folder).tensors.keys() == tensors.keys()


def test_transformers_reads_the_single_file_and_unlisted_tensors(folder: Path):
    """The errors above assume this behaviour of transformers."""
    expected = load_file(folder / SINGLE)
    single_file_and_old_index(folder)
    assert_loads(folder, expected)
    unlisted_tensor(folder)
    assert_loads(folder, expected)


def assert_loads(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_an_adapter_is_not_copied_into_exports(folder: Path, tmp_path: Path):
    adapter_in_the_folder(folder)
    (tmp_path / "target").mkdir()
    copy_companions(folder, tmp_path / "target")
    copied = {path.name for path in (tmp_path / "target").iterdir()}
    assert copied == {"config.json", "generation_config.json"}


def test_an_export_in_another_dtype_states_it_under_every_key(folder: Path, tmp_path: Path):
    """transformers 5 prefers `dtype`, so an old value would load the export in the old dtype."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    (tmp_path / "target").mkdir()
    copy_companions(folder, tmp_path / "target", torch.bfloat16)
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
