"""Measurements of `loss.py`, in separate processes: time, memory, traffic, collectives.

    times    one process per rank runs every method in turn, and measures the machine in between
    memory   on a CPU one process per rank and method, with the kernel's figure of its peak

The processes are forked from one that has imported all modules and computed nothing.
"""

import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loss_counts import OperatorBytes, counted_collectives
from loss_methods import (
    FORMS,
    Form,
    HiddenInputs,
    Inputs,
    Method,
    Point,
    build_methods,
    make_inputs,
    matmul_flops,
    our_memory,
    our_traffic,
)
from torch import Tensor, multiprocessing
from torch.multiprocessing.spawn import start_processes

from aropd_mcore.numerics.chunks import CPU_TILE

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
"""Largest relative error of a loss and, in Frobenius norm, of a gradient, to the dense formula."""

WARM_UP = {"tokens": 64, "hidden": 64, "vocab": 4096}
"""Sizes of a run that creates thread pools and the matrix library's buffers."""

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True)
class Job:
    """Arguments of the processes."""

    point: Point
    methods: list[tuple[Form, str]]
    threads: int
    repeats: int
    folder: str
    """Folder of the ranks' rendezvous and results."""
    neighbours: int = 0
    """Number of other processes that compute while times are measured."""
    save_gradients: bool = False
    """Whether to save the dense formula's gradients to the folder, for jobs that do not run it."""


def run_on_ranks(measure: Callable[[Job, Any], dict], job: Job) -> dict:
    """Run `measure(job, tp_group)` in job.point.tp new processes, and return rank 0's result."""
    multiprocessing.set_forkserver_preload(["torch", "aropd_mcore.numerics"])
    with tempfile.TemporaryDirectory(dir=job.folder) as meeting:
        arguments = (measure, job, Path(meeting))
        start_processes(_rank, arguments, nprocs=job.point.tp, start_method="forkserver")
        return json.loads((Path(meeting) / "result.json").read_text())


def _rank(rank: int, measure: Callable[[Job, Any], dict], job: Job, meeting: Path) -> None:
    torch.set_num_threads(job.threads)
    group = None
    if job.point.tp > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting / 'ranks'}",
            rank=rank,
            world_size=job.point.tp,
            timeout=timedelta(minutes=10),
        )
        group = dist.group.WORLD
    result = measure(job, group)
    if rank == 0:
        (meeting / "result.json").write_text(json.dumps(result))
    if group is not None:
        dist.barrier()
        dist.destroy_process_group()


# --- times ---------------------------------------------------------------------------------------


def measure_times(job: Job, tp_group) -> dict[str, Any]:
    """Measure every method of the job; at tp 1 also the machine.

    Returns:
        rows: the results of each method's first run, and its `seconds`; on a GPU `peak_bytes`.
        machine: seconds of `machine_works` by name.
    """
    point = job.point
    forms: list[Form] = [form for form in FORMS if any(form == other for other, _ in job.methods)]
    inputs = {form: make_inputs(form, point, tp_group) for form in forms}
    rows, runs, machine = [], [], {}
    for form in forms:
        expected = _Expected(form, job)
        for method in _methods(job, form):
            row = {"form": form, "method": method.name, "kind": method.kind}
            rows.append(row | {"missing": method.missing})
            if method.missing:
                continue
            try:
                rows[-1] |= first_run(form, method, inputs[form], point, expected)
                if point.device == "cuda":
                    rows[-1]["peak_bytes"] = cuda_peak(method, inputs[form], point)
            except torch.OutOfMemoryError:
                rows[-1]["missing"] = "out of memory"
                continue
            rows[-1]["seconds"] = []
            run = partial(forward_backward, method, inputs[form], point)
            runs.append((run, rows[-1]["seconds"]))
    if tp_group is None:
        for name, run in machine_works(point, inputs["hidden"]).items():
            machine[name] = []
            runs.append((run, machine[name]))
            run()
    for repeat in range(job.repeats):
        start = repeat * 3 % len(runs)  # varies the order of the methods
        for run, seconds in runs[start:] + runs[:start]:
            seconds.append(timed(run, tp_group, point.device))
    return {"rows": rows, "machine": machine}


def forward_backward(method: Method, inputs: Inputs, point: Point) -> None:
    for leaf in inputs.leaves:
        leaf.grad = None
    method.loss(inputs, point.divergence).backward()


def timed(run: Callable[[], None], tp_group, device: str) -> float:
    """Return the seconds of the slowest rank."""
    _synchronize(device)
    if tp_group is not None:
        dist.barrier(tp_group)
    start = time.perf_counter()
    run()
    _synchronize(device)
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    if tp_group is not None:
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group=tp_group)
    return seconds.item()


def machine_works(point: Point, hidden: Inputs) -> dict[str, Callable[[], None]]:
    """Return functions whose times give the floors: a copy, and the five products at full size.

    On a CPU there are also the products in tiles of the vocabulary, which its matrix library
    computes faster. Outputs are allocated in advance.
    """
    source = torch.zeros(COPY_BYTES[point.device], dtype=torch.uint8, device=point.device)
    target = torch.ones_like(source)
    assert isinstance(hidden, HiddenInputs)
    student_TH, weight_VH = (leaf.detach() for leaf in hidden.leaves)
    logits_TV = torch.zeros(point.tokens, point.vocab, dtype=weight_VH.dtype, device=point.device)
    grad_TH, grad_VH = torch.zeros_like(student_TH), torch.zeros_like(weight_VH)

    def products(tile: int) -> None:
        for hidden_TH in (student_TH, hidden.partial_hidden_TH, hidden.full_hidden_TH):
            for start in range(0, point.vocab, tile):
                columns = slice(start, start + tile)
                torch.mm(hidden_TH, weight_VH[columns].T, out=logits_TV[:, columns])
        for start in range(0, point.vocab, tile):
            columns = slice(start, start + tile)
            torch.addmm(
                grad_TH,
                logits_TV[:, columns],
                weight_VH[columns],
                beta=float(start > 0),
                out=grad_TH,
            )
            torch.mm(logits_TV[:, columns].T, student_TH, out=grad_VH[columns])

    def copy() -> None:
        target.copy_(source)

    works = {"copy": copy, "products": partial(products, point.vocab)}
    if point.device == "cpu":
        works["products, tiled"] = partial(products, CPU_TILE)
    return works


# --- the first run: agreement, traffic, collectives ----------------------------------------------


class _Expected:
    """Loss and gradients of the dense formula, for all columns.

    They come from the first method that is compared, or from a job that saved them.
    """

    def __init__(self, form: Form, job: Job):
        self.form, self.job = form, job
        self.path = Path(job.folder) / f"{form}.pt"
        self.known = torch.load(self.path) if job.point.tp > 1 else None

    def errors(self, name: str, loss: Tensor, gradients: list[Tensor], tp_group) -> list[float]:
        if self.known is None:
            self.known = (loss, [gradient.clone() for gradient in gradients])
            if self.job.save_gradients:
                torch.save(self.known, self.path)
        errors = relative_errors(self.known, loss, gradients, tp_group)
        tolerance = TOLERANCE[self.job.point.dtype]
        if not max(errors) <= tolerance:
            raise RuntimeError(
                f"{self.form}, {name}: relative errors of loss and gradients are {errors}: "
                f"expected at most {tolerance} against the dense formula"
            )
        return errors


def first_run(
    form: Form, method: Method, inputs: Inputs, point: Point, expected: _Expected
) -> dict[str, Any]:
    """Run a method for the first time: return its traffic, collectives and errors."""
    main_grad_VH = inputs.main_grad_VH if isinstance(inputs, HiddenInputs) else None
    if main_grad_VH is not None:
        main_grad_VH.zero_()
    for leaf in inputs.leaves:
        leaf.grad = None
    operators = OperatorBytes() if method.kind == "eager" else None
    with operators or nullcontext():
        with counted_collectives() as forward:
            loss = method.loss(inputs, point.divergence)
        with counted_collectives() as backward:
            loss.backward()
    gradients = [leaf.grad for leaf in inputs.leaves if leaf.grad is not None]
    if main_grad_VH is not None:  # a method that accumulates into it leaves zeros in the weight's
        gradients[1] = main_grad_VH + gradients[1]
    loss = loss.detach()
    if method.kind == "one teacher":
        errors = relative_errors(full_view_answer(inputs, point), loss, gradients, None)
    else:
        errors = expected.errors(method.name, loss, gradients, inputs.tp_group)
    facts = {
        "loss": loss.item(),
        "errors": errors,
        "collectives": {"forward": forward, "backward": backward},
        "flops": matmul_flops(form, method, point),
    }
    if method.kind == "ours":
        facts["moved_bytes"] = our_traffic(form, method, point)
        facts["accounted_peak_bytes"] = our_memory(form, point)
    elif operators is not None:
        facts["moved_bytes"] = operators.num_bytes
    return facts


def full_view_answer(inputs: Inputs, point: Point) -> tuple[Tensor, list[Tensor]]:
    """Compute the dense loss and gradients with the full view's distribution as the target."""
    assert isinstance(inputs, HiddenInputs)
    same_views = replace(inputs, partial_hidden_TH=inputs.full_hidden_TH)
    dense = build_methods("hidden", point.device)[0]
    forward_backward(dense, same_views, point)
    loss = dense.loss(same_views, point.divergence).detach()
    return loss, [leaf.grad for leaf in inputs.leaves if leaf.grad is not None]


def relative_errors(
    expected: tuple[Tensor, list[Tensor]], loss: Tensor, gradients: list[Tensor], tp_group
) -> list[float]:
    """Return |x - y| / |y| of the loss and of each gradient; y has the columns of all ranks."""
    errors = [float((loss - expected[0]).abs() / expected[0].abs())]
    for gradient, whole in zip(gradients, expected[1], strict=True):
        for dim in range(2):
            if tp_group is not None and whole.size(dim) != gradient.size(dim):
                whole = whole.chunk(tp_group.size(), dim)[tp_group.rank()]
        errors.append(float((gradient.float() - whole.float()).norm() / whole.float().norm()))
    return errors


# --- memory --------------------------------------------------------------------------------------


def cuda_peak(method: Method, inputs: Inputs, point: Point) -> int:
    for leaf in inputs.leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(method, inputs, point)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_memory(job: Job, tp_group) -> dict[str, int]:
    """Measure the peak resident bytes above the inputs, of the job's single method.

    The result is that of the rank with the most. Writing 5 to clear_refs resets the kernel's peak
    to the resident bytes. Freed memory is returned to the system first. Otherwise the method could
    use it without being measured.
    """
    [(form, _)] = job.methods
    [method] = _methods(job, form)
    warm_up = replace(job.point, **WARM_UP)
    forward_backward(method, make_inputs(form, warm_up, tp_group), warm_up)
    inputs = make_inputs(form, job.point, tp_group)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_resident_bytes()
    forward_backward(method, inputs, job.point)
    peak = torch.tensor(_peak_resident_bytes() - before)
    if tp_group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=tp_group)
    return {"peak_bytes": int(peak)}


def _peak_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["VmHWM"].split()[0]) * 1024


def _methods(job: Job, form: Form) -> list[Method]:
    methods = build_methods(form, job.point.device)
    return [method for method in methods if (form, method.name) in job.methods]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
