"""FLOPs and bubbles, compared with numbers computed by hand."""

from dataclasses import replace

import pytest

from aropd_mcore.config_file import load_config
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.cost import bubble_fraction, forward_flops, loss_bytes, loss_flops, step_time
from aropd_mcore.plan.setup import Setup, build_setup
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
