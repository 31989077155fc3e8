"""Runs with an adapter and vLLM servers: the adapter reaches the servers, in every layout.

The servers are fakes. They add the adapter to the base model and score with transformers.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aropd_mcore.config import SamplingConfig
from aropd_mcore.config_file import load_config
from aropd_mcore.rollout.engine import rollout_seed
from tests.support.fake_vllm import FakeVllm
from tests.support.ranks import run_ranks
from tests.support.rollouts import sample
from tests.support.tiny_adapters import write_adapter
from tests.support.tiny_runs import write_model, write_run
from tests.support.training import read_lines, train_on_ranks

KEY = "a key"
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    fake = FakeVllm(key=KEY)
    yield fake
    fake.die()


def write_adapter_run(
    folder: Path, fake: FakeVllm, family: str = "qwen2", **sections: dict[str, Any]
) -> Path:
    """Write a run that starts from a random adapter, and let the server start with its model."""
    vllm = {"urls": [fake.url], "retries": 1, "start_timeout": 4.0}
    path = write_run(
        folder,
        adapter={"rank": 4, "alpha": 8, "targets": TARGETS, "path": str(folder / "adapter")},
        rollout={"engine": "vllm", "max_response_tokens": 10, "vllm": vllm},
        **sections,
    )
    fake.base = write_model(folder / "model", family)
    write_adapter(folder / "adapter", fake.base, targets=TARGETS)
    return path


LAYOUTS = (
    ("qwen2", {"tensor": 2, "pipeline": 2}),
    ("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 4}),
    pytest.param(
        *("qwen2", {"pipeline": 2, "virtual_pipeline": 2, "context": 2}), marks=pytest.mark.rest
    ),
    pytest.param(*("qwen3_moe", {"pipeline": 2, "expert": 2}), marks=pytest.mark.rest),
)


@pytest.mark.parametrize(("family", "parallel"), LAYOUTS)
def test_server_gets_only_the_adapter_of_each_version(tmp_path, fake, family, parallel):
    path = write_adapter_run(tmp_path, fake, family, parallel=parallel)
    run_ranks(check_versions, 4, path)
    root = tmp_path / "out" / "vllm-weights"
    assert [folder.name for folder in fake.loaded] == ["step-0000000", "step-0000001"]
    assert [folder.name for folder in root.iterdir()] == ["step-0000001"]
    [folder] = root.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == FILES
    first = load_file(tmp_path / "adapter" / FILES[1])
    tensors = load_file(folder / FILES[1])
    assert tensors.keys() == first.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, 0.9 * first[name], msg=name)


def check_versions(path: Path) -> None:
    os.environ["VLLM_API_KEY"] = KEY
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = load_config(path)
    engine: Any = build_run(config, start_runtime(config)).engine
    for version in (0, 1):
        with torch.no_grad():  # "a step"
            for parameter in engine.model.adapters.trained.values():
                parameter.mul_(1 - 0.1 * version)
        # The server scores the probe with the base model and the adapter that it got.
        engine.update_weights(version)
        sampling = SamplingConfig(max_response_tokens=10)
        [rollout] = sample(engine, [[10, 11]], [rollout_seed(1, 0, 0)], sampling)
        assert rollout.weight_version == version
    os.environ.pop("VLLM_API_KEY")


def test_run_with_a_server_and_an_adapter_resumes(tmp_path, fake):
    training = {"num_steps": 4, "global_batch_size": 4, "micro_batch_size": 2}
    path = write_adapter_run(tmp_path, fake, parallel={"tensor": 2}, training=training)
    run_ranks(train, 2, path, ["training.num_steps=2"])
    run_ranks(train, 2, path, [])
    steps = [int(folder.name.removeprefix("step-")) for folder in fake.loaded]
    assert steps == [0, 1, 2, 2, 3, 4]
    assert len(fake.adapters) == 1
    lines = read_lines(tmp_path / "out")
    assert len(lines) == 4
    assert all("rollout_tokens_per_second" in line for line in lines)


def train(path: Path, overrides: list[str]) -> None:
    os.environ["VLLM_API_KEY"] = KEY
    train_on_ranks(path, overrides)
    os.environ.pop("VLLM_API_KEY")
