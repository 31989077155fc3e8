"""Runs that train a LoRA adapter. Their steps are compared with an oracle in test_step.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aropd_mcore.cli.entry import main
from aropd_mcore.config import ConfigError
from aropd_mcore.config_file import load_config
from aropd_mcore.trainer.preflight import open_inputs
from tests.support.ranks import run_ranks
from tests.support.tiny_adapters import read_adapter, write_adapter
from tests.support.tiny_runs import write_model, write_run
from tests.support.training import (
    assert_same_in_any_layout,
    read_checkpoints,
    read_lines,
    repeatable,
    saved_steps,
    train_on_ranks,
)

SQUARE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
"""Layers with 64 inputs in the tiny model."""


def start(path: Path, overrides: list[str]) -> Any:
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = load_config(path, overrides)
    return build_run(config, start_runtime(config))


def hf_tensors(run: Any) -> dict[str, Tensor]:
    from tests.support.gathered import iter_hf_tensors

    tensors = iter_hf_tensors(run.student.model, run.runtime)
    return {name: tensor.clone() for name, tensor in tensors if tensor is not None}


def test_full_rank_adapter_takes_the_dense_step(tmp_path):
    """With A = 1, B = 0 and scale 1, the gradient of B is that of W. AdamW's first update of B is
    then W's, and A has no gradient."""
    path = write_run(tmp_path, optimizer={"clip_grad": 0.0, "eps": 1e-4})
    folder = write_adapter(
        tmp_path / "adapter", tmp_path / "model", targets=SQUARE, rank=64, alpha=64.0
    )
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        tensors[name] = torch.eye(64) if ".lora_A." in name else torch.zeros_like(tensor)
    save_file(tensors, file)
    adapter = {"rank": 64, "alpha": 64, "targets": list(SQUARE), "path": str(folder)}
    run_ranks(compare_with_dense_step, 1, path, f"adapter={json.dumps(adapter)}")


def compare_with_dense_step(path: Path, adapter: str) -> None:
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.step import train_step

    before, after = {}, {}
    for name, overrides in (("dense", []), ("adapter", [adapter])):
        run = start(path, overrides)
        before[name] = hf_tensors(run)
        train_step(run, 0)
        after[name] = hf_tensors(run)
        runtime.stop()
    for name, weight in before["dense"].items():
        assert torch.equal(weight, before["adapter"][name]), name
        update = after["adapter"][name] - weight
        if name.split(".")[-2] in SQUARE and name.endswith(".weight"):
            expected = after["dense"][name] - weight
            assert float(expected.abs().max()) > 1e-4
            assert float((update - expected).abs().max()) < 2e-6, name
        else:
            assert not update.any(), f"{name} is frozen"


def test_switched_off_adapter_is_the_base_model_bitwise(tmp_path):
    path = write_run(tmp_path)
    folder = write_adapter(tmp_path / "adapter", tmp_path / "model", targets=SQUARE)
    adapter = {"rank": 4, "alpha": 8, "targets": list(SQUARE), "path": str(folder)}
    run_ranks(check_switch, 1, path, f"adapter={json.dumps(adapter)}")


def check_switch(path: Path, adapter: str) -> None:
    from aropd_mcore.mcore import runtime
    from aropd_mcore.numerics import chunks
    from aropd_mcore.trainer.step import train_step

    run = start(path, ["teacher.kind=frozen"])
    base, expected = hf_tensors(run), hidden_states(run)
    runtime.stop()

    run = start(path, ["teacher.kind=frozen", adapter])
    model, teacher = run.student.model, run.teacher
    adapters = model.adapters
    with adapters.using(None):
        assert all(torch.equal(t, base[name]) for name, t in hf_tensors(run).items())
        assert torch.equal(hidden_states(run), expected)
    assert not torch.equal(hidden_states(run), expected)
    with teacher.weights_on_device():
        assert torch.equal(hidden_states(run), expected)
    assert teacher.model is model, "no second copy of the model"

    trained = {id(p) for p in adapters.trained.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    in_buffers = [p for chunk in run.student.optimizer.ddp_chunks for p in chunk.params_with_grad]
    assert {id(p) for p in in_buffers} == trained
    calls = []
    original = chunks._Heads.add_weight_gradient
    chunks._Heads.add_weight_gradient = lambda *_: calls.append(1)  # type: ignore[method-assign]
    try:
        train_step(run, 0)
    finally:
        chunks._Heads.add_weight_gradient = original  # type: ignore[method-assign]
    assert not calls, "the loss forms a gradient of the frozen head"
    with adapters.using(None):
        assert all(torch.equal(t, base[name]) for name, t in hf_tensors(run).items())
    runtime.stop()


def hidden_states(run: Any) -> Tensor:
    tokens = torch.arange(2, 42)[None]
    with torch.no_grad():
        return run.student.model[0](tokens, torch.arange(40)[None], None)


@pytest.mark.rest
def test_adapter_run_resumes_bitwise_and_is_exported(tmp_path):
    path = write_run(
        tmp_path,
        adapter={"rank": 4, "targets": ["q_proj", "down_proj"]},
        checkpoint={"save_every_steps": 2, "asynchronous": False},
    )
    path.write_text(path.read_text().replace("dtype: fp32", "dtype: bf16"))
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_ranks(train_on_ranks, 2, path, [f"output_dir={whole}"])
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "iter_0000004")
    other_layout = tmp_path / "other-layout"
    shutil.copytree(out, other_layout)
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}"])
    assert saved_steps(out) == [2, 4]
    lines, expected_lines = read_lines(out), read_lines(whole)
    assert repeatable(lines[-2:]) == repeatable(expected_lines[-2:])
    state, expected = run_ranks(read_checkpoints, 1, [out, whole])[0]
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(state[name], value) if torch.is_tensor(value) else state[name] == value
        assert same, name
    tensors = {name for name, value in state.items() if torch.is_tensor(value)}
    assert not any("decoder." in name or "embedding." in name for name in tensors), "no base"
    of_b = "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"
    assert {of_b, f"teacher.{of_b}", f"optimizer.state.exp_avg.{of_b}"} <= tensors
    assert state[f"teacher.{of_b}"].dtype == torch.float32

    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    run_ranks(train_on_ranks, 2, path, [f"output_dir={other_layout}", *layout])
    assert len(read_lines(other_layout)) == len(lines)

    check_exports(path, out, state[of_b], state[f"teacher.{of_b}"], tmp_path)
    check_refusals(path, out, tmp_path)


def check_exports(
    path: Path, out: Path, student_b: Tensor, teacher_b: Tensor, folder: Path
) -> None:
    peft, teacher, merged, again = (folder / n for n in ("peft", "teacher", "merged", "again"))
    assert main(["convert", "export", str(out), str(peft)]) == 0
    assert main(["convert", "export", str(out), str(teacher), "--weights", "teacher"]) == 0
    name = "model.layers.3.mlp.down_proj"
    pairs, scale = read_adapter(peft)
    assert torch.equal(pairs[name][1], student_b.double())
    assert torch.equal(read_adapter(teacher)[0][name][1], teacher_b.double())
    assert main(["convert", "export", str(out), str(merged), "--merged"]) == 0
    arguments = ["convert", "export", str(folder / "model"), str(again), "--adapter", str(peft)]
    assert main(arguments) == 0
    base, weights = (load_file(f / "model.safetensors") for f in (folder / "model", merged))
    for weight, tensor in load_file(again / "model.safetensors").items():
        assert torch.equal(weights[weight], tensor), weight
        pair = pairs.get(weight.removesuffix(".weight"))
        expected = base[weight].double() + (scale * pair[1] @ pair[0] if pair else 0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    assert main(["convert", "inspect", str(out)]) == 0

    # A new run begins with the exported adapter.
    config = load_config(path, [f"adapter.path={peft}", f"output_dir={folder / 'next'}"])
    inputs = open_inputs(config)
    assert inputs.adapter is not None and inputs.adapter.tensors is not None
    with pytest.raises(ConfigError, match=r"adapter.rank 8: expected 4, the value of the adapter"):
        open_inputs(load_config(path, [f"adapter.path={peft}", "adapter.rank=8"]))


def check_refusals(path: Path, out: Path, folder: Path) -> None:
    from aropd_mcore.trainer.preflight import preflight

    other = write_model(folder / "other", initializer_range=0.1, seed=5)
    for override, key in (
        (f"model.path={other}", "adapter.base"),
        ("adapter.rank=8", "adapter.rank"),
        ("adapter=null", "adapter.rank"),
    ):
        with pytest.raises(ConfigError, match=f"belongs to another run:(.|\n)*{key}"):
            preflight(load_config(path, [f"output_dir={out}", override]))
    with pytest.raises(ValueError, match="has other weights than the base model of the adapter"):
        from aropd_mcore.convert.source import open_source

        open_source(out, hf=other)


IMPOSSIBLE = {
    "precision.fp8=hybrid": "adapter is set and precision.fp8",
    "rollout.cuda_graphs=true": "adapter is set and rollout.cuda_graphs is true",
    "objective.router_aux_loss_coeff=0.1": "adapter is set and objective.router_aux_loss_coeff",
    "rollout.engine=vllm rollout.vllm.sync=nccl": "and rollout.vllm.sync is nccl",
    "rollout.engine=vllm rollout.vllm.checksums=true": "and rollout.vllm.checksums is true",
    "teacher.weights=host": "adapter is set and teacher.weights is host",
    "adapter.targets=[c_attn]": "adapter.targets: c_attn: matches no linear layer of Qwen2",
    "adapter.path=nowhere": "adapter.path: nowhere/adapter_config.json: cannot be read",
}


@pytest.mark.parametrize("overrides", IMPOSSIBLE)
def test_impossible_adapter_is_refused(tmp_path, overrides):
    path = write_run(tmp_path, adapter={"rank": 4})
    with pytest.raises(ConfigError, match=IMPOSSIBLE[overrides]):
        open_inputs(load_config(path, ["model.dtype=bf16", *overrides.split()]))


LAYOUTS = {
    "adapter.targets=[gate_proj] parallel.expert=2": "have no such layer outside of split experts",
    "parallel.expert_tensor=2": "expected 1, since adapters of experts are not split",
    "parallel.pipeline=2 parallel.pipeline_layout=E|ttttL": "the 0 layers of stage 0",
    "rollout.engine=vllm adapter.rank=513": "rollout.engine vllm: adapter.rank 513: expected at",
    "rollout.engine=vllm adapter.targets=[up_proj]": "expected also down_proj, gate_proj, since",
}


@pytest.mark.parametrize("overrides", LAYOUTS)
def test_layout_that_cannot_have_the_adapter_is_refused(tmp_path, overrides):
    from aropd_mcore.plan.layout import plan

    path = write_run(tmp_path, adapter={"rank": 4})
    model = f"model.path={write_model(tmp_path / 'experts', 'qwen3_moe')}"
    with pytest.raises(ConfigError, match=LAYOUTS[overrides]):
        plan(load_config(path, [model, *overrides.split()]), 4)


@pytest.mark.rest
def test_experts_only_learn_in_one_optimizer(tmp_path):
    """Without expert parallelism, the experts' adapters need no others beside them."""
    path = write_run(tmp_path, adapter={"rank": 4, "targets": ["w1", "w2"]})
    model = f"model.path={write_model(tmp_path / 'experts', 'mixtral')}"
    run_ranks(train_on_ranks, 1, path, [model, "training.num_steps=1"])
    out = tmp_path / "by-two"
    layout = ["parallel.tensor=2", "parallel.sequence=true", "training.num_steps=1"]
    run_ranks(train_on_ranks, 2, path, [model, f"output_dir={out}", *layout])
    assert_same_in_any_layout(read_lines(out), read_lines(tmp_path / "out"))
