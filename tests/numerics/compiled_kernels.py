"""Compile every kernel for an H100, without a GPU, and print registers and spills as JSON.

    python -m tests.numerics.compiled_kernels

This is a separate process, since a Triton that interprets does not compile.
"""

import json
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from aropd_mcore.numerics import kernels
from aropd_mcore.numerics.loss_settings import LossSettings
from aropd_mcore.numerics.passes import MOMENTS, Softmax, ViewLogits


class NoGPU:
    """The functions of a driver that compilation needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all() -> list[tuple[str, Any]]:
    """Compile every kernel, for every divergence, and for bf16 and fp32 logits and gradients."""
    compiled: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def only_compile(self, *args, warmup=False, **kwargs):
        kernel = launch(self, *args, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    JITFunction.run = only_compile
    driver.set_active(NoGPU())
    num_tokens, num_columns = 4, 5000
    half_TV = torch.zeros(num_tokens, num_columns, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        views = ViewLogits(*torch.zeros(3, num_tokens, num_columns, dtype=dtype))
        views_softmax = Softmax(torch.zeros(3, num_tokens), torch.zeros(3, num_tokens))
        softmax = Softmax(torch.zeros(4, num_tokens), torch.zeros(4, num_tokens))
        numbers, tops = torch.zeros(num_tokens), torch.zeros(2, num_tokens)
        kernels.view_statistics(views, MOMENTS)
        kernels.view_statistics(views, ())
        kernels.student_statistics(views.student)
        ids_T = torch.zeros(num_tokens, dtype=torch.int64)
        for out_TV in {views.student.dtype: views.student, torch.bfloat16: half_TV}.values():
            kernels.write_cross_entropy_gradient(
                out_TV, views.student, views_softmax, ids_T, numbers
            )
        for divergence in ("kl_target_student", "kl_student_target", "jsd"):
            objective = LossSettings(0.8, 5.0, divergence, 0.5)
            for with_metrics, least in ((True, tops), (False, None)):
                kernels.target_statistics(
                    views, views_softmax, objective, with_metrics=with_metrics, least_top_2T=least
                )
            for out_TV in {views.student.dtype: views.student, torch.bfloat16: half_TV}.values():
                kernels.write_gradient(out_TV, views, softmax, numbers, objective, numbers)
        kernels.mixture_statistics(views, softmax, objective)
    return compiled


def assembled(ptx: str) -> dict[str, int]:
    """Return the registers and spills that ptxas reports for a kernel."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        done = subprocess.run(ptxas, capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    matches = {
        "registers": re.search(r"Used (\d+) registers", text),
        "spilled_bytes": re.search(r"(\d+) bytes spill stores", text),
    }
    return {name: int(match.group(1)) for name, match in matches.items() if match}


if __name__ == "__main__":
    for name, kernel in compile_all():
        print(json.dumps({"kernel": name} | assembled(kernel.asm["ptx"])))
