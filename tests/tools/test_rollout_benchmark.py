"""tools/benchmarks/rollout.py with a sixteenth of its tokens: the methods do the same work."""

import importlib.util

import pytest

from tests.conftest import REPO
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.rest


def test_methods_and_report():
    figures, text = run_ranks(measured, 1)[0]
    assert set(figures["seconds"]) == {
        *(f"new {n}" for n in (8, 16, 32)),
        "prefix reread",  # the benchmark compares its tokens with the engine's
        "rows replaced",
        "separate batches",
    }
    assert 64 < figures["num_sampled"] < 64 * 32, "expected responses of different lengths"
    for line in ("engine / prefix reread", "per token, 32 / 8", "rows replaced / separate"):
        assert line in text


def measured() -> tuple[dict, str]:
    from aropd_mcore.mcore import runtime

    path = REPO / "tools" / "benchmarks" / "rollout.py"
    spec = importlib.util.spec_from_file_location("rollout_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ranks = runtime.start()
    model = module.random_model(module.MODEL | {"hidden_size": 64, "vocab_size": 512}, ranks)
    figures = module.measure(model, ranks, repeats=1, scale=16)
    return figures, module.report(figures)
