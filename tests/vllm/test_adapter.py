"""A run with an adapter and a real vLLM server: the server gets the adapter after each step."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from aropd_mcore.config_file import load_config
from aropd_mcore.rollout.vllm_api import ServerError
from aropd_mcore.rollout.vllm_servers import Servers, client
from tests.support.ranks import run_ranks
from tests.support.tiny_adapters import write_adapter
from tests.support.tiny_runs import write_model, write_run
from tests.vllm.test_rollouts import (
    PROMPTS,
    START_SECONDS,
    check_same_after_sleep,
    check_same_as_native,
)

pytestmark = pytest.mark.vllm

NUM_STEPS = 2
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
"""Some of the layers that vLLM joins have no adapter."""


@pytest.mark.timeout(900)
def test_adapter_on_a_server_equals_native(tmp_path):
    vllm = {
        "python": os.environ["AROPD_VLLM_PYTHON"],
        "arguments": ["--enforce-eager"],
        "start_timeout": START_SECONDS,
    }
    path = write_run(
        tmp_path,
        parallel={"tensor": 2, "pipeline": 2},
        adapter={"rank": 4, "alpha": 8, "targets": TARGETS, "path": str(tmp_path / "adapter")},
        optimizer={"lr": 3e-3},
        training={"num_steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
        rollout={"engine": "vllm", "max_response_tokens": 16, "batch_size": 3, "vllm": vllm},
    )
    # The smallest head size of vLLM's attention on CPU is 32.
    model = write_model(tmp_path / "model", hidden_size=256, num_attention_heads=8)
    write_adapter(tmp_path / "adapter", model, targets=TARGETS)
    run_ranks(check_run, 4, path, timeout=850)


def check_run(path: Path) -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    from aropd_mcore.mcore.logprobs import sequence_logprobs
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.step import train_step

    config = load_config(path)
    run = build_run(config, start_runtime(config))
    engine: Any = run.engine
    try:
        engine.update_weights(0)
        logprobs = []
        for step in range(NUM_STEPS):
            check_same_as_native(config, run, step)
            logprobs.append(sequence_logprobs(run.student.model, run.runtime, PROMPTS[2]))
            result = train_step(run, step)
            assert all(r.weight_version == step for r in result.rollouts)
        # With the same prompts in the prefix cache of every version.
        check_same_as_native(config, run, NUM_STEPS)
        change = (logprobs[1] - logprobs[0]).abs().mean()
        assert change > 0.01, "the probe must tell the versions apart"

        check_same_after_sleep(config, run, NUM_STEPS)

        if run.runtime.rank == 0:
            asyncio.run(check_names(engine._servers))
    finally:
        engine.close()
    if run.runtime.rank == 0:
        log = (config.output_dir / "vllm-0.log").read_text(errors="replace")
        assert log.count("Started server process") == 1
    assert not list(config.output_dir.rglob("*.safetensors")), "they are in memory"


async def check_names(servers: Servers) -> None:
    """Check that the server has only the newest adapter, and does not answer for another one."""
    async with client() as http:
        api = servers.api(http, servers.servers[0])
        models = (await api._call("GET", "/v1/models"))["data"]
        [name] = [model["id"] for model in models if model["parent"] is not None]
        assert name.startswith(f"{NUM_STEPS}-")
        with pytest.raises(ServerError, match="The model `1-old` does not exist"):
            await api.score(PROMPTS[0], "1-old")
