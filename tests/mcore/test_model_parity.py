"""Parity of the Megatron model with transformers, and bitwise exports, in all layouts.

The reference is computed once, in the test's process. Each world size then runs all its layouts and
models in one call. The families are FAMILIES of tests/support/tiny_models.py.
tests/convert/test_architecture.py checks that each family of convert/mapping.py is there.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.ranks import run_ranks
from tests.support.tiny_models import BIASED_EXPERTS, FAMILIES, MOE_FAMILIES, TINY, save_tiny_model

NUM_PROMPT_TOKENS = 24
NUM_NEW_TOKENS = 8


class Layout(NamedTuple):
    """Arguments of runtime.start. Data parallelism takes the remaining ranks."""

    tensor: int
    pipeline: int
    expert: int = 1
    virtual_pipeline: int = 1
    expert_tensor: int = 1


LAYOUTS = {  # by world size
    1: [Layout(1, 1)],
    2: [
        Layout(2, 1),
        Layout(1, 2),
        Layout(1, 2, virtual_pipeline=2),
        Layout(1, 1, expert=2),
        Layout(2, 1, expert_tensor=2),
        Layout(1, 1, expert_tensor=2),
        Layout(2, 1, expert=2),
    ],
    4: [
        Layout(2, 2),
        Layout(4, 1),
        Layout(1, 4),
        Layout(2, 1),
        Layout(2, 1, expert=2),
        Layout(2, 1, expert=4),  # experts over tensor ranks and replicas
        Layout(2, 2, expert=2),
        Layout(2, 1, expert=2, expert_tensor=2),
        Layout(4, 1, expert_tensor=2),
        Layout(1, 2, expert_tensor=2),
    ],
}


@dataclass(frozen=True)
class Case:
    """A saved model, and its outputs in transformers in fp32."""

    name: str
    folder: Path
    has_experts: bool
    tokens_BS: torch.Tensor
    """Prompts, each followed by transformers' greedy continuation."""
    logits_BSV: torch.Tensor


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    root = tmp_path_factory.mktemp("models")
    prompt = torch.randint(
        0, TINY["vocab_size"], (2, NUM_PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)
    )
    tied = [family for family in FAMILIES if family not in MOE_FAMILIES[1:]]  # once is enough
    return [_case(root, family, False, prompt) for family in FAMILIES] + [
        _case(root, family, True, prompt) for family in tied
    ]


def _case(root: Path, family: str, tie: bool, prompt: torch.Tensor) -> Case:
    name = f"{family}-{'tied' if tie else 'untied'}"
    model = save_tiny_model(family, root / name, tie=tie)
    with torch.no_grad():
        tokens = model.generate(
            prompt, do_sample=False, max_new_tokens=NUM_NEW_TOKENS, eos_token_id=-1
        )
        logits = model(tokens).logits
    return Case(name, root / name, family in MOE_FAMILIES, tokens, logits)


@pytest.mark.parametrize(
    ("world_size", "part"),
    [
        (1, "all"),
        (4, "first"),
        pytest.param(2, "all", marks=pytest.mark.matrix),
        pytest.param(4, "others", marks=pytest.mark.matrix),
    ],
)
def test_model_in_every_layout_matches_transformers_and_exports_bitwise(
    world_size: int, part: str, cases: list[Case], tmp_path: Path
):
    by_name = {case.name: case for case in cases}
    selected = {
        layout: _select_cases(layout, number, part, cases)
        for number, layout in enumerate(LAYOUTS[world_size])
    }
    for results in run_ranks(_compute_and_export, world_size, selected, tmp_path):
        for (layout, name), logits in results.items():
            case, label = by_name[name], f"{name}, {layout}"
            torch.testing.assert_close(
                logits, case.logits_BSV, atol=1e-4, rtol=0, msg=lambda m, w=label: f"{w}: {m}"
            )
            # Each new token has the largest logit, so greedy decoding would choose it.
            chosen = logits[:, NUM_PROMPT_TOKENS - 1 : -1].argmax(-1)
            assert torch.equal(chosen, case.tokens_BS[:, NUM_PROMPT_TOKENS:]), label

    for layout, layout_cases in selected.items():
        for case in layout_cases:
            folder = tmp_path / _export_name(layout, case)
            _assert_bitwise(folder, case.folder)
            for name in ("config.json", "generation_config.json"):
                assert (folder / name).read_text() == (case.folder / name).read_text(), folder


def _select_cases(layout: Layout, number: int, part: str, cases: list[Case]) -> list[Case]:
    """Select from the models that a layout supports: all, the first, or the others.

    The first is another model for each layout number.
    """
    shares_experts = layout.expert * layout.expert_tensor > 1
    possible = [case for case in cases if case.has_experts or not shares_experts]
    if layout.expert_tensor > 1:
        possible = [case for case in possible if not case.name.startswith(BIASED_EXPERTS)]
    first = possible[number % len(possible)]
    if part == "all":
        return possible
    return [case for case in possible if (case is first) == (part == "first")]


def _export_name(layout: Layout, case: Case) -> str:
    return "-".join(map(str, (*layout, case.name)))


def _compute_and_export(selected: dict[Layout, list[Case]], out: Path) -> dict[tuple, torch.Tensor]:
    """Compute logits of the selected models in each layout, and export the models."""
    from aropd_mcore.mcore import runtime
    from tests.support.gathered import export_model

    results = {}
    for layout, cases in selected.items():
        rt = runtime.start(**layout._asdict())
        for case in cases:
            model = _load(case.folder, rt)
            # Each replica has another order of rows. If replicas share experts and a token returns
            # to the wrong rank, the logits then differ.
            tokens = case.tokens_BS.roll(rt.dp_rank, 0)
            results[layout, case.name] = _logits(model, tokens, rt).roll(-rt.dp_rank, 0)
            export_model(model, case.folder, out / _export_name(layout, case), rt)
        runtime.stop()
    return results


def test_config_without_a_key_gives_the_logits_of_the_family_default(tmp_path: Path):
    tokens = torch.randint(
        0, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(3)
    )
    for family, key, settings in (
        ("mixtral", "rope_parameters", {}),  # theta is 1e6; in other families it is 1e4
        ("mistral", "num_key_value_heads", {"num_key_value_heads": 8}),
        ("qwen3_moe", "head_dim", {"head_dim": 8}),
    ):
        folder = tmp_path / family
        save_tiny_model(family, folder, num_hidden_layers=2, **settings)
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        [logits] = run_ranks(_single_rank_logits, 1, folder, tokens)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def _single_rank_logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    from aropd_mcore.mcore import runtime

    rt = runtime.start()
    return _logits(_load(folder, rt), tokens_BS, rt)


def test_model_with_padded_vocabulary_decodes_with_a_cache(tmp_path: Path):
    save_tiny_model("qwen3", tmp_path / "model", vocab_size=70)
    run_ranks(_check_padding_and_cache, 2, tmp_path / "model")


def _check_padding_and_cache(folder: Path) -> None:
    from aropd_mcore.mcore import runtime

    rt = runtime.start(tensor=2)
    [model] = _load(folder, rt)  # one chunk
    from megatron.core.inference.contexts import StaticInferenceContext  # after the CPU mode

    assert (model.vocab_size, model.padded_vocab_size) == (70, 128)
    head = model.head_weight()
    assert head.shape == (64, 64)
    padded_rows = head[6:] if rt.tp_rank == 1 else head[:0]
    assert not padded_rows.any()

    tokens = torch.randint(0, 70, (2, 9), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(9).expand(2, 9)
    with torch.no_grad():
        whole = model(tokens, positions, None)
        context = StaticInferenceContext(2, 9)
        pieces = []
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            piece = slice(start, end)
            pieces.append(
                model(tokens[:, piece], positions[:, piece], None, inference_context=context)
            )
            context.sequence_len_offset = end
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-5, rtol=0)


def test_unusable_folder_raises_on_every_rank(tmp_path: Path):
    odd = {"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}
    save_tiny_model("llama", tmp_path / "odd", hidden_size=48, **odd)
    save_tiny_model("llama", tmp_path / "other", num_hidden_layers=2)
    run_ranks(_check_errors, 2, tmp_path)


def test_start_with_incompatible_sizes_raises():
    run_ranks(_check_sizes, 2)


def _check_sizes() -> None:
    from aropd_mcore.mcore import runtime

    for sizes, message in (
        ({"tensor": 2, "pipeline": 2}, "2 processes cannot be .* start a multiple of 4 processes$"),
        ({"tensor": 2, "expert": 3}, "tensor 2 .* sharded over parallel.expert 3 ranks; .* of 6 "),
        ({"expert_tensor": 4}, "experts sharded over parallel.expert_tensor 4 ranks; .* of 4 "),
        ({"pipeline": 2, "expert": 2}, "start a multiple of 4 processes$"),
        ({"virtual_pipeline": 2}, "parallel.virtual_pipeline 2 with parallel.pipeline 1: expected"),
        ({"sequence_parallel": True}, "parallel.sequence true with parallel.tensor 1: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.start(**sizes)


def _check_errors(folder: Path) -> None:
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.weights import load_hf_weights

    rt = runtime.start(tensor=2)
    with pytest.raises(ValueError, match=r"^parallel.tensor 2: .* the model's 3 key"):
        build_model(folder / "odd", rt, dtype=torch.float32)
    model = build_model(folder / "other", rt, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"odd/config\.json describes another model"):
        load_hf_weights(model, folder / "odd", rt)
    runtime.stop()
    rt = runtime.start(pipeline=2)
    with pytest.raises(ValueError, match="size 2 does not divide the model's 3 layers"):
        build_model(folder / "odd", rt, dtype=torch.float32)
    runtime.stop()
    rt = runtime.start(pipeline=2, virtual_pipeline=2)
    with pytest.raises(ValueError, match=r"2 x 2 chunks on each stage does not divide .* 2 layers"):
        build_model(folder / "other", rt, dtype=torch.float32)


def test_checkpoint_names_match_the_weight_table(tmp_path: Path):
    """Transformer Engine's layers have the same names, so both specs read the same checkpoints."""
    for family in ("qwen2", "qwen3", "qwen3_moe", "mixtral"):
        save_tiny_model(family, tmp_path / family, num_hidden_layers=2)
        run_ranks(_check_checkpoint_names, 1, tmp_path / family)


def _check_checkpoint_names(folder: Path) -> None:
    from aropd_mcore.mcore import runtime

    [model] = _load(folder, runtime.start())  # one chunk
    keys = {tensor.key for tensor in model.sharded_state_dict().values()}
    # A checkpoint joins a weight of all layers and experts into one tensor, so its key has no
    # numbers.
    table_keys = {
        re.sub(r"\.(layers|local_experts)\.\d+\.", r".\1.", weight.fused_name or weight.name)
        for weight in model.architecture.weights()
    }
    table_keys = {name.replace("local_experts", "experts") for name in table_keys}
    assert {key for key in keys if not key.endswith("_extra_state")} == table_keys


def _load(folder: Path, rt, dtype: torch.dtype = torch.float32) -> Any:
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.weights import load_hf_weights

    model = build_model(folder, rt, dtype=dtype).eval()
    load_hf_weights(model, folder, rt)
    return model


@torch.no_grad()
def _logits(model: Any, tokens_BS: torch.Tensor, rt) -> torch.Tensor:
    """Compute logits [B, S, V] without padding on every rank, by plain sends between chunks."""
    batch, length = tokens_BS.shape
    previous_rank, next_rank = (
        dist.get_global_rank(rt.pp_group, (rt.pp_rank + step) % rt.pp_size) for step in (-1, 1)
    )
    hidden = torch.empty(length, batch, TINY["hidden_size"])
    for chunk in model:
        if not chunk.pre_process:
            dist.recv(hidden, previous_rank, group=rt.pp_group)
            chunk.set_input_tensor(hidden)
        hidden = chunk(tokens_BS, torch.arange(length).expand(batch, length), None)
        if not chunk.post_process:
            dist.send(hidden, next_rank, group=rt.pp_group)
    logits = torch.empty(batch, length, model.vocab_size)
    if rt.is_last_stage:
        shard = (hidden @ model.head_weight().T).transpose(0, 1).contiguous()
        shards = [torch.empty_like(shard) for _ in range(rt.tp_size)]
        dist.all_gather(shards, shard, group=rt.tp_group)
        logits = torch.cat(shards, dim=-1)[..., : model.vocab_size].contiguous()
    dist.broadcast(logits, rt.last_stage_rank, group=rt.pp_group)
    return logits


def _assert_bitwise(exported: Path, source: Path) -> None:
    actual, expected = _tensors(exported), _tensors(source)
    assert actual.keys() == expected.keys(), exported
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, (exported, name)
        assert torch.equal(actual[name], tensor), (exported, name)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
