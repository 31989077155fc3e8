"""The Megatron model against transformers, for every family and layout, and weights there and back.

The reference is made once, in the test's process; each world of ranks then goes through all its
layouts and models in one call.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.ranks import run_ranks
from tests.tiny_models import FAMILIES, TINY, save_tiny_model

NUM_PROMPT_TOKENS = 24
NUM_NEW_TOKENS = 8
LAYOUTS = {  # world size -> (TP, PP); data parallelism takes the rest
    1: [(1, 1)],
    2: [(2, 1), (1, 2)],
    4: [(2, 2), (4, 1), (1, 4), (2, 1)],
}


@dataclass(frozen=True)
class Case:
    """A saved model, and what transformers makes of it in fp32."""

    name: str
    folder: Path
    prompt_BS: torch.Tensor
    logits_BSV: torch.Tensor
    greedy_BS: torch.Tensor


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    root = tmp_path_factory.mktemp("models")
    prompt = torch.randint(
        0, TINY["vocab_size"], (2, NUM_PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)
    )
    return [_case(root, family, tie, prompt) for family in FAMILIES for tie in (False, True)]


def _case(root: Path, family: str, tie: bool, prompt: torch.Tensor) -> Case:
    name = f"{family}-{'tied' if tie else 'untied'}"
    model = save_tiny_model(family, root / name, tie=tie)
    with torch.no_grad():
        logits = model(prompt).logits
        greedy = model.generate(
            prompt, do_sample=False, max_new_tokens=NUM_NEW_TOKENS, eos_token_id=-1
        )[:, NUM_PROMPT_TOKENS:]
    return Case(name, root / name, prompt, logits, greedy)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_logits_greedy_tokens_and_round_trip(world_size: int, cases: list[Case], tmp_path: Path):
    for results in run_ranks(_visit, world_size, cases, LAYOUTS[world_size], tmp_path):
        for where, (logits, tokens) in results.items():
            case = next(case for case in cases if where.endswith(case.name))
            torch.testing.assert_close(
                logits, case.logits_BSV, atol=1e-4, rtol=0, msg=lambda m, w=where: f"{w}: {m}"
            )
            assert torch.equal(tokens, case.greedy_BS), where

    exported = sorted(tmp_path.iterdir())
    assert len(exported) == len(cases) * len(LAYOUTS[world_size])
    for folder in exported:
        case = next(case for case in cases if folder.name.endswith(case.name))
        _assert_bitwise(folder, case.folder)
        for name in ("config.json", "generation_config.json"):
            assert (folder / name).read_text() == (case.folder / name).read_text(), folder


def _visit(cases: list[Case], layouts: list[tuple[int, int]], out: Path) -> dict[str, tuple]:
    """On every rank: logits and greedy tokens of each layout and model, and its export."""
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.weights import export_hf

    results = {}
    for tensor, pipeline in layouts:
        rt = runtime.start(tensor=tensor, pipeline=pipeline)
        for case in cases:
            model = _load(case.folder, rt)
            where = f"tp{tensor}-pp{pipeline}-{case.name}"
            logits = _logits(model, case.prompt_BS, rt)
            tokens = case.prompt_BS
            for _ in range(NUM_NEW_TOKENS):
                following = _logits(model, tokens, rt)[:, -1].argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, following], dim=1)
            results[where] = logits, tokens[:, NUM_PROMPT_TOKENS:]
            export_hf(model, case.folder, out / where, rt)
        runtime.stop()
    return results


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
    from aropd_mcore.mcore.weights import export_hf

    rt = runtime.start(tensor=2, pipeline=2)
    source = folder / "source"
    model = _load(source, rt, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    export_hf(model, source, folder / "bf16", rt)
    export_hf(model, source, folder / "fp32", rt, dtype=torch.float32)
    doubled = {name: 2 * p.detach().float() for name, p in model.named_parameters()}
    export_hf(model, source, folder / "doubled", rt, dtype=torch.float32, values=doubled)
    with pytest.raises(CheckpointError, match="bf16: exists already"):
        export_hf(model, source, folder / "bf16", rt)


def test_vocabulary_padding_and_cached_decoding(tmp_path: Path):
    save_tiny_model("qwen3", tmp_path / "model", vocab_size=70)
    run_ranks(_check_padding_and_cache, 2, tmp_path / "model")


def _check_padding_and_cache(folder: Path) -> None:
    from aropd_mcore.mcore import runtime

    rt = runtime.start(tensor=2)
    model = _load(folder, rt)
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


def _check_errors(folder: Path) -> None:
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.weights import load_hf_weights

    rt = runtime.start(tensor=2)
    with pytest.raises(ValueError, match="size 2 does not divide the model's 3 key/value heads"):
        build_model(folder / "odd", rt, dtype=torch.float32)
    model = build_model(folder / "other", rt, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"unexpected tensor model\.layers\.2\."):
        load_hf_weights(model, folder / "odd", rt)
    runtime.stop()
    rt = runtime.start(pipeline=2)
    with pytest.raises(ValueError, match="size 2 does not divide the model's 3 layers"):
        build_model(folder / "odd", rt, dtype=torch.float32)


def test_fused_norm_names_are_megatrons_own():
    """Without Transformer Engine here, its names come from the map that Megatron converts with."""
    run_ranks(_check_fused_names, 1)


def _check_fused_names() -> None:
    from aropd_mcore.convert.mapping import ATTENTION, DENSE_MLP
    from aropd_mcore.mcore import model  # sets the CPU mode, before megatron is imported

    prefixes = model.get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map
    fused = {ours + "weight": theirs + "weight" for ours, theirs in prefixes.items()}
    layer = "decoder.layers.{layer}."
    rows = [row for row in (*ATTENTION, *DENSE_MLP) if row.fused_name]
    assert {r.name: r.fused_name for r in rows} == {
        layer + plain: layer + theirs for plain, theirs in fused.items()
    }


def _load(folder: Path, rt, dtype: torch.dtype = torch.float32):
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.mcore.weights import load_hf_weights

    model = build_model(folder, rt, dtype=dtype).eval()
    load_hf_weights(model, folder, rt)
    return model


@torch.no_grad()
def _logits(model, tokens_BS: torch.Tensor, rt) -> torch.Tensor:
    """Whole, unpadded logits [B, S, V] on every rank, by plain sends from stage to stage."""
    batch, length = tokens_BS.shape
    peer = dist.get_global_rank
    if not rt.is_first_stage:
        hidden = torch.empty(length, batch, TINY["hidden_size"])
        dist.recv(hidden, peer(rt.pp_group, rt.pp_rank - 1), group=rt.pp_group)
        model.set_input_tensor(hidden)
    hidden = model(tokens_BS, torch.arange(length).expand(batch, length), None)
    logits = torch.empty(batch, length, model.vocab_size)
    if not rt.is_last_stage:
        dist.send(hidden, peer(rt.pp_group, rt.pp_rank + 1), group=rt.pp_group)
    else:
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
