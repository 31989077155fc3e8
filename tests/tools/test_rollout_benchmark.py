"""tools/benchmarks/rollout.py at a sixteenth of its tokens: the methods do the same work."""

import importlib.util

import pytest

from tests.conftest import REPO
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.rest


def test_methods_and_report():
    figures, text = run_ranks(measured, 1)[0]
    assert set(figures["seconds"]) == {
        *(f"made {n}" for n in (8, 16, 32)),
        "prefix again",  # which the benchmark compares with the engine, token by token
        "rows leave and enter",
        "batch after batch",
    }
    assert 64 < figures["num_sampled"] < 64 * 32, "responses of many lengths"
    for line in ("the engine / the prefix again", "a token of 32 / of 8", "rows leave and enter /"):
        assert line in text


def measured() -> tuple[dict, str]:
    from aropd_mcore.mcore import runtime

    path = REPO / "tools" / "benchmarks" / "rollout.py"
    spec = importlib.util.spec_from_file_location("rollout_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    here = runtime.start()
    model = module.random_model(module.MODEL | {"hidden_size": 64, "vocab_size": 512}, here)
    figures = module.measure(model, here, repeats=1, scale=16)
    return figures, module.report(figures)
