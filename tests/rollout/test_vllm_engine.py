"""The vLLM engine on every rank of a job: weights, rollouts, and the same errors on all ranks.

The servers are fakes in the test's process. They sample by a formula and score with transformers.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aropd_mcore.config import Config, ConfigError, SamplingConfig
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.manifest import newest
from aropd_mcore.data.tokenizer import eos_token_ids, load_tokenizer
from aropd_mcore.rollout.engine import PromptBatch, RolloutFailed, rollout_seed
from aropd_mcore.types import Rollout
from tests.support.fake_vllm import FakeVllm, SocketLink, response_to
from tests.support.ranks import run_ranks
from tests.support.rollouts import sample
from tests.support.tiny_runs import write_model, write_run

KEY = "a key"
SAMPLING = SamplingConfig(max_response_tokens=10)


@pytest.fixture
def fakes() -> Iterator[list[FakeVllm]]:
    fakes = [FakeVllm(key=KEY), FakeVllm(key=KEY)]
    yield fakes
    for fake in fakes:
        fake.die()


def config_of(folder: Path, fakes: list[FakeVllm], **sections: dict[str, Any]) -> Path:
    vllm = {"urls": [fake.url for fake in fakes], "retries": 1, "start_timeout": 4.0}
    vllm["checksums"] = True
    rollout = {"engine": "vllm", "max_response_tokens": 10, "vllm": vllm}
    return write_run(folder, **{"rollout": rollout, **sections})


def prompts_of(dp_rank: int) -> list[list[int]]:
    """Prompts that differ in number and content between data-parallel ranks."""
    return [[10 + dp_rank, 30 + i, 31] for i in range(5 + dp_rank)]


def seeds_of(dp_rank: int) -> list[int]:
    return [rollout_seed(dp_rank, i, 0) for i in range(5 + dp_rank)]


def expected(config: Config, dp_rank: int, version: int) -> list[Rollout]:
    """Rollouts of a fake server."""
    ends = eos_token_ids(config.model.path, load_tokenizer(config.model.path))
    rollouts = []
    for prompt, seed in zip(prompts_of(dp_rank), seeds_of(dp_rank), strict=True):
        ids = response_to(prompt, seed, SAMPLING.max_response_tokens, ends)
        logprobs = tuple(-id / 100 for id in ids)
        rollouts.append(Rollout(tuple(ids), logprobs, ids[-1] in ends, version))
    return rollouts


LAYOUTS = (
    ("qwen2", {"tensor": 2}),  # with two replicas
    ("qwen2", {"pipeline": 2, "virtual_pipeline": 2, "context": 2}),
    ("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 4}),
)


@pytest.mark.parametrize(("family", "parallel"), LAYOUTS)
def test_each_replica_gets_rollouts_of_its_prompts_from_the_current_weights(
    tmp_path, fakes, family, parallel
):
    path = config_of(tmp_path, fakes, parallel=parallel)
    write_model(tmp_path / "model", family)
    run_ranks(check_rollouts, 4, path)
    for fake in fakes:
        assert [folder.name for folder in fake.loaded] == ["step-0000000", "step-0000001"]
        assert fake.responses > 0
    root = tmp_path / "out" / "vllm-weights"
    assert root.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in root.iterdir()] == ["step-0000001"], (
        "older weights must be removed"
    )


def check_rollouts(path: Path) -> None:
    os.environ["VLLM_API_KEY"] = KEY
    from aropd_mcore.mcore import rank0
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = load_config(path)
    runtime = start_runtime(config)
    engine = build_run(config, runtime).engine
    assert engine is not None
    rank = runtime.dp_rank
    usual, rank0.HEARTBEAT_SECONDS = rank0.HEARTBEAT_SECONDS, 0.001
    for version in (0, 1):
        with torch.no_grad():  # "a step", the same on every rank
            for chunk in engine.model:  # type: ignore[attr-defined]
                for parameter in chunk.parameters():
                    parameter.mul_(1 - 0.1 * version)
        # The fakes score the probe with the weights that they got. This fails unless the shards of
        # TP, PP, CP and EP were combined correctly.
        engine.update_weights(version)
        rollouts = sample(engine, prompts_of(rank), seeds_of(rank), SAMPLING)
        assert rollouts == expected(config, rank, version)
    rank0.HEARTBEAT_SECONDS = usual
    os.environ.pop("VLLM_API_KEY")


def test_errors_are_raised_on_every_rank(tmp_path, fakes):
    path = config_of(tmp_path, fakes, parallel={"tensor": 2})
    run_ranks(check_errors, 4, path)


def check_errors(path: Path) -> None:
    os.environ["VLLM_API_KEY"] = KEY
    from aropd_mcore.mcore import weight_files
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = load_config(path)
    runtime = start_runtime(config)
    engine = build_run(config, runtime).engine
    assert engine is not None
    engine.update_weights(0)

    # The prompt of one replica has a token that the model lacks.
    prompts = [[10, 9999 if runtime.dp_rank else 11]]
    with pytest.raises(ValueError, match="token ids from 10 to 9999"):
        sample(engine, prompts, [1], SAMPLING)

    # The disk refuses the weights of one step: `result` reports it.
    if runtime.rank == 0:
        folder = config.output_dir / "vllm-weights" / ".step-0000001.partial"
        folder.write_text("in the way")
    dist.barrier()
    engine.update_weights(1)
    with pytest.raises(
        RolloutFailed, match="the weights of step 1 could not be handed to the servers: "
    ):
        sample(engine, [[10, 11]], [1], SAMPLING)
    pending = engine.submit(PromptBatch([[10, 11]], [1], SAMPLING))
    if runtime.rank == 0:
        folder.unlink()
    dist.barrier()
    engine.update_weights(2)
    [rollout] = pending.result()
    assert rollout.weight_version == 2, "the weights of step 1 were never sent"
    assert len(sample(engine, [[10, 11]], [1], SAMPLING)) == 1

    # The disk of one rank is full half way: the servers' weights stay whole.
    def write_at(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        if runtime.rank == 3:
            patch.setattr(weight_files, "write_at", write_at)
        engine.update_weights(3)
    with pytest.raises(RolloutFailed, match=r"step 3 could not .*: rank 3 could not write"):
        sample(engine, [[10, 11]], [1], SAMPLING)
    folders = sorted(path.name for path in (config.output_dir / "vllm-weights").iterdir())
    assert folders == ["step-0000002"]
    os.environ.pop("VLLM_API_KEY")


SENT = (
    ("qwen2", {"tensor": 2, "pipeline": 2}, False),
    ("glm4_moe", {"expert": 2, "pipeline": 2}, False),  # with buffers in fp32
    pytest.param(
        *("qwen2", {"pipeline": 2, "virtual_pipeline": 2, "context": 2}, True),
        marks=pytest.mark.rest,
    ),
    pytest.param(
        *("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}, False),
        marks=pytest.mark.rest,
    ),
)


@pytest.mark.parametrize(("family", "parallel", "tie"), SENT)
def test_each_stage_sends_its_weights_to_the_workers_of_all_servers(
    tmp_path, fakes, family, parallel, tie
):
    """Over TCP instead of NCCL. The fakes cut buckets as vLLM does, and compare checksums."""
    path = config_of(tmp_path, fakes, parallel=parallel)
    write_model(tmp_path / "model", family, tie=tie)
    fakes[1].num_workers = 2
    for fake in fakes:
        fake.architecture = tmp_path / "model"
    [num_buckets, *_] = run_ranks(check_sent, 4, path)
    stages = parallel.get("pipeline", 1)
    for fake in fakes:
        assert len(fake.joined) == stages, "communicators must last for all transfers"
        assert fake.joined[0]["world_size"] == 4 and not fake.loaded
        assert fake.received_buckets == 2 * num_buckets
    assert num_buckets > 2 * stages
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def check_sent(path: Path) -> int:
    os.environ["VLLM_API_KEY"] = KEY
    from aropd_mcore.mcore import weight_buckets
    from aropd_mcore.rollout import vllm_api, vllm_nccl
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = load_config(path)
    runtime = start_runtime(config)
    engine: Any = build_run(config, runtime).engine
    engine._sync = "nccl"
    sent = []

    def noted(tensors: Any, limit: int) -> Iterator[torch.Tensor]:
        for bucket in packed(tensors, limit):
            sent.append(bucket.numel())
            yield bucket

    packed = vllm_nccl.packed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_nccl, "Link", SocketLink)
        patch.setattr(vllm_nccl, "packed", noted)
        for module in (vllm_api, vllm_nccl, weight_buckets):
            patch.setattr(module, "BUCKET_BYTES", 50_000)
        for version in (0, 1):
            with torch.no_grad():
                for parameter in engine.model.parameters():
                    parameter.mul_(1 - 0.1 * version)
            engine.update_weights(version)
            rank = runtime.dp_rank
            rollouts = sample(engine, prompts_of(rank), seeds_of(rank), SAMPLING)
            assert all(rollout.weight_version == version for rollout in rollouts)
    os.environ.pop("VLLM_API_KEY")
    counts = runtime.gather(len(sent))
    return sum(counts) // 2


def test_failure_during_a_transfer_is_raised_on_every_rank(tmp_path, fakes):
    path = config_of(tmp_path, fakes, parallel={"tensor": 2, "pipeline": 2})
    for fake in fakes:
        fake.architecture = tmp_path / "model"
    fakes[0].fails_after = 3
    run_ranks(check_failed_transfer, 4, path)


def check_failed_transfer(path: Path) -> None:
    os.environ["VLLM_API_KEY"] = KEY
    from aropd_mcore.mcore import weight_buckets
    from aropd_mcore.rollout import vllm_api, vllm_nccl
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = load_config(path)
    engine: Any = build_run(config, start_runtime(config)).engine
    engine._sync = "nccl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_nccl, "Link", SocketLink)
        for module in (vllm_api, vllm_nccl, weight_buckets):
            patch.setattr(module, "BUCKET_BYTES", 50_000)
        engine.update_weights(0)
        with pytest.raises(RolloutFailed, match=r"transfer of weights failed: .*EngineCore died"):
            sample(engine, [[10, 11]], [1], SAMPLING)
        engine.update_weights(1)
        [rollout] = sample(engine, [[10, 11]], [1], SAMPLING)
        assert rollout.weight_version == 1
    os.environ.pop("VLLM_API_KEY")


def test_nccl_sync_without_a_gpu_is_refused(tmp_path, fakes):
    path = config_of(tmp_path, fakes)
    run_ranks(check_refusal, 1, path)


def check_refusal(path: Path) -> None:
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = load_config(path, ["rollout.vllm.sync=nccl"])
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.sync: found nccl"):
        build_run(config, start_runtime(config))


@pytest.mark.rest
def test_async_steps_train_on_rollouts_of_older_weights(tmp_path, fakes):
    """The fakes' responses do not depend on weights, so training equals that of async_steps 0.
    Only the weights are older."""
    training = {"num_steps": 4, "global_batch_size": 4, "micro_batch_size": 2}
    path = config_of(tmp_path, fakes, parallel={"tensor": 2}, training=training)
    waited_for, *ahead = run_ranks(by_async_steps, 2, path)[0]
    assert [metrics.pop("rollout_staleness") for metrics in waited_for] == [0, 0, 0, 0]
    for steps, staleness in zip(ahead, ([0, 1, 1, 1], [0, 1, 2, 2]), strict=True):
        assert [metrics.pop("rollout_staleness") for metrics in steps] == staleness
        assert steps == waited_for
    assert all(metrics["engine_gap"] > 0 for metrics in waited_for), "importance weights are on"


def by_async_steps(path: Path) -> list[list[dict[str, Any]]]:
    os.environ["VLLM_API_KEY"] = KEY
    from aropd_mcore.mcore import runtime
    from aropd_mcore.rollout.vllm import VllmEngine
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.metrics import step_metrics
    from aropd_mcore.trainer.step import train_step

    metrics_of_runs = []
    for async_steps in (0, 1, 2):
        config = load_config(path, [f"rollout.async_steps={async_steps}"])
        run = build_run(config, start_runtime(config))
        engine, forward_backward = run.engine, run.student.forward_backward
        assert isinstance(engine, VllmEngine)
        in_flight = []

        def noted(*args, engine=engine, forward_backward=forward_backward, in_flight=in_flight):
            in_flight.append(len(engine._in_flight))
            return forward_backward(*args)

        run.student.forward_backward = noted  # type: ignore[method-assign]
        engine.update_weights(0)
        steps = []
        for step in range(4):
            result = train_step(run, step)
            metrics = step_metrics(step, result, run.view_builder.tokenizer, run.runtime)
            timed = ("seconds/", "tokens_per_second", "rollout_tokens_per_second")
            steps.append({k: v for k, v in metrics.items() if not k.startswith(timed)})
        assert in_flight == [min(async_steps, 3 - step) for step in range(4)]
        metrics_of_runs.append(steps)
        runtime.stop()
    os.environ.pop("VLLM_API_KEY")
    return metrics_of_runs


@pytest.mark.rest
def test_training_without_a_server_saves_and_stops(tmp_path, fakes):
    path = config_of(
        tmp_path,
        fakes,
        parallel={"tensor": 2},
        checkpoint={"save_every_steps": 100},
        training={"num_steps": 5, "global_batch_size": 4, "micro_batch_size": 2},
    )
    # After two steps of 4 responses, each server dies at its first response of the third.
    for fake in fakes:
        fake.faults = [""] * 4 + ["die"]
    run_ranks(check_stop, 2, path)

    for fake in fakes:
        fake.start()
    run_ranks(check_resume, 2, path)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5 and all("rollout_tokens_per_second" in line for line in lines)
    assert fakes[0].loaded[-1].name == "step-0000005"


def check_stop(path: Path) -> None:
    os.environ["VLLM_API_KEY"] = KEY
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.loop import TrainingStopped, train

    config = load_config(path)
    runtime = start_runtime(config)
    with pytest.raises(TrainingStopped, match="no rollouts for step 2: no vLLM server") as stopped:
        train(config, runtime)
    last = newest(config.output_dir / "checkpoints")
    assert last is not None and last.name == "iter_0000002"
    assert all(url in str(stopped.value) for url in (*config.rollout.vllm.urls, str(last)))


def check_resume(path: Path) -> None:
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.loop import train

    config = load_config(path)
    train(config, start_runtime(config))
    os.environ.pop("VLLM_API_KEY")


def test_stop_does_not_wait_for_responses(tmp_path, fakes):
    """The stop reaches only rank 0, while every server is slow."""
    for fake in fakes:
        fake.faults = ["slow"] * 8
    training = {"num_steps": 1, "global_batch_size": 4, "micro_batch_size": 2}
    run_ranks(check_stop_in_time, 2, config_of(tmp_path, fakes, training=training))


def check_stop_in_time(path: Path) -> None:
    os.environ["VLLM_API_KEY"] = KEY
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.step import train_step
    from aropd_mcore.trainer.stop import Stops, StopWanted

    stops, config = Stops(), load_config(path)
    runtime = start_runtime(config)
    run = build_run(config, runtime, stops)
    assert run.engine is not None
    run.engine.update_weights(0)
    if runtime.rank == 0:
        stops.signal = signal.SIGTERM
    with pytest.raises(StopWanted):
        train_step(run, 0)
    assert sample(run.engine, [(1, 2)], [3], config.rollout) == [], "no response was waited for"
    run.engine.close()
    os.environ.pop("VLLM_API_KEY")
