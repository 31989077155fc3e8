"""Parts of the check: for each a command, a time budget, and the goals of what it measures.

Every command also works by itself. A dry run adds arguments that make it tiny.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aropd_mcore.plan.devices import peak_bf16_flops

REPO = Path(__file__).resolve().parents[2]
BENCHMARKS = REPO / "tools" / "benchmarks"

Verdict = Literal["met", "not met", "no goal", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One measured quantity, or the result of some tests."""

    what: str
    measured: str
    goal: str
    verdict: Verdict
    note: str = ""
    value: float | None = None
    """The measured number, in SI units; None for tests."""
    constant: str = ""
    """Name of the plan's constant that it measures."""


@dataclass(frozen=True)
class Part:
    """A command, and the function that reads its figures."""

    name: str
    seconds: float
    """Time after which the part is stopped."""
    command: Callable[[Path, bool], list[str]]
    """Return the command, given the part's empty folder and whether this is a dry run."""
    read: Callable[[Path], Iterator[Check]]
    """Yield the checks, given the same folder."""
    may_fail: bool = False
    """Whether the figures are also read if the command fails, as pytest does if a test fails."""


def bound(
    what: str,
    value: float,
    limit: float | None,
    unit: str = "",
    *,
    scale: float = 1.0,
    least: bool = False,
    note: str = "",
    constant: str = "",
) -> Check:
    """Return a check of a number against its goal.

    Args:
        limit: goal, in the unit of value; None if there is none.
        scale: factor from value to the shown unit.
        least: whether the goal is a minimum.
    """
    goal, verdict = "–", "no goal"
    if limit is not None:
        goal = f"{'≥' if least else '≤'} {limit * scale:.4g}{unit}"
        verdict = "met" if (value >= limit if least else value <= limit) else "not met"
    return Check(what, f"{value * scale:.4g}{unit}", goal, verdict, note, value, constant)


# --- tests ---------------------------------------------------------------------------------------


def _tests(name: str, seconds: float, path: str, only: str = "") -> Part:
    def command(folder: Path, is_dry: bool) -> list[str]:
        words = [sys.executable, "-m", "pytest", str(REPO / path), "-q", "-m", "gpu"]
        words += ["-k", only] if only else []
        words += ["-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}"]
        return [*words, f"--junitxml={folder / 'junit.xml'}"]

    what = f"{path}{f' ({only})' if only else ''}"
    return Part(name, seconds, command, lambda folder: _read_tests(folder, what), may_fail=True)


def _read_tests(folder: Path, what: str) -> Iterator[Check]:
    """Count the tests of a JUnit file. A part whose tests were all skipped is skipped."""
    failed, reasons, num_passed, num_skipped = [], [], 0, 0
    for case in ElementTree.parse(folder / "junit.xml").iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(str(case.get("name")))
        elif (skip := case.find("skipped")) is not None:
            num_skipped += 1
            reasons.append(str(skip.get("message")))
        else:
            num_passed += 1
    if not failed and not reasons and not num_passed:
        raise ValueError("pytest found no test")
    parts = {"passed": num_passed, "failed": len(failed), "skipped": num_skipped}
    measured = ", ".join(f"{number} {name}" for name, number in parts.items() if number)
    verdict: Verdict = "failed" if failed else "met" if num_passed else "skipped"
    notes = [f"failed: {', '.join(failed)}"] if failed else []
    notes += [f"{'' if verdict == 'skipped' else 'skipped: '}{r}" for r in dict.fromkeys(reasons)]
    yield Check(f"tests of {what}", measured, "all pass", verdict, "; ".join(notes))


# --- benchmarks ----------------------------------------------------------------------------------


def _benchmark(
    name: str,
    seconds: float,
    script: str,
    read: Callable[[Any], Iterator[Check]],
    *,
    full: Sequence[str] = (),
    dry: Sequence[str] = (),
) -> Part:
    """Return the part of a script that writes its figures to the file after `--json`.

    Args:
        full: arguments of the measurement.
        dry: arguments of a dry run.
    """

    def command(folder: Path, is_dry: bool) -> list[str]:
        words = [sys.executable, str(BENCHMARKS / script), *(dry if is_dry else full)]
        return [*words, "--json", str(folder / "figures.json")]

    return Part(name, seconds, command, lambda folder: read(_figures(folder)))


def _figures(folder: Path, file: str = "figures.json") -> Any:
    return json.loads((folder / file).read_text())


def _read_precision(rows: list[dict[str, Any]]) -> Iterator[Check]:
    """Check the largest errors of the fused form, whose logits are fp32."""
    ours = [row for row in rows if row["logits"] == "fp32"]
    for name, limit in (("loss", 0.001), ("gradient", 0.01)):
        error = max(abs(row[name]) for row in ours)
        what = f"largest relative error of the {name} in bf16, to fp64"
        yield bound(what, error, limit, " %", scale=100)


def _loss(name: str, seconds: float) -> Part:
    def command(folder: Path, is_dry: bool) -> list[str]:
        words = [sys.executable, str(BENCHMARKS / "loss.py"), "--out", str(folder)]
        tiny = ["--device", "cpu", "--repeats", "1", "--tokens", "40", "--hidden", "16"]
        return [*words, *(["--vocab", "600", *tiny] if is_dry else [])]

    return Part(name, seconds, command, _read_loss)


def _read_loss(folder: Path) -> Iterator[Check]:
    """Check the goals of the loss, by the definitions of its benchmark."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from loss_results import cuda_goals  # type: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(BENCHMARKS))
    figures = _figures(folder, "loss.json")
    point = figures["points"][0]
    for goal in cuda_goals(point):
        what = f"loss, {goal['name']}"
        if goal["value"] is None:
            yield Check(what, "–", "–", "skipped", "liger-kernel is not installed")
        else:
            yield bound(what, goal["value"], goal["limit"], least=goal["least"])
    rates = dict(point["rates"])
    copies, products = rates.pop("copy_bytes_per_second"), max(rates.values())
    yield bound("copies in GPU memory", copies, None, " TB/s", scale=1e-12)
    yield bound("products of the loss", products, None, " TFLOP/s", scale=1e-12)
    if peak := peak_bf16_flops(figures["machine"]["name"]):
        what = "products of the loss, share of the peak"
        yield bound(what, products / peak, None, constant="matmul_efficiency")


VLLM_SECONDS_PER_TOKEN = 6.59e-3
"""vLLM 0.21.0, Llama-3.1-8B-Instruct in fp16 on one H100 80GB, 4 requests at once: median time per
output token (https://yobitelcomm.github.io/bench/recipes/concurrency-sweep/, 2026-05-16)."""
_VLLM_PARAMETERS = 8.03e9


def _read_decoding(figures: dict[str, Any]) -> Iterator[Check]:
    """Check a decoded token. The goal is half of vLLM's published speed, for as many weights.

    Only models of about that size have a goal: a smaller one takes its launches.
    """
    what = f"token of {figures['parameters'] / 1e9:.1f} B parameters, {figures['rows']} rows"
    limit = None
    if figures["parameters"] > _VLLM_PARAMETERS / 2:
        limit = 2 * VLLM_SECONDS_PER_TOKEN * figures["parameters"] / _VLLM_PARAMETERS
    yield from _read_tokens(figures, what, limit)


def _read_tokens(
    figures: dict[str, Any], what: str, limit: float | None, constants: tuple[str, str] = ("", "")
) -> Iterator[Check]:
    """Check the seconds per token with and without CUDA graphs, which measure two constants."""
    seconds = figures["seconds_per_token"]
    if not figures["is_captured"]:
        reason = "no CUDA graph captured these layers"
        yield Check(f"{what}, CUDA graphs", "–", "–", "skipped", reason)
    else:
        captured = seconds["graphs"][0], limit, " ms"
        yield bound(f"{what}, CUDA graphs", *captured, scale=1e3, constant=constants[0])
    plain = seconds["plain"][0], None, " ms"
    yield bound(f"{what}, without graphs", *plain, scale=1e3, constant=constants[1])


def _read_launches(figures: dict[str, Any]) -> Iterator[Check]:
    """Report the time of a layer per token, where launches take longer than reading the weights."""
    kind = "expert" if "experts" in figures["shape"] else "dense"
    per_layer = {
        name: [second / figures["layers"] for second in seconds]
        for name, seconds in figures["seconds_per_token"].items()
    }
    what = f"launches of a decoded token, per {kind} layer"
    constants = ("captured_launch_seconds", "launch_seconds") if kind == "dense" else ("", "")
    yield from _read_tokens(figures | {"seconds_per_token": per_layer}, what, None, constants)


def _read_memory(rows: list[dict[str, Any]]) -> Iterator[Check]:
    for row in rows:
        if row["phase"] == "context":
            what = "memory outside of torch's: context, kernels, workspaces"
            limits = row["measured"], row["planned"], " GB"
            yield bound(what, *limits, scale=1e-9, constant="gpu_overhead_bytes")
            continue
        ratio = row["planned"] / row["measured"]
        what = f"memory, {row['layout']}, {row['phase']}: planned / measured"
        note = f"measured {row['measured'] / 1e6:,.0f} MB"
        # The plan promises an upper bound that is not far off.
        in_range = 0.97 <= ratio <= 1.1
        verdict: Verdict = "met" if in_range else "not met"
        yield Check(what, f"{ratio:.3f}", "0.97 to 1.1", verdict, note, ratio)


def _read_pinned(figures: dict[str, Any]) -> Iterator[Check]:
    size, what = figures["bytes"], "host memory of a background save, bytes per byte"
    note = f"{figures['tensors']} tensors of {size / 1e9:.2f} GB"
    yield bound(f"{what}: computed from sizes", figures["rounded"] / size, None, note=note)
    if figures["pinned"] is None:
        yield Check(f"{what}: pinned", "–", "≤ 2", "skipped", "nothing is pinned without a GPU")
    else:
        ratio = figures["pinned"] / size
        yield bound(f"{what}: pinned", ratio, 2.0, note=note, constant="pinned_bytes")


def _decoding(
    name: str, seconds: float, read: Callable[[Any], Iterator[Check]], *full: str, dry: str = "tiny"
) -> Part:
    tiny = ["--rows", "4", "--prompt", "8", "--new", "6", "--repeats", "1"]
    return _benchmark(name, seconds, "decode.py", read, full=full, dry=["--shape", dry, *tiny])


_ONE_RANK = ["--phases", "--layout", "one rank"]
_TINY_LOSS = ["--tokens", "16", "--hidden", "64", "--vocab", "1000"]
_TRAINING = "tests/gpu/test_training.py"
PARTS = [
    _tests("saving", 150, "tests/gpu/test_saving.py"),
    _tests("graphs", 60, "tests/gpu/test_decoding.py"),
    _decoding("decoding_7b", 60, _read_decoding, "--shape", "7b"),
    _decoding("launches", 45, _read_launches, "--shape", "launch", "--rows", "8"),
    _loss("loss", 90),
    _benchmark("loss_precision", 45, "loss_precision.py", _read_precision, dry=_TINY_LOSS),
    _tests("fp8_teacher", 60, _TRAINING, "fp8_teacher"),
    _tests("fp8_rollouts", 60, _TRAINING, "fp8_rollouts"),
    _tests("experts", 60, _TRAINING, "grouped_experts"),
    _tests("host_teacher", 90, _TRAINING, "teacher_on_the_host"),
    _benchmark("pinned", 60, "pinned.py", _read_pinned, dry=["--layers", "1"]),
    _benchmark("memory", 90, "memory.py", _read_memory, full=_ONE_RANK, dry=_ONE_RANK),
    _tests("precision", 60, "tests/numerics/test_precision.py"),
    _tests("kernels", 60, "tests/numerics/test_kernels.py"),
    _decoding("decoding_1_5b", 45, _read_decoding, "--shape", "1.5b"),
    _decoding(
        "launches_experts",
        45,
        _read_launches,
        *("--shape", "launch-experts", "--rows", "8"),
        dry="tiny-experts",
    ),
    _tests("layers", 90, _TRAINING, "layers or packed"),
    _tests("fp8", 120, _TRAINING, "fp8_is_near_bf16"),
    _tests("nccl", 120, "tests/vllm/test_nccl.py"),
    _tests("colocated", 420, "tests/vllm/test_colocated.py"),
]
"""The parts in the order in which they run: first those that have never run on a GPU."""
