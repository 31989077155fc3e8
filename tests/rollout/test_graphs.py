"""Captured decode steps, with a tape of torch's operators in place of a CUDA graph.

Like a graph, a tape repeats the recorded operators on the tensors of its capture. A value that the
step takes from Python or from the host is therefore repeated, and tokens would differ.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aropd_mcore.config import SamplingConfig
from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.mcore.model import build_model
from aropd_mcore.mcore.weights import load_hf_weights
from aropd_mcore.rollout.graphs import StepGraphs
from aropd_mcore.rollout.native import NativeEngine
from tests.support.ranks import run_ranks
from tests.support.rollouts import sample
from tests.support.tiny_models import save_tiny_model

PROMPTS = [[(31 * i + 7 * j * j) % 509 for j in range(n)] for i, n in enumerate((7, 1, 19, 4, 12))]
SAMPLING = SamplingConfig(temperature=1.3, top_p=0.98, max_response_tokens=24)
EOS = tuple(range(0, 509, 20))


class Tape(TorchDispatchMode):
    """Record of the operators that ran under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh"), f"{name} in a capture"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Repeat the operators, with their results in the tensors of the record."""
        for func, args, kwargs, recorded in self.calls:
            if func.is_view:
                continue  # shares memory with its base, which has its address still
            result = func(*args, **kwargs)
            if not func._schema.is_mutable:
                pairs = zip(tree_leaves(recorded), tree_leaves(result), strict=True)
                for old, new in pairs:
                    if isinstance(old, Tensor):
                        old.copy_(new)


def capture_on_tape(tapes: list[Tape]) -> Callable[[StepGraphs, Any], Any]:
    """Return a stand-in for StepGraphs._capture."""

    def capture(_graphs: StepGraphs, step: Callable[[], None]) -> Callable[[], None]:
        tape = Tape()
        with tape:
            step()
        tapes.append(tape)
        waiting = [lambda: None]  # unlike a CUDA graph, the tape has run the step it recorded
        return lambda: (waiting.pop() if waiting else tape.replay)()

    return capture


def engines_agree(folder: Path) -> None:
    runtime = mcore_runtime.start()
    model = build_model(folder, runtime, dtype=torch.float32)
    load_hf_weights(model, folder, runtime)
    plain, graphed = (
        NativeEngine(model, runtime, eos_token_ids=EOS, batch_size=4) for _ in range(2)
    )
    assert graphed._graphs is None, "CUDA graphs on a CPU"
    graphed._graphs = StepGraphs()
    tapes: list[Tape] = []

    def compare() -> int:
        """Sample with both engines; return how many steps were captured."""
        before = len(tapes)
        prompts = [prompt for prompt in PROMPTS for _ in range(2)]
        expected = sample(plain, prompts, range(10), SAMPLING)
        assert sample(graphed, prompts, range(10), SAMPLING) == expected
        assert len({len(rollout.response_ids) for rollout in expected}) > 3
        return len(tapes) - before

    with (
        patch.object(StepGraphs, "_capture", capture_on_tape(tapes)),
        patch("aropd_mcore.rollout.decode_batch.KEYS_PER_BUCKET", 16),
    ):
        assert compare() > 2, "expected several numbers of rows or keys"
        assert compare() == 0, "the same steps captured again"
        captured = dict(graphed._graphs._replays)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        compare()
        assert captured.items() <= graphed._graphs._replays.items(), "an update keeps graphs"
        weight = model[0].decoder.layers[1].mlp.linear_fc2.weight
        weight.data = 1.1 * weight.data
        assert compare() > 0, "weights at another address need new graphs"


def failed_capture(folder: Path) -> None:
    runtime = mcore_runtime.start()
    model = build_model(folder, runtime, dtype=torch.float32)
    load_hf_weights(model, folder, runtime)
    engine = NativeEngine(model, runtime, eos_token_ids=EOS, batch_size=4)
    expected = sample(engine, PROMPTS, range(5), SAMPLING)
    engine._graphs = StepGraphs()
    error = RuntimeError("operation not permitted when stream is capturing")
    with (
        patch.object(StepGraphs, "_capture", side_effect=error) as capture,
        patch("builtins.print") as report,
    ):
        assert sample(engine, PROMPTS, range(5), SAMPLING) == expected
    assert capture.call_count == report.call_count == 1
    assert "rollout.cuda_graphs" in report.call_args.args[0]


def test_captured_steps_sample_the_same_tokens_also_after_updates(tmp_path):
    save_tiny_model("qwen3", tmp_path)
    run_ranks(engines_agree, 1, tmp_path)


def test_failed_capture_is_reported_once_and_sampling_continues(tmp_path):
    save_tiny_model("qwen2", tmp_path)
    run_ranks(failed_capture, 1, tmp_path)
