"""The Triton kernels: each one equals its torch pass, and the whole loss equals dense fp64.

Without a GPU they run in Triton's interpreter. test_properties.py and test_precision.py check both
implementations at the limits of floating point.
"""

import json
import os
import subprocess
import sys
from dataclasses import astuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from aropd_mcore.numerics.kl import add_up_target, add_up_views
from aropd_mcore.numerics.loss_settings import LossSettings
from aropd_mcore.numerics.passes import MOMENTS, TorchPasses, ViewLogits
from tests.numerics.problems import EVERY_SETTING, ONE_VIEW, Settings, make_problem
from tests.numerics.runs import run_fused, run_logits_form
from tests.numerics.test_loss import check

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 2e-5, "atol": 2e-5, "equal_nan": True}


def random_views(
    num_tokens: int, num_columns: int, dtype=torch.float32, device="cpu"
) -> ViewLogits:
    generator = torch.Generator(device).manual_seed(num_columns)
    rows = torch.randn(3, num_tokens, num_columns, generator=generator, device=device)
    return ViewLogits(*(3 * rows).to(dtype))


def numbers_and_gradient(
    run, views: ViewLogits, settings: Settings, with_metrics: bool
) -> list[Tensor]:
    """Return the results of every pass of `run`, in order, over one shard."""
    objective = LossSettings(*astuple(settings))
    moments = MOMENTS if with_metrics else ()
    least_top_2T = None
    if with_metrics:
        tops = [view.float().sort(-1).values for view in (views.student, views.full)]
        least_top_2T = torch.stack([top[:, max(top.size(1) - 16, 0)] for top in tops])
    view_KT = run.view_statistics(views, moments)
    softmax, _ = add_up_views(view_KT[None], moments)
    target_KT = run.target_statistics(
        views, softmax, objective, with_metrics=with_metrics, least_top_2T=least_top_2T
    )
    softmax, (_, kl_student_T, *_) = add_up_target(softmax, target_KT[None])
    numbers = [view_KT, target_KT]
    if objective.divergence == "jsd":
        numbers.append(run.mixture_statistics(views, softmax, objective))
        kl_student_T = numbers[-1][1]
    gradient_TV = torch.full_like(views.student, torch.nan, dtype=torch.float32)
    weights_T = torch.linspace(0, 1, views.student.size(0), device=gradient_TV.device)
    run.write_gradient(gradient_TV, views, softmax, kl_student_T, objective, weights_T)
    over_TV, half_TV = views.student.clone(), torch.empty_like(views.student, dtype=torch.bfloat16)
    for out_TV, own in ((over_TV, views._replace(student=over_TV)), (half_TV, views)):
        run.write_gradient(out_TV, own, softmax, kl_student_T, objective, weights_T)
        rounded_TV = gradient_TV.to(out_TV.dtype)
        if out_TV.is_cuda or out_TV.dtype != torch.bfloat16:
            assert torch.equal(out_TV.nan_to_num(7), rounded_TV.nan_to_num(7))
        else:  # Triton's interpreter truncates where a GPU rounds
            assert_close(out_TV, rounded_TV, rtol=2**-7, atol=0, equal_nan=True)
    return [*numbers, gradient_TV]


def compare(views: ViewLogits, settings: Settings, with_metrics: bool = True) -> None:
    from aropd_mcore.numerics import kernels

    expected = numbers_and_gradient(TorchPasses(views.student), views, settings, with_metrics)
    actual = numbers_and_gradient(kernels, views, settings, with_metrics)
    again = numbers_and_gradient(kernels, views, settings, with_metrics)
    for result, repeated, torch_result in zip(actual, again, expected, strict=True):
        assert torch.equal(result.nan_to_num(7), repeated.nan_to_num(7))
        assert_close(result, torch_result, **CLOSE)


def cross_entropy_passes(run, student_TV: Tensor) -> list[Tensor]:
    """Return the results of the passes of cross-entropy, whose targets are on this shard or not."""
    numbers_KT = run.student_statistics(student_TV)
    softmax, _ = add_up_views(numbers_KT[None], ((0, 0),))
    num_tokens, num_columns = student_TV.shape
    columns_T = torch.arange(num_tokens, device=student_TV.device) * 997 % (num_columns + 1) - 1
    weights_T = torch.linspace(0.5, 1, num_tokens, device=student_TV.device)
    gradient_TV = torch.full_like(student_TV, torch.nan, dtype=torch.float32)
    over_TV = student_TV.clone()
    for out_TV, own_TV in ((gradient_TV, student_TV), (over_TV, over_TV)):
        run.write_cross_entropy_gradient(out_TV, own_TV, softmax, columns_T, weights_T)
    assert_close(over_TV.float(), gradient_TV, rtol=2**-7, atol=1e-7, equal_nan=True)
    return [numbers_KT, gradient_TV]


def compare_cross_entropy(student_TV: Tensor) -> None:
    from aropd_mcore.numerics import kernels

    expected = cross_entropy_passes(TorchPasses(student_TV), student_TV)
    for result, torch_result in zip(
        cross_entropy_passes(kernels, student_TV), expected, strict=True
    ):
        assert_close(result, torch_result, **CLOSE)


@pytest.mark.usefixtures("by_kernels")
class TestInterpreted:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_passes_of_cross_entropy_equal_torch(self, dtype):
        for num_tokens, num_columns in ((3, 45), (2, 1024), (3, 2 * 1024 + 37), (0, 45), (3, 0)):
            compare_cross_entropy(random_views(num_tokens, num_columns, dtype).student)
        student_TV = random_views(4, 1024 + 100, dtype).student
        student_TV[0, [3, 1100]] = -torch.inf
        student_TV[1, :1024] = -torch.inf
        student_TV[2, 1024:] = -torch.inf
        compare_cross_entropy(student_TV)

    @pytest.mark.parametrize("settings", EVERY_SETTING, ids=str)
    def test_every_pass_equals_torch(self, settings):
        compare(random_views(3, 45), settings)

    @pytest.mark.rest
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("divergence", ["kl_target_student", "kl_student_target", "jsd"])
    def test_pass_over_several_blocks_equals_torch(self, divergence, dtype):
        """Blocks of 1024 columns, and a remainder."""
        for with_metrics in (True, False):
            views = random_views(2, 2 * 1024 + 37, dtype)
            compare(views, Settings(divergence=divergence), with_metrics)
        compare(random_views(2, 1024, dtype), Settings(divergence=divergence))

    @pytest.mark.parametrize("divergence", ["kl_target_student", "kl_student_target", "jsd"])
    def test_pass_over_tokens_with_minus_infinity_equals_torch(self, divergence):
        """-inf in one, two or all views; in the first block, the last one, or a whole row."""
        views = random_views(6, 1024 + 100)
        views.student[0, [3, 1100]] = -torch.inf
        views.partial[1, :1024] = -torch.inf
        views.full[2, 1024:] = -torch.inf
        for view in (views.partial, views.full):
            view[3, 10:1100] = -torch.inf
        for view in views:
            view[4, 1:-1] = -torch.inf
            view[5] = -torch.inf
        for scale, clip in ((0.8, 5.0), (1.0, None), (1.4, None)):
            compare(views, Settings(scale, clip, divergence))

    def test_pass_over_equal_teacher_views_equals_torch(self):
        student, partial, _ = random_views(3, 1024 + 45)
        for settings in ONE_VIEW:
            compare(ViewLogits(student, partial, partial), settings, with_metrics=False)

    def test_pass_over_other_strides_equals_torch(self):
        for views in (
            ViewLogits(*torch.randn(3, 5, 128)[..., :100]),
            ViewLogits(*torch.randn(3, 5, 200)[..., ::2]),
            ViewLogits(*torch.randn(3, 100, 5).transpose(1, 2)),
        ):
            compare(views, Settings())

    @pytest.mark.parametrize("shape", [(0, 45), (3, 0), (0, 0)])
    def test_pass_without_tokens_or_columns_equals_torch(self, shape):
        for divergence in ("kl_target_student", "jsd"):
            compare(random_views(*shape), Settings(divergence=divergence), with_metrics=False)

    @pytest.mark.parametrize("run", [run_logits_form, run_fused])
    @pytest.mark.parametrize("divergence", ["kl_target_student", "kl_student_target", "jsd"])
    def test_loss_equals_the_oracle(self, run, divergence):
        """`test_every_pass_equals_torch` covers all cases of the target."""
        check(run, make_problem(), Settings(divergence=divergence))
        check(run, make_problem(vocab_size=9), Settings(divergence=divergence))
        check(run, make_problem(num_tokens=0), Settings(divergence=divergence))


def test_kernels_compile_for_an_h100_without_spilling():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.numerics.compiled_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in lines} == {
        "_view_statistics",
        "_target_statistics",
        "_mixture_statistics",
        "_write_gradient",
        "_student_statistics",
        "_write_cross_entropy_gradient",
    }
    for line in lines:
        assert line["spilled_bytes"] == 0, line
        assert line["registers"] <= 128, line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("num_columns", [45, 50_257, 128_256])
    def test_every_pass_equals_torch(self, num_columns, dtype):
        views = random_views(64, num_columns, dtype, "cuda")
        for divergence in ("kl_target_student", "kl_student_target", "jsd"):
            for with_metrics in (True, False):
                compare(views, Settings(divergence=divergence), with_metrics)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("num_columns", [45, 50_257, 128_256])
    def test_passes_of_cross_entropy_equal_torch(self, num_columns, dtype):
        compare_cross_entropy(random_views(64, num_columns, dtype, "cuda").student)

    @pytest.mark.parametrize("run", [run_logits_form, run_fused])
    def test_loss_equals_the_oracle(self, run):
        """In fp32, where torch's matrix products are in fp32 by default."""
        for settings in EVERY_SETTING:
            check(run, make_problem().on("cuda"), settings)
