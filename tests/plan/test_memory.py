"""The memory model, compared with real steps and with numbers computed by hand."""

import sys
from dataclasses import replace

import pytest

from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.host_memory import PINNED, host_memory
from aropd_mcore.plan.memory import chunk_tokens, microbatches_in_flight, stage_memory
from aropd_mcore.plan.setup import Setup
from tests.conftest import REPO

SEVEN_B = read_architecture(REPO / "examples" / "clusters" / "Qwen2.5-7B-Instruct")


def test_state_of_a_rank_has_the_bytes_per_parameter():
    """Bytes per parameter in bf16: weights 2, gradients 4, optimizer 12 / ranks, teacher 2, and
    its average 4 / ranks."""
    setup = Setup(SEVEN_B, tensor=4, data=2, num_microbatches=8)
    memory = stage_memory(setup, 0)
    per_parameter = {
        "weights": 2,
        "fp32 main weights": 2,
        "gradients": 4,
        "optimizer moments": 4,
        "teacher weights": 2,
        "teacher fp32 average": 2,
    }
    state = dict(memory.state)
    del state["fixed overhead"], state["KV cache"]
    assert state == {part: size * memory.parameters.total for part, size in per_parameter.items()}


def test_host_memory_of_a_save_is_the_ranks_part_of_the_checkpoint():
    """Bytes per parameter: bf16 weights 2, average 4, optimizer 12, each over the ranks."""
    setup = Setup(SEVEN_B, tensor=4, data=2, num_microbatches=8, num_views=2)
    total = stage_memory(setup, 0).parameters.total
    plain = host_memory(setup)
    assert plain["always"] == {}
    assert sum(plain["save"].values()) == pytest.approx(PINNED * total * 18 / 2)
    hosted = host_memory(replace(setup, teacher_weights="host", teacher_hidden_states="host"))
    assert hosted["save"] == plain["save"]
    head = 152064 * 3584 // 4  # stays on the GPU
    hidden_states = 2 * 8 * setup.loss_tokens * 3584 * 2
    expected = {
        "teacher weights": PINNED * 2 * (total - head),
        "teacher fp32 average": PINNED * 4 * total / 2,
        "teacher hidden states": PINNED * hidden_states,
    }
    assert hosted["always"] == pytest.approx(expected)
    frozen = host_memory(replace(setup, teacher="frozen"))
    assert sum(frozen["save"].values()) == pytest.approx(PINNED * total * 16 / 2)


def test_activations_of_a_7b_model():
    """Transformer Engine, bf16, TP 1. Numbers per token and layer: norms 4 x 3,584; q, k, v 4,608;
    rotated 4,096; attention output 3,584; MLP 3 x 18,944; and 2 + 28 statistics in fp32. The model
    has 28 layers, and the output is added once."""
    setup = Setup(SEVEN_B, num_microbatches=1, micro_batch_size=1)
    per_layer = 2 * (4 * 3584 + 4608 + 4096 + 3584 + 3 * 18944) + 4 * (2 + 28)
    activations = stage_memory(setup, 0).phases["student"]["activations"]
    assert activations == 2048 * (28 * per_layer + 2 * 3584)
    full = stage_memory(replace(setup, recompute="full"), 0).phases["student"]
    assert full["activations"] == 2048 * 29 * 2 * 3584


@pytest.mark.parametrize(
    "sizes, stage, expected",
    [
        ((4, 1, 8), 0, 4),
        ((4, 1, 8), 3, 1),
        ((4, 1, 2), 0, 2),
        # a warm-up of 2 x 3 + 4 chunks, and one more, with two chunks per microbatch
        ((4, 2, 8), 0, 11 / 2),
        ((4, 2, 8), 3, 5 / 2),
    ],
)
def test_microbatches_in_flight(sizes: tuple[int, int, int], stage: int, expected: float):
    pipeline, virtual, number = sizes
    setup = Setup(SEVEN_B, pipeline=pipeline, virtual_pipeline=virtual, num_microbatches=number)
    assert microbatches_in_flight(setup, stage) == expected


def test_kv_cache_and_hidden_states():
    """KV cache: 2 x 28 layers x 512 numbers, for 32 rows of 2,048 positions, on 4 tensor ranks."""
    setup = Setup(SEVEN_B, tensor=4, num_microbatches=32)
    memory = stage_memory(setup, 0)
    phases = memory.phases
    assert memory.state["KV cache"] == 2 * 28 * 32 * 2048 * 512 / 4 * 2
    bounded = stage_memory(replace(setup, kv_cache_tokens=5 * 2048 + 2047), 0).state
    assert bounded["KV cache"] == memory.state["KV cache"] * 5 / 32
    # The memory of CUDA graphs is that of the sampler.
    assert "CUDA graphs" not in stage_memory(replace(setup, cuda_graphs=True), 0).state
    alone = stage_memory(replace(setup, tensor=1, cuda_graphs=True), 0)
    assert alone.state["CUDA graphs"] == alone.phases["rollout"]["sampler"] == 32 * 152_064 * 20
    # Rows are rounded up to 256 tokens. A validation of longer responses needs a larger cache.
    longer = replace(setup, validation_responses=32, validation_tokens=2049)
    assert stage_memory(longer, 0).state["KV cache"] == memory.state["KV cache"] * 3328 / 2048
    assert "rollout" not in stage_memory(replace(setup, samples=False), 0).phases
    assert phases["teacher"]["teacher hidden states"] == 2 * 32 * 1024 * 3584 * 2
    one_view = stage_memory(replace(setup, num_views=1), 0).phases
    assert one_view["teacher"]["teacher hidden states"] == 32 * 1024 * 3584 * 2
    # A token's logits take 14 bytes per column, with one view 10: six chunks and four.
    large = replace(setup, tensor=1, micro_batch_size=4)
    assert (chunk_tokens(large), chunk_tokens(replace(large, num_views=1))) == (704, 1024)
    on_host = stage_memory(replace(setup, teacher_hidden_states="host"), 0).phases["teacher"]
    assert on_host["teacher hidden states"] == 2 * 1024 * 3584 * 2


def test_teacher_on_the_host_keeps_only_its_head_on_the_device():
    """While the teacher scores, its weights are on the device, but not the fp32 average, which is
    divided over two ranks."""
    setup = Setup(SEVEN_B, tensor=4, pipeline=2, data=2, num_microbatches=8)
    head = 152_064 * 3584 // 4 * 2
    for stage, resident in ((0, 0), (1, head)):
        here = stage_memory(setup, stage)
        host = stage_memory(replace(setup, teacher_weights="host"), stage)
        weights = here.parameters.total * 2
        assert host.state["teacher weights"] == resident
        assert host.phases["teacher"]["teacher weights"] == weights - resident
        assert here.at("student") - host.at("student") == 2 * weights - resident


def test_fp8_adds_copies_of_weights_and_shrinks_activations():
    """28 layers of 233,057,792 parameters: the student keeps two FP8 copies, the teacher one. A
    token's norms and the product of gate and up take one byte per number, and the attention output
    one byte more."""
    setup = Setup(SEVEN_B, num_microbatches=1)
    fp8 = replace(setup, fp8=True, teacher_fp8=True, size_multiple=16)
    memory = stage_memory(fp8, 0)
    assert memory.state["weights in fp8"] == 2 * 28 * 233_057_792
    assert memory.state["teacher weights in fp8"] == 28 * 233_057_792
    plain = stage_memory(setup, 0).phases["student"]["activations"]
    saved = plain - memory.phases["student"]["activations"]
    assert saved == 2048 * 28 * (2 * 3584 + 18944 - 3584)
    assert replace(fp8, prompt_tokens=1025).sequence_tokens == 2064


def test_optimizer_of_experts_is_divided_over_the_ranks_with_the_same_experts():
    """With 64 expert ranks among a stage's 128, two ranks hold the same experts."""
    moe = read_architecture(REPO / "examples" / "clusters" / "Qwen3-235B-A22B")
    setup = Setup(moe, tensor=4, sequence=True, pipeline=2, expert=64, data=32)
    memory = stage_memory(setup, 0)
    assert memory.parameters.experts == 47 * 2 * 3 * 4096 * 1536
    on_rank = memory.parameters.shared / 32 + memory.parameters.experts / 2
    assert memory.state["optimizer moments"] == 8 * on_rank


@pytest.mark.rest
def test_planned_memory_is_within_10_percent_of_real_steps(monkeypatch: pytest.MonkeyPatch):
    """Two layouts are measured. `make bench-memory` measures all of them."""
    monkeypatch.syspath_prepend(str(REPO / "tools" / "benchmarks"))
    sys.modules.pop("memory", None)
    import memory  # pyright: ignore[reportMissingImports]

    for name in ("TP 2 + SP", "PP 2, recompute full"):
        for row in memory.measure(name, responses=4):
            assert abs(row["planned"] / row["measured"] - 1) < 0.1, row
