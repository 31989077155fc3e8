"""A run with a real vLLM server that it starts: weights, tokens, log-probs, and a killed server.

All checks share one server, which takes a minute to start, and run on two tensor-parallel ranks.
"""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from aropd_mcore.config import Config, SamplingConfig
from aropd_mcore.config_file import load_config
from aropd_mcore.rollout import vllm_api
from aropd_mcore.rollout.engine import Progress, RolloutFailed, ignore, rollout_seed
from aropd_mcore.rollout.vllm import MEMORY
from tests.support.ranks import run_ranks
from tests.support.rollouts import sample
from tests.support.tiny_runs import write_model, write_run

pytestmark = pytest.mark.vllm

NUM_STEPS = 3
GREEDY = SamplingConfig(temperature=0, max_response_tokens=16)
RANDOM = SamplingConfig(temperature=1.3, top_p=0.9, top_k=40, max_response_tokens=16)
PROMPTS = [[(31 * i + 7 * j * j) % 250 for j in range(n)] for i, n in enumerate((7, 1, 19, 4))]
SEEDS = [rollout_seed(1, position, 0) for position in range(len(PROMPTS))]
START_SECONDS = 300.0


@pytest.mark.timeout(900)
def test_train_with_vllm_equals_native(tmp_path):
    vllm = {
        "python": os.environ["AROPD_VLLM_PYTHON"],
        "arguments": ["--enforce-eager"],
        "start_timeout": START_SECONDS,
        "checksums": True,
    }
    path = write_run(
        tmp_path,
        parallel={"tensor": 2},
        training={"num_steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
        rollout={"temperature": 0, "max_response_tokens": 16, "batch_size": 3, "vllm": vllm},
    )
    # The smallest head size of vLLM's attention on CPU is 32.
    write_model(tmp_path / "model", hidden_size=256, num_attention_heads=8)
    run_ranks(check_run, 2, path, timeout=850)


def check_run(path: Path) -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    from aropd_mcore.mcore import runtime as mcore_runtime
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.step import train_step

    config = load_config(path)
    run = build_run(config, start_runtime(config))
    expected = [float(train_step(run, step).sums["loss"].sum()) for step in range(NUM_STEPS)]
    mcore_runtime.stop()

    config = load_config(path, ["rollout.engine=vllm"])
    run = build_run(config, start_runtime(config))
    engine: Any = run.engine
    try:
        engine.update_weights(0)
        losses = []
        for step in range(NUM_STEPS):
            check_same_as_native(config, run, step)
            kill = build_kill(engine) if step == NUM_STEPS - 1 else ignore
            result = train_step(run, step, on_progress=kill)
            losses.append(float(result.sums["loss"].sum()))
            assert all(r.weight_version == step for r in result.rollouts)
        assert losses == pytest.approx(expected, abs=1e-3)
        check_same_as_native(config, run, NUM_STEPS)
        if run.runtime.rank == 0:
            log = (config.output_dir / "vllm-0.log").read_text(errors="replace")
            assert log.count("Started server process") == 2, "expected one restart"
            check_key_is_required(engine)

        check_same_after_sleep(config, run, NUM_STEPS)

        # One bit of the exported file changes before the server loads it.
        load_weights = vllm_api.Api.load_weights
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm_api.Api, "load_weights", build_damaged_load(load_weights))
            engine.update_weights(NUM_STEPS)
        with pytest.raises(RolloutFailed, match=r"worker 0 of server 0 loaded another \S+weight"):
            sample(engine, PROMPTS, SEEDS, GREEDY)
        engine.update_weights(NUM_STEPS)
        check_same_as_native(config, run, NUM_STEPS)

        # The server reports success without having loaded the weights.
        rollout = engine._serving.rollout
        vllm = rollout.vllm.model_copy(update={"checksums": False})
        engine._serving = replace(
            engine._serving, rollout=rollout.model_copy(update={"vllm": vllm})
        )
        if run.runtime.rank == 0:
            engine._servers.servers[0].num_failures = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm_api.Api, "load_weights", load_nothing)
            train_step(run, NUM_STEPS)
        with pytest.raises(RolloutFailed, match="server 0 does not sample from the weights of"):
            train_step(run, NUM_STEPS + 1)
    finally:
        processes = list_processes(engine)
        engine.close()
    assert engine._scratch.parent == MEMORY
    assert run.runtime.rank or not engine._scratch.exists(), "rank 0 removes it"
    deadline = time.monotonic() + 20
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_same_as_native(config: Config, run: Any, version: int) -> None:
    """Compare greedy tokens with the native engine, and samples' log-probs with the trainer."""
    from aropd_mcore.data.tokenizer import eos_token_ids
    from aropd_mcore.mcore.logprobs import sequence_logprobs
    from aropd_mcore.rollout.native import NativeEngine

    model = run.student.model
    ends = eos_token_ids(config.model.path, run.view_builder.tokenizer)
    native = NativeEngine(model, run.runtime, eos_token_ids=ends, batch_size=8)
    native.update_weights(version)
    actual = sample(run.engine, PROMPTS, SEEDS, GREEDY)
    expected = sample(native, PROMPTS, SEEDS, GREEDY)
    for a, b in zip(actual, expected, strict=True):
        assert a.response_ids == b.response_ids and a.finished == b.finished
        assert a.weight_version == b.weight_version == version
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)

    sampled = sample(run.engine, PROMPTS, SEEDS, RANDOM)
    for prompt, rollout in zip(PROMPTS, sampled, strict=True):
        logprobs = sequence_logprobs(model, run.runtime, [*prompt, *rollout.response_ids])
        actual_logprobs = torch.tensor(rollout.logprobs)
        torch.testing.assert_close(actual_logprobs, logprobs[len(prompt) - 1 :], rtol=0, atol=1e-3)
    # The same seeds in another order give the same responses.
    again = sample(run.engine, PROMPTS[::-1], SEEDS[::-1], RANDOM)[::-1]
    assert [r.response_ids for r in again] == [r.response_ids for r in sampled]
    other = sample(run.engine, PROMPTS, [seed + 1 for seed in SEEDS], RANDOM)
    assert [r.response_ids for r in other] != [r.response_ids for r in sampled]


def check_same_after_sleep(config: Config, run: Any, version: int) -> None:
    """Let the servers fall asleep, and compare them with the native engine after they woke up.

    Sleep releases no memory on a CPU, but the calls and their order are those of a GPU.
    """
    servers = run.engine._servers if run.runtime.rank == 0 else None
    if servers is not None:
        separate = servers._config
        servers._config = separate.model_copy(update={"placement": "colocated"})
        servers.sleep()
    check_same_as_native(config, run, version)
    if servers is not None:
        servers._config = separate


def build_kill(engine: Any) -> Progress:
    """Build a callback that kills the server once, while requests are in flight and others wait."""
    killed = []

    def on_progress(num_done: int, num_all: int) -> None:
        if not killed:
            assert num_done < num_all
            [server] = psutil.Process(engine._servers.servers[0].process._process.pid).children()
            server.send_signal(signal.SIGKILL)
            killed.append(server)

    return on_progress


def list_processes(engine: Any) -> list[psutil.Process]:
    if engine._servers is None:
        return []
    watchdog = psutil.Process(engine._servers.servers[0].process._process.pid)
    return [watchdog, *watchdog.children(recursive=True)]


def build_damaged_load(load_weights: Any) -> Any:
    """Build a method that changes the last bit of the second rank's file before load_weights."""

    async def load(self: vllm_api.Api, folder: Path) -> None:
        with (folder / "model-00002-of-00002.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        await load_weights(self, folder)

    return load


async def load_nothing(self: vllm_api.Api, folder: Path) -> None:
    pass


def check_key_is_required(engine: Any) -> None:
    """Check that every endpoint requires the key, also those of vLLM's development mode."""
    server = engine._servers.servers[0]
    with httpx.Client(trust_env=False, base_url=server.url) as http:
        call = {"method": "aropd_reload_weights"}
        assert http.post("/collective_rpc", json=call).status_code == 401
        assert http.get("/health").status_code == 401
        key = {"Authorization": f"Bearer {server.key}"}
        assert http.get("/health", headers=key).status_code == 200
