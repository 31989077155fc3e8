"""Bitwise tests of conversion: every family, loaded and saved in every layout.

The reference is the HF folder, loaded directly into the layout. test_model_parity.py compares that
model with transformers.
"""

import importlib.util
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aropd_mcore.convert.hf_io import HFWeights
from aropd_mcore.convert.import_export import export_hf, import_hf
from aropd_mcore.convert.source import HFSource, MegatronSource
from aropd_mcore.convert.verify import verify
from tests.support.ranks import run_ranks
from tests.support.tiny_models import FAMILIES, MOE_FAMILIES, save_tiny_model

LAYOUTS = {  # world size -> settings of runtime.start
    1: [{}, {}],
    2: [
        {"tensor": 2},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"pipeline": 2, "layers_in_first_stage": 3},
        {"expert": 2},
    ],
    4: [
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "expert": 2},
        {"pipeline": 4, "pipeline_layout": "E|t*3|t|L"},
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "Et|tt|t|L"},
    ],
}


@dataclass(frozen=True)
class Case:
    """An HF folder and its import."""

    name: str
    hf: Path
    megatron: Path
    dtype: torch.dtype


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    """Models with tied and untied head, fp32 and bf16, one file and several. The vocabulary of 509
    is padded."""
    root = tmp_path_factory.mktemp("conversion")
    cases = []
    for number, family in enumerate(FAMILIES):
        for tie in (False, True):
            dtype = torch.bfloat16 if (number + tie) % 2 else torch.float32
            name = f"{family}-{'tied' if tie else 'untied'}-{str(dtype).removeprefix('torch.')}"
            case = Case(name, root / name / "hf", root / name / "megatron", dtype)
            limit = "5GB" if tie else "100KB"
            save_tiny_model(family, case.hf, tie=tie, dtype=dtype, max_shard_size=limit)
            import_hf(HFSource(case.hf), case.megatron)
            cases.append(case)
    return cases


def select_cases(layout: dict[str, Any], number: int, part: str, cases: list[Case]) -> list[Case]:
    """Select from the models that a layout supports: all, the first, or the others.

    The first is another model for each layout number.
    """
    possible = [c for c in cases if "expert" not in layout or c.name.startswith(MOE_FAMILIES)]
    first = possible[number % len(possible)]
    if part == "all":
        return possible
    return [case for case in possible if (case is first) == (part == "first")]


@pytest.mark.slow
def test_export_of_an_import_equals_the_original_bitwise(cases: list[Case], tmp_path: Path):
    for case in cases:
        back = tmp_path / case.name
        export_hf(MegatronSource(case.megatron, case.megatron / "iter_0000000"), back)
        assert_same_folder(back, case.hf)
        for path in case.hf.glob("*.json"):
            if "index" not in path.name:
                assert (back / path.name).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(
    ("world_size", "part"),
    [
        (2, "first"),
        (4, "first"),
        pytest.param(1, "all", marks=pytest.mark.matrix),
        pytest.param(2, "others", marks=pytest.mark.matrix),
        pytest.param(4, "others", marks=pytest.mark.matrix),
    ],
)
def test_conversion_in_every_layout_is_bitwise(
    world_size: int, part: str, cases: list[Case], tmp_path: Path
):
    layouts = LAYOUTS[world_size]
    selected = [select_cases(layout, n, part, cases) for n, layout in enumerate(layouts)]
    run_ranks(load_and_save_all, world_size, layouts, selected, tmp_path)
    for number, layout_cases in enumerate(selected):
        for case in layout_cases:
            saved, back = tmp_path / f"{number}-{case.name}", tmp_path / f"{number}-{case.name}-hf"
            export_hf(MegatronSource(saved, saved, hf=case.megatron / "hf"), back)
            assert_same_folder(back, case.hf)


def load_and_save_all(layouts: list[dict[str, Any]], selected: list[list[Case]], out: Path) -> None:
    from aropd_mcore.mcore import runtime

    for number, (layout, cases) in enumerate(zip(layouts, selected, strict=True)):
        rt = runtime.start(**layout)
        # With this setting, Megatron numbers the layers in the keys.
        metadata = {"non_homogeneous_layers": True} if number and not layout else None
        for case in cases:
            load_and_save(case, rt, out / f"{number}-{case.name}", metadata)
        runtime.stop()


@torch.no_grad()
def load_and_save(case: Case, rt, out: Path, metadata: dict | None) -> None:
    from megatron.core import dist_checkpointing  # after the CPU mode is installed

    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.weights import load_hf_weights

    model = build_model(case.hf, rt, dtype=case.dtype)
    load_hf_weights(model, case.hf, rt)
    expected = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.fill_(torch.nan)
    chunks = list(model)
    states = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(states, str(case.megatron / "iter_0000000"))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name]), (case.name, rt, name)
    if rt.rank == 0:
        out.mkdir()
    dist.barrier()
    states = {f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(chunks)}
    dist_checkpointing.save(states, str(out))


def test_import_is_accepted_by_megatron_lm(cases: list[Case]):
    if importlib.util.find_spec("megatron.training") is None:
        pytest.skip("this megatron-core lacks Megatron-LM's training package, which 0.19 has")
    run_ranks(read_as_megatron_lm, 1, cases[0])


def read_as_megatron_lm(case: Case) -> None:
    from aropd_mcore.mcore import runtime

    runtime.start()
    from megatron.training import checkpointing, global_vars  # after the CPU mode is installed

    checks = {"vocab_file": None, "data_parallel_random_init": False}
    places = {"non_persistent_global_ckpt_dir": None, "non_persistent_local_ckpt_dir": None}
    sizes = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8}
    args = Namespace(
        ckpt_step=None,
        ckpt_format="torch_dist",
        use_dist_ckpt=True,
        non_persistent_ckpt_type=None,
        exit_on_missing_checkpoint=True,
        add_position_embedding=False,
        phase_transition_iterations=None,
        **checks,
        **places,
        **sizes,
    )
    global_vars._GLOBAL_ARGS = args
    state, name, is_release, _ = checkpointing._load_base_checkpoint(
        str(case.megatron), args, rank0=True
    )
    assert (Path(name).name, is_release, state["iteration"]) == ("iter_0000000", False, 0)
    checkpointing.set_checkpoint_version(state["checkpoint_version"])
    checkpointing.check_checkpoint_args(state["args"])
    args.num_layers = 5
    with pytest.raises(AssertionError, match=r"num_layers value from checkpoint \(4\)"):
        checkpointing.check_checkpoint_args(state["args"])


def assert_same_folder(actual: Path, expected: Path) -> None:
    report = verify(HFSource(expected), HFSource(actual))
    assert report.same and report.tensors, actual
    assert list(HFWeights(actual).tensors) == list(HFWeights(expected).tensors), actual
