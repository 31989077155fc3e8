"""An HF folder with any file contents is opened, or refused in one line that names the folder."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.hf_io import INDEX, SINGLE
from aropd_mcore.convert.source import HFSource
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

FAMILIES = ("llama31", "mistral", "qwen2", "qwen3_moe", "mixtral")
SIZES = {
    "num_hidden_layers": 1,
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 2,
}
fuzz = settings(
    max_examples=3 * settings.default.max_examples,  # an example takes a millisecond
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 4)
    | st.sampled_from([2**31, 2**63, 10**400, -(10**400), math.inf, -math.inf, math.nan, 1e308])
    | st.floats()
    | st.sampled_from(["", "\n", "a\x00b", "\u2028", "../x", "x" * 300, "float32", SINGLE, INDEX])
    | st.text(max_size=4)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "\n"]), inner)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Create tiny models by family, and `shards`, a model with an index."""
    root = tmp_path_factory.mktemp("fuzz")
    for family in FAMILIES:
        save_tiny_model(family, root / family, dtype=torch.bfloat16, **SIZES)
    save_tiny_model("qwen2", root / "shards", max_shard_size="1KB", **{**SIZES, "vocab_size": 99})
    return {path.name: path for path in root.iterdir()}


def open_or_refuse(folder: Path) -> None:
    try:
        HFSource(folder)
    except CheckpointError as error:
        message = str(error)
        assert message.startswith(str(folder)) and message.isprintable(), message
        assert len(message) < 3000, "a huge value must not fill the screen"


@fuzz
@given(data=st.data())
def test_any_values_of_config_json_are_read_or_refused(
    data: st.DataObject, folders, tmp_path: Path
):
    original = folders[data.draw(st.sampled_from(FAMILIES))]
    config = json.loads((original / "config.json").read_text())
    keys = st.sampled_from([*config, "rope_scaling", "rope_theta", "torch_dtype", "num_experts"])
    config |= data.draw(st.dictionaries(keys, values, min_size=1, max_size=3))
    if isinstance(config.get("rope_parameters"), dict):
        rope_keys = st.sampled_from([*config["rope_parameters"], "type", "factor", "\x1b"])
        config["rope_parameters"] |= data.draw(st.dictionaries(rope_keys, values, max_size=2))
    folder = shutil.copytree(original, tmp_path / "hf", dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    open_or_refuse(folder)


@fuzz
@given(data=st.data())
def test_any_bytes_in_config_json_and_in_the_index_are_read_or_refused(
    data: st.DataObject, folders, tmp_path: Path
):
    """A file is truncated, overwritten or extended at any byte, or replaced by junk."""
    folder = shutil.copytree(folders["shards"], tmp_path / "hf", dirs_exist_ok=True)
    path = folder / data.draw(st.sampled_from(["config.json", INDEX]))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    junk = data.draw(
        st.binary(max_size=8) | st.sampled_from([b"[" * 3000, b"9" * 5000, b'{"a":1,'])
    )
    end = data.draw(st.sampled_from([start, start + len(junk), len(content)]))
    path.write_bytes(content[:start] + junk + content[end:])
    open_or_refuse(folder)


@fuzz
@given(data=st.data())
def test_any_values_in_the_index_are_read_or_refused(data: st.DataObject, folders, tmp_path: Path):
    folder = shutil.copytree(folders["shards"], tmp_path / "hf", dirs_exist_ok=True)
    index: Any = json.loads((folder / INDEX).read_text())
    names = st.sampled_from([*list(index["weight_map"])[:3], "x\ny"])
    files = st.sampled_from(list(index["weight_map"].values())[:2]) | values
    index["weight_map"] |= data.draw(st.dictionaries(names, files, max_size=3))
    index |= data.draw(
        st.dictionaries(st.sampled_from(["weight_map", "metadata"]), values, max_size=1)
    )
    (folder / INDEX).write_text(json.dumps(index))
    open_or_refuse(folder)


@fuzz
@given(data=st.data())
def test_any_header_of_a_safetensors_file_is_read_or_refused(
    data: st.DataObject, folders, tmp_path: Path
):
    folder = shutil.copytree(folders["mistral"], tmp_path / "hf", dirs_exist_ok=True)
    content = (folder / SINGLE).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header: Any = json.loads(content[8:start])
    name = data.draw(st.sampled_from(list(header)))
    numbers = st.lists(st.integers(-16, 64) | values, max_size=3)
    entries = {"dtype": values, "shape": numbers, "data_offsets": numbers}
    change = data.draw(st.fixed_dictionaries({}, optional=entries) | values)
    header[data.draw(st.sampled_from([name, "a\nb", "lm_head.weight"]))] = (
        {**header[name], **change} if isinstance(change, dict) else change
    )
    text = json.dumps(header).encode()
    text = text[: data.draw(st.just(len(text)) | st.integers(0, len(text)))]
    length = data.draw(st.just(len(text)) | st.sampled_from([0, 1, 2**40, 2**64 - 1]))
    whole = length.to_bytes(8, "little") + text + content[start:]
    (folder / SINGLE).write_bytes(whole[: data.draw(st.just(len(whole)) | st.integers(0, 200))])
    open_or_refuse(folder)
