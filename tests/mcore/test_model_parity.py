"""The Megatron model against transformers, for every family and layout, and weights there and back.

The reference is made once, in the test's process; each world of ranks then goes through all its
layouts and models in one call. A family comes in by its entry in FAMILIES of
tests/support/tiny_models.py, which tests/convert/test_architecture.py demands of every family that
convert/mapping.py has a table of.
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
from tests.support.tiny_models import FAMILIES, MOE_FAMILIES, TINY, save_tiny_model

NUM_PROMPT_TOKENS = 24
NUM_NEW_TOKENS = 8


class Layout(NamedTuple):
    """Data parallelism takes the ranks that are left."""

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
        Layout(2, 1, expert=4),  # over tensor ranks and replicas
        Layout(2, 2, expert=2),
        Layout(2, 1, expert=2, expert_tensor=2),
        Layout(4, 1, expert_tensor=2),
        Layout(1, 2, expert_tensor=2),
    ],
}


@dataclass(frozen=True)
class Case:
    """A saved model, and what transformers makes of it in fp32."""

    name: str
    folder: Path
    has_experts: bool
    tokens_BS: torch.Tensor
    """Prompts, and behind them what transformers goes on with, greedily."""
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
        pytest.param(2, "all", marks=pytest.mark.rest),
        pytest.param(4, "others", marks=pytest.mark.rest),
    ],
)
def test_logits_greedy_tokens_and_round_trip(
    world_size: int, part: str, cases: list[Case], tmp_path: Path
):
    by_name = {case.name: case for case in cases}
    visits = {
        layout: _cases_of(layout, number, part, cases)
        for number, layout in enumerate(LAYOUTS[world_size])
    }
    for results in run_ranks(_visit, world_size, visits, tmp_path):
        for (layout, name), logits in results.items():
            case, where = by_name[name], f"{name}, {layout}"
            torch.testing.assert_close(
                logits, case.logits_BSV, atol=1e-4, rtol=0, msg=lambda m, w=where: f"{w}: {m}"
            )
            # Each new token is the likeliest after those before it: so decoding would choose it.
            chosen = logits[:, NUM_PROMPT_TOKENS - 1 : -1].argmax(-1)
            assert torch.equal(chosen, case.tokens_BS[:, NUM_PROMPT_TOKENS:]), where

    for layout, visited in visits.items():
        for case in visited:
            folder = tmp_path / _export_name(layout, case)
            _assert_bitwise(folder, case.folder)
            for name in ("config.json", "generation_config.json"):
                assert (folder / name).read_text() == (case.folder / name).read_text(), folder


def _cases_of(layout: Layout, number: int, part: str, cases: list[Case]) -> list[Case]:
    """The models that a layout can hold: all, one (another for each layout), or the others."""
    shares_experts = layout.expert * layout.expert_tensor > 1
    possible = [case for case in cases if case.has_experts or not shares_experts]
    first = possible[number % len(possible)]
    if part == "all":
        return possible
    return [case for case in possible if (case is first) == (part == "first")]


def _export_name(layout: Layout, case: Case) -> str:
    return "-".join(map(str, (*layout, case.name)))


def _visit(visits: dict[Layout, list[Case]], out: Path) -> dict[tuple, torch.Tensor]:
    """On every rank: each layout's and model's logits, and its export."""
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.weights import export_model

    results = {}
    for layout, cases in visits.items():
        rt = runtime.start(**layout._asdict())
        for case in cases:
            model = _load(case.folder, rt)
            # Replicas have the rows in other orders: where they share experts, tokens that come
            # back to the wrong rank make a difference.
            mine = case.tokens_BS.roll(rt.dp_rank, 0)
            results[layout, case.name] = _logits(model, mine, rt).roll(-rt.dp_rank, 0)
            export_model(model, case.folder, out / _export_name(layout, case), rt)
        runtime.stop()
    return results


def test_config_without_a_key_gives_the_logits_of_the_family_default(tmp_path: Path):
    tokens = torch.randint(
        0, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(3)
    )
    for family, key, settings in (
        ("mixtral", "rope_parameters", {}),  # theta is 1e6, where other families have 1e4
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


def test_dtypes_shards_and_replaced_values(tmp_path: Path):
    """bf16 there and back from several files, fp32 from bf16, and values in the weights' place."""
    source = save_tiny_model(
        "qwen2", tmp_path / "source", dtype=torch.bfloat16, max_shard_size="100KB"
    )
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    run_ranks(_export_variants, 4, tmp_path)

    _assert_bitwise(tmp_path / "bf16", tmp_path / "source")
    for name, factor in (("fp32", 1), ("doubled", 2)):
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert exported.dtype == torch.float32, "config.json must say what the files hold"
        for key, tensor in source.state_dict().items():
            assert torch.equal(exported.state_dict()[key], factor * tensor.float()), key


def _export_variants(folder: Path) -> None:
    from aropd_mcore.convert.architecture import CheckpointError
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.weights import export_model

    rt = runtime.start(tensor=2, pipeline=2)
    source = folder / "source"
    model = _load(source, rt, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    export_model(model, source, folder / "bf16", rt)
    export_model(model, source, folder / "fp32", rt, dtype=torch.float32)
    doubled = {name: 2 * p.detach().float() for name, p in model.named_parameters()}
    export_model(model, source, folder / "doubled", rt, dtype=torch.float32, values=doubled)
    with pytest.raises(CheckpointError, match="bf16: exists already"):
        export_model(model, source, folder / "bf16", rt)


def test_vocabulary_padding_and_cached_decoding(tmp_path: Path):
    save_tiny_model("qwen3", tmp_path / "model", vocab_size=70)
    run_ranks(_check_padding_and_cache, 2, tmp_path / "model")


def _check_padding_and_cache(folder: Path) -> None:
    from aropd_mcore.mcore import runtime

    rt = runtime.start(tensor=2)
    [model] = _load(folder, rt)  # of chunks
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


def test_unusable_folders_fail_alike_on_every_rank(tmp_path: Path):
    odd = {"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}
    save_tiny_model("llama", tmp_path / "odd", hidden_size=48, **odd)
    save_tiny_model("llama", tmp_path / "other", num_hidden_layers=2)
    run_ranks(_check_errors, 2, tmp_path)


def test_sizes_that_do_not_fit_each_other():
    run_ranks(_check_sizes, 2)


def _check_sizes() -> None:
    from aropd_mcore.mcore import runtime

    for sizes, message in (
        ({"tensor": 2, "pipeline": 2}, "2 processes cannot be .* start a multiple of 4$"),
        ({"tensor": 2, "expert": 3}, "tensor 2 .* experts shared by 3 ranks; .* multiple of 6$"),
        ({"pipeline": 2, "expert": 2}, "start a multiple of 4$"),
        ({"virtual_pipeline": 2}, "2 chunks on each .* parallel.pipeline is 1$"),
        ({"sequence_parallel": True}, "splits tokens over tensor ranks; tensor is 1$"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.start(**sizes)


def _check_errors(folder: Path) -> None:
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.weights import load_hf_weights

    rt = runtime.start(tensor=2)
    with pytest.raises(ValueError, match="size 2 does not divide the model's 3 key/value heads"):
        build_model(folder / "odd", rt, dtype=torch.float32)
    model = build_model(folder / "other", rt, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"odd/config\.json describes another model"):
        load_hf_weights(model, folder / "odd", rt)
    runtime.stop()
    rt = runtime.start(pipeline=2)
    with pytest.raises(ValueError, match="size 2 does not divide the model's 3 layers"):
        build_model(folder / "odd", rt, dtype=torch.float32)
    runtime.stop()
    rt = runtime.start(expert=2)
    with pytest.raises(ValueError, match="size 2 does not divide a dense model"):
        build_model(folder / "other", rt, dtype=torch.float32)
    runtime.stop()
    rt = runtime.start(pipeline=2, virtual_pipeline=2)
    with pytest.raises(ValueError, match=r"2 x 2 chunks on each stage does not divide .* 2 layers"):
        build_model(folder / "other", rt, dtype=torch.float32)


def test_checkpoints_have_the_names_of_the_table(tmp_path: Path):
    """Those that Transformer Engine's layers have too, so that either reads the other's."""
    for family in ("qwen2", "qwen3", "qwen3_moe", "mixtral"):
        save_tiny_model(family, tmp_path / family, num_hidden_layers=2)
        run_ranks(_check_checkpoint_names, 1, tmp_path / family)


def _check_checkpoint_names(folder: Path) -> None:
    from aropd_mcore.mcore import runtime

    [model] = _load(folder, runtime.start())  # of chunks
    found = {tensor.key for tensor in model.sharded_state_dict().values()}
    # A tensor is one of all layers, or of all their experts, so numbers are no part of its name.
    in_table = {
        re.sub(r"\.(layers|local_experts)\.\d+\.", r".\1.", weight.fused_name or weight.name)
        for weight in model.architecture.weights()
    }
    in_table = {name.replace("local_experts", "experts") for name in in_table}
    assert {name for name in found if not name.endswith("_extra_state")} == in_table


def _load(folder: Path, rt, dtype: torch.dtype = torch.float32) -> Any:
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.weights import load_hf_weights

    model = build_model(folder, rt, dtype=dtype).eval()
    load_hf_weights(model, folder, rt)
    return model


@torch.no_grad()
def _logits(model: Any, tokens_BS: torch.Tensor, rt) -> torch.Tensor:
    """Whole, unpadded logits [B, S, V] on every rank, by plain sends from chunk to chunk."""
    batch, length = tokens_BS.shape
    before, after = (
        dist.get_global_rank(rt.pp_group, (rt.pp_rank + step) % rt.pp_size) for step in (-1, 1)
    )
    hidden = torch.empty(length, batch, TINY["hidden_size"])
    for chunk in model:
        if not chunk.pre_process:
            dist.recv(hidden, before, group=rt.pp_group)
            chunk.set_input_tensor(hidden)
        hidden = chunk(tokens_BS, torch.arange(length).expand(batch, length), None)
        if not chunk.post_process:
            dist.send(hidden, after, group=rt.pp_group)
    logits = torch.empty(batch, length, model.vocab_size)
    if rt.is_last_stage:
        shard = (hidden @ model.head_weight().T).transpose(0, 1).contiguous()
        shards = [torch.empty_like(shard) for _ in range(rt.tp_size)]
        dist.all_gather(shards, shard, group=rt.tp_group)
        logits = torch.cat(shards, dim=-1)[..., : model.vocab_size].contiguous()
    dist.broadcast(logits, rt.last_stage_rank, group=rt.pp_group)
    return logits


def _assert_bitwise(exported: Path, source: Path) -> None:
    found, expected = _tensors(exported), _tensors(source)
    assert found.keys() == expected.keys(), exported
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, (exported, name)
        assert torch.equal(found[name], tensor), (exported, name)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
