"""Planned parameters and memory of adapters, compared with built models and with a hand count."""

from math import prod

import pytest

from aropd_mcore.config_file import load_config
from aropd_mcore.convert.adapter import AdapterSpec
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.fit import build_planned_run
from aropd_mcore.plan.parameters import trained_parameters
from aropd_mcore.plan.setup import Setup
from tests.conftest import REPO
from tests.plan.test_parameters import MODELS
from tests.support.ranks import run_ranks

EXAMPLE = REPO / "examples" / "clusters" / "llama3.1-70b-lora-8xh100.yaml"
SPEC = AdapterSpec(4, 8.0, ("down_proj", "gate_proj", "k_proj", "o_proj"))
LAYOUTS = [
    {"tensor": 2, "pipeline": 2, "sequence": True},
    {"tensor": 2, "sequence": True, "expert": 2},
]


def test_counts_equal_those_of_built_models():
    run_ranks(compare, 4)


def compare() -> None:
    import torch

    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.adapter import attach_adapters
    from aropd_mcore.mcore.model import build_model

    for name in ("qwen2", "qwen3_moe"):
        architecture = read_architecture(MODELS[name])
        for layout in LAYOUTS:
            if layout.get("expert", 1) > 1 and architecture.routing is None:
                continue
            sizes = {k: v for k, v in layout.items() if k != "sequence"}
            rt = runtime.start(**sizes, sequence_parallel=True)
            model = build_model(architecture, rt, dtype=torch.float32)
            adapters = attach_adapters(model, SPEC, rt, seed=1)
            built = sum(prod(p.shape) for p in adapters.trained.values())
            setup = Setup(architecture, **layout, data=rt.dp_size, adapter=SPEC)
            assert trained_parameters(setup, rt.pp_rank).total == built, (name, layout)
            runtime.stop()


def test_70b_with_an_adapter_fits_on_8_gpus(monkeypatch):
    monkeypatch.chdir(REPO)
    config = load_config(EXAMPLE)
    run = build_planned_run(config, 8, gpus_per_node=8, memory_bytes=80e9)
    memory = run.estimate().memory
    hidden, ffn, kv, rank, tensor = 8192, 28672, 1024, 32, 8
    # Column-parallel: A whole and B cut. Row-parallel: A cut and B whole.
    column = (hidden + hidden / tensor) + 2 * (hidden + kv / tensor) + 2 * (hidden + ffn / tensor)
    row = (hidden / tensor + hidden) + (ffn / tensor + hidden)
    adapter = 80 * rank * (column + row)
    assert memory.state["adapter"] == 2 * adapter
    assert memory.state["gradients"] == 4 * adapter
    assert memory.state["fp32 main weights"] + memory.state["optimizer moments"] == 12 * adapter
    assert memory.state["teacher's adapter"] == 2 * adapter
    assert "teacher weights" not in memory.state
    assert memory.state["weights"] == pytest.approx(70.55e9 / 8 * 2, rel=1e-2)
    assert run.fits(memory)
