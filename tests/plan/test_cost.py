"""FLOPs and bubbles, compared with numbers computed by hand."""

from dataclasses import fields, replace

import pytest

from aropd_mcore.config_file import load_config
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.constants import constants
from aropd_mcore.plan.cost import bubble_fraction, forward_flops, loss_bytes, loss_flops, step_time
from aropd_mcore.plan.launches import exchange_seconds, launch_seconds
from aropd_mcore.plan.parameters import rank_parameters
from aropd_mcore.plan.rates import FASTEST, SLOWEST, Rates
from aropd_mcore.plan.saves import save_time
from aropd_mcore.plan.setup import Setup, build_setup
from aropd_mcore.plan.sync import sync_cost, sync_seconds
from tests.plan.test_parameters import MODELS
from tests.support.tiny_runs import write_run


def test_forward_flops_of_a_dense_model():
    """Four layers; q 64, k and v 32 each; MLP 96.

    Weights per token and layer: 64 (64 + 2 32) + 64 64 + 3 64 96 = 30,720. Ten tokens see
    1 + ... + 10 = 55 keys, at 4 x 64 FLOPs per key.
    """
    products, attention = forward_flops(read_architecture(MODELS["qwen2"]), 10)
    assert products == 4 * 2 * 30_720 * 10
    assert attention == 4 * 55 * 4 * 64


def test_forward_flops_of_experts_count_the_selected_ones_only():
    """q 8 x 24 = 192, kv 96; router 4; two experts of 40 columns."""
    products, _ = forward_flops(read_architecture(MODELS["qwen3_moe"]), 1)
    assert products == 4 * 2 * (64 * (192 + 2 * 96) + 192 * 64 + 64 * 4 + 2 * 3 * 64 * 40)


def test_loss_flops_of_each_objective():
    setup = Setup(read_architecture(MODELS["qwen2"]), micro_batch_size=2, response_tokens=10)
    assert loss_flops(setup) == 5 * 2 * 20 * 64 * 509
    assert loss_flops(replace(setup, num_views=1)) == 4 * 2 * 20 * 64 * 509
    sft = replace(setup, num_views=0, prompt_tokens=7, prompt_loss=True)
    assert loss_flops(sft) == 3 * 2 * 2 * 16 * 64 * 509


def test_loss_bytes_of_each_objective():
    """20 loss tokens in one chunk, 64 hidden numbers, 512 padded columns. Logits are fp32."""
    setup = Setup(read_architecture(MODELS["qwen2"]), micro_batch_size=2, response_tokens=10)
    head_gradient = 512 * 64 * 8
    assert loss_bytes(setup) == 20 * 512 * (3 * 3 * 4 + 2) + head_gradient
    assert loss_bytes(replace(setup, num_views=1)) == 20 * 512 * (3 * 2 * 4 + 2) + head_gradient
    assert loss_bytes(replace(setup, num_views=0)) == 20 * 512 * (2 * 4 + 2) + head_gradient
    in_chunks = loss_bytes(replace(setup, chunk_tokens=6))
    assert in_chunks == loss_bytes(setup) + 3 * head_gradient


@pytest.mark.parametrize(
    "sizes, fraction", [((1, 1, 8), 0), ((4, 1, 8), 3 / 11), ((4, 2, 8), 3 / 19), ((2, 1, 1), 0.5)]
)
def test_bubble_fraction_of_each_schedule(sizes: tuple[int, int, int], fraction: float):
    assert bubble_fraction(*sizes) == pytest.approx(fraction)


def test_step_time_has_bubbles_of_student_and_teacher():
    """With two views the teacher scores twice as many microbatches, so its bubble is smaller."""
    setup = Setup(read_architecture(MODELS["qwen2"]), pipeline=4, num_microbatches=8)
    time = step_time(setup)
    assert time.student_bubble == pytest.approx(3 / 11)
    assert time.teacher_bubble == pytest.approx(3 / 19)
    one_view = step_time(replace(setup, num_views=1))
    assert one_view.teacher_bubble == pytest.approx(3 / 11)
    # One view takes the time of 8 + 3 microbatches, both views that of 16 + 3.
    assert one_view.teacher / time.teacher == pytest.approx(11 / 19)
    sft = step_time(replace(setup, teacher=None, num_views=0))
    assert sft.teacher == sft.teacher_bubble == 0


def test_validation_time_counts_the_responses_of_every_task_and_view(tmp_path):
    path = write_run(tmp_path)
    for name, num_lines in (("sums.jsonl", 5), ("heldout.jsonl", 3)):
        (tmp_path / name).write_text('{"question": "1?", "answer": "1"}\n' * num_lines)
    validation = [
        f"validation.tasks=[sums={tmp_path / 'sums.jsonl'}]",
        f"validation.rows=[{tmp_path / 'heldout.jsonl'}]",
        "validation.teacher_views=[full]",
        "validation.limit=4",
        "validation.samples=2",
        "validation.temperature=1",
    ]
    setups = {
        name: build_setup(load_config(path, [*validation, *overrides]), 2)
        for name, overrides in {
            "native": [],
            "vllm": ["rollout.engine=vllm"],
            "long": ["validation.max_response_tokens=32"],
        }.items()
    }
    # Two data-parallel ranks share 2 samples of 4 problems, 3 rows, and 3 rows of the teacher.
    assert setups["native"].validation_responses == 10
    assert setups["vllm"].validation_responses == 3, "servers sample the student's"
    native, vllm, long = (step_time(setup) for setup in setups.values())
    assert native.validation > vllm.validation > 0
    assert long.validation == pytest.approx(2 * native.validation, rel=0.2)
    assert native.total == long.total, "a validation is not part of a step"
    assert step_time(build_setup(load_config(path), 2)).validation == 0


def test_longest_time_is_at_the_slow_end_of_every_constant():
    """Each constant changes the time of a job that uses all of them, in the direction of its name.

    No constant of the file is without use.
    """
    setup = Setup(
        read_architecture(MODELS["qwen3_moe"]),
        tensor=2,
        pipeline=2,
        expert=4,
        data=4,
        sequence=True,
        num_microbatches=4,
        teacher_weights="host",
        gpus_per_node=4,
    )
    alone = Setup(read_architecture(MODELS["qwen2"]), cuda_graphs=True)
    syncs = sync_cost(setup, "disk"), sync_cost(setup, "nccl")

    def seconds(rates: Rates) -> float:
        steps = sum(step_time(s, rates).total + sum(save_time(s, rates)) for s in (setup, alone))
        return steps + sum(sync_seconds(setup, cost, rates) for cost in syncs)

    names = {field.name for field in fields(Rates)} & constants().keys()
    assert constants().keys() - names == {"pinned_bytes", "gpu_overhead_bytes"}
    for name in names:
        slow, fast = getattr(SLOWEST, name), getattr(FASTEST, name)
        assert (slow > fast) == name.endswith("_seconds")
        assert seconds(replace(SLOWEST, **{name: fast})) < seconds(SLOWEST), name


def test_token_of_experts_launches_the_router_and_each_expert_on_the_rank():
    """4 layers, 8 experts. Rates in seconds that a sum can be read from."""
    rates = replace(
        SLOWEST,
        launch_seconds=1.0,
        captured_launch_seconds=0.5,
        router_launch_seconds=10.0,
        expert_launch_seconds=100.0,
        collective_seconds=1000.0,
    )
    dense = Setup(read_architecture(MODELS["qwen2"]))
    experts = replace(dense, architecture=read_architecture(MODELS["qwen3_moe"]))
    num_experts = experts.architecture.sizes["experts"]
    assert launch_seconds(dense, rates) == 4
    assert launch_seconds(replace(dense, cuda_graphs=True), rates) == 2
    assert launch_seconds(replace(dense, cuda_graphs=True, tensor=2), rates) == 4
    assert launch_seconds(experts, rates) == 4 * (1 + 10 + 100 * num_experts)
    assert launch_seconds(replace(experts, expert=2), rates) == 4 * (11 + 50 * num_experts)
    assert exchange_seconds(dense, rates) == 0
    assert exchange_seconds(replace(dense, tensor=2, expert=2), rates) == 4 * 2 * 1000
    assert exchange_seconds(replace(dense, pipeline=2), rates) == 2 * 1000
    assert exchange_seconds(replace(experts, tensor=2, expert=2), rates) == 4 * 4 * 1000


def test_rollout_takes_launches_whatever_the_number_of_rows():
    """An earlier version took 48 ms per token for 28 layers on an H200."""
    setup = Setup(replace(read_architecture(MODELS["qwen2"]), num_layers=28), data=8)
    longest = step_time(replace(setup, num_microbatches=32))
    assert longest.rollout == pytest.approx(0.048 * 1024, rel=0.02)
    assert step_time(replace(setup, num_microbatches=1)).rollout == pytest.approx(
        longest.rollout, rel=0.01
    )
    two_batches = step_time(replace(setup, num_microbatches=64))
    assert two_batches.rollout == pytest.approx(2 * longest.rollout, rel=0.01)


def test_save_time_of_a_node_counts_the_bytes_of_its_ranks():
    """18 bytes per parameter, shared by two data-parallel ranks."""
    setup = Setup(read_architecture(MODELS["qwen2"]), data=2)
    rates = replace(SLOWEST, host_bytes=10.0, host_efficiency=0.5, disk_bytes=4.0)
    on_rank = 18 * rank_parameters(setup, 0).total / 2
    assert save_time(setup, rates) == pytest.approx((on_rank / 5, on_rank / 2, on_rank))
    assert save_time(replace(setup, data=16), rates).writes == pytest.approx(on_rank / 8 * 8 / 4)


def test_constants_state_whether_they_were_measured():
    launches = constants()["launch_seconds"]
    assert launches.high.machine == "NVIDIA H200" and "48 ms for 28 layers" in launches.high.source
    assert launches.low.machine is None and "52 operators" in launches.low.source
