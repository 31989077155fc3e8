"""Tests of load_weights: a run's checkpoint in any layout, compared with its export.

test_model_parity.py tests the shards of an HF folder.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from aropd_mcore import cli
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.import_export import import_hf
from aropd_mcore.convert.source import HFSource, open_source
from aropd_mcore.mcore import runtime
from aropd_mcore.mcore.model import StageModel, build_model
from aropd_mcore.mcore.weights import load_hf_weights, load_weights
from aropd_mcore.trainer.build import start_runtime
from aropd_mcore.trainer.loop import train
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_runs import write_model, write_run

pytestmark = pytest.mark.rest

WHO = ("student", "teacher")
Layouts = dict[int, list[dict[str, int]]]
"""World size -> settings of runtime.start."""
DENSE: Layouts = {
    1: [{}],
    2: [{"pipeline": 2, "virtual_pipeline": 2}],
    4: [{"tensor": 2, "pipeline": 2}],
}
EXPERTS: Layouts = {
    1: [{}],
    2: [{"expert": 2}, {"tensor": 2}, {"expert_tensor": 2}],
    4: [{"tensor": 2, "expert": 2}, {"expert": 2, "expert_tensor": 2}, {"expert": 2, "tensor": 4}],
}


def train_on_rank(path: Path, overrides: list[str]) -> None:
    config = load_config(path, overrides)
    train(config, start_runtime(config))


@pytest.mark.parametrize(
    ("family", "tie", "overrides", "layouts"),
    [
        # The teacher's average is fp32 while the weights are bf16, and the tied head is stored
        # once.
        ("qwen2", True, ["parallel.pipeline=2", "model.dtype=bf16"], DENSE),
        ("qwen3_moe", False, ["parallel.expert=2"], EXPERTS),
    ],
)
def test_load_weights_in_every_layout_equals_the_export(family, tie, overrides, layouts, tmp_path):
    path = write_run(tmp_path, training={"num_steps": 2, "global_batch_size": 4})
    write_model(tmp_path / "model", family, tie=tie)
    run_ranks(train_on_rank, 2, path, overrides)
    for role in WHO:
        arguments = ["convert", "export", str(tmp_path / "out"), str(tmp_path / role)]
        assert cli.main([*arguments, "--weights", role]) == 0
    for world_size in layouts:
        run_ranks(compare, world_size, tmp_path, layouts[world_size])


def compare(folder: Path, layouts: list[dict[str, int]]) -> None:
    for layout in layouts:
        rt = runtime.start(**layout)
        loaded: dict[str, StageModel] = {}
        for role in WHO:
            models: list[Any] = []
            for _ in range(2):
                models.append(build_model(folder / "out" / "hf", rt, dtype=torch.bfloat16))
                for p in models[-1].parameters():
                    p.data.fill_(torch.nan)
            load_weights(models[0], open_source(folder / "out", role=role), rt)
            load_hf_weights(models[1], folder / role, rt)
            assert_equal(*models)
            loaded[role] = models[0]
        students, teachers = (list(loaded[role].parameters()) for role in WHO)
        differ = [not torch.equal(s, t) for s, t in zip(students, teachers, strict=True)]
        assert sum(differ) > len(differ) // 2, "student and teacher have the same weights"
        runtime.stop()


def assert_equal(actual: StageModel, expected: StageModel) -> None:
    parameters = dict(expected.named_parameters())
    for name, p in actual.named_parameters():
        assert torch.equal(p, parameters[name]), name


def test_load_weights_accepts_other_padding_and_rejects_other_models(tmp_path):
    """One rank pads a vocabulary of 509 to 512 rows. Three tensor ranks pad it to 768."""
    for name, layers in (("model", 2), ("longer", 3)):
        save_tiny_model(
            "llama",
            tmp_path / name,
            num_hidden_layers=layers,
            hidden_size=96,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=16,
        )
        import_hf(HFSource(tmp_path / name), tmp_path / f"{name}-imported")
    run_ranks(load_imports, 3, tmp_path)


def load_imports(folder: Path) -> None:
    rt = runtime.start(tensor=3)
    models = [build_model(folder / "model", rt, dtype=torch.float32) for _ in range(2)]
    load_weights(models[0], open_source(folder / "model-imported"), rt)
    load_hf_weights(models[1], folder / "model", rt)
    assert_equal(*models)
    if rt.tp_rank == 2:  # rows 512 to 767
        assert not models[0].head_weight().any()
    with pytest.raises(CheckpointError, match=r"longer.*config\.json describes another model"):
        load_weights(models[0], open_source(folder / "longer-imported"), rt)
