"""The group of vLLM servers under every failure, with fake servers over HTTP."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aropd_mcore.config import SamplingConfig, VllmConfig
from aropd_mcore.convert.adapter import AdapterSpec
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.convert.tensor_bytes import TensorInfo
from aropd_mcore.rollout import vllm_servers
from aropd_mcore.rollout.engine import RolloutFailed, rollout_seed
from aropd_mcore.rollout.vllm import default_tolerance, memory_folder
from aropd_mcore.rollout.vllm_command import adapter_arguments, server_command
from aropd_mcore.rollout.vllm_receivers import Receivers
from aropd_mcore.rollout.vllm_servers import Servers, Weights, check_digests
from aropd_mcore.rollout.vllm_side.aropd_worker import Extension, digest
from aropd_mcore.rollout.vllm_spread import Server
from aropd_mcore.types import Rollout
from tests.support.fake_vllm import EOS, UNLOADED, UNSEEDED, FakeVllm, response_to
from tests.support.tiny_models import tiny_config

SAMPLING = SamplingConfig(max_response_tokens=12)
PROMPTS = [[20 + i, 21, 22 + 3 * i] for i in range(24)]
SEEDS = [rollout_seed(5, i, 0) for i in range(24)]
PROBE = (30, 31, 32, 33)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(vllm_servers, "BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(vllm_servers, "_POLL_SECONDS", 0.02)


@pytest.fixture
def fakes() -> Iterator[Callable[..., FakeVllm]]:
    servers = []

    def start(**settings) -> FakeVllm:
        servers.append(FakeVllm(**settings))
        return servers[-1]

    yield start
    for fake in servers:
        fake.hold.set()
        fake.die()


def servers_of(
    fakes: Sequence[FakeVllm], *, batch_size: int = 4, key: str | None = None, **settings
) -> Servers:
    settings = {"start_timeout": 5.0, "request_timeout": 1.0, "retries": 2, **settings}
    return Servers(
        [Server(fake.url, key) for fake in fakes],
        VllmConfig(**settings),
        batch_size=batch_size,
        eos_token_ids=(EOS,),
        probe_ids=PROBE,
        tolerance=1e-3,
    )


def weights(
    root: Path, version: int, *, checksums: bool = False, is_adapter: bool = False
) -> Weights:
    """A folder of "weights" that give every token the log-prob -1 / (version + 1)."""
    value = -1 / (version + 1)
    folder = root / f"step-{version}"
    folder.mkdir(exist_ok=True)
    (folder / "value").write_text(str(value))
    digests = {"value": digest(torch.tensor([value]))} if checksums else None
    logprobs = [value] * (len(PROBE) - 1)
    return Weights(version, f"{version}-run", folder, logprobs, digests, is_adapter)


def generate(servers: Servers) -> list[Rollout]:
    counts = []
    rollouts = servers.generate(PROMPTS, SEEDS, SAMPLING, lambda *count: counts.append(count))
    # Each response was counted once, on arrival.
    assert counts == [(n, len(PROMPTS)) for n in range(1, len(PROMPTS) + 1)]
    return rollouts


def expected(version: int) -> list[Rollout]:
    """Rollouts of a fake server, in the order of the prompts."""
    limit = SAMPLING.max_response_tokens
    responses = [response_to(p, s, limit) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    return [
        Rollout(tuple(ids), tuple(-id / 100 for id in ids), ids[-1] == EOS, version)
        for ids in responses
    ]


def test_generate_with_a_busy_server_uses_the_free_one(fakes, tmp_path):
    busy, free = fakes(), fakes()
    servers = servers_of([busy, free], request_timeout=30)
    servers.sync(weights(tmp_path, 0))
    busy.hold.clear()
    counts = []

    def on_response(num_done: int, num_all: int) -> None:
        counts.append(num_done)
        if num_done == num_all - 4:  # all but those on the busy server
            busy.hold.set()

    assert servers.generate(PROMPTS, SEEDS, SAMPLING, on_response) == expected(0)
    assert (busy.responses, free.responses) == (4, 20)
    assert busy.most_at_a_time == 4 and free.most_at_a_time <= 4


FAULTS = (
    "garbage",
    "not an object",
    "error",
    "none",
    "two",
    "fewer",
    "beyond its end",
    "log-probs of others",
    "no log-prob",
    "other weights",
    "slow",
    "hang up",
    "restart",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_generate_after_a_faulty_response_retries_only_that_response(fakes, tmp_path, fault):
    """With one server, whose other responses of the batch are kept."""
    fake = fakes()
    servers = servers_of([fake])
    servers.sync(weights(tmp_path, 3))
    fake.faults = ["", "", fault]
    assert generate(servers) == expected(3)
    # A server that has lost its weights gets them again before it serves.
    assert len(fake.loaded) == (2 if fault == "restart" else 1)
    servers.sync(weights(tmp_path, 4))
    assert generate(servers) == expected(4)


@pytest.mark.slow
def test_dead_server_is_excluded_and_rejoins_with_new_weights(fakes, tmp_path):
    mortal, other = fakes(), fakes()
    servers = servers_of([mortal, other])
    servers.sync(weights(tmp_path, 0))
    mortal.faults = ["", "", "die"]
    assert generate(servers) == expected(0)
    assert other.responses >= len(PROMPTS) - 6

    servers.sync(weights(tmp_path, 1))  # does not wait for the dead server
    assert generate(servers) == expected(1)
    assert [folder.name for folder in mortal.loaded] == ["step-0"]

    mortal.start()
    servers.sync(weights(tmp_path, 2))
    other.hold.clear()
    served_before = mortal.responses

    def on_response(num_done: int, num_all: int) -> None:
        other.hold.set()  # after the first answer of the restarted server

    assert servers.generate(PROMPTS, SEEDS, SAMPLING, on_response) == expected(2)
    assert mortal.loaded[-1].name == "step-2"
    assert mortal.responses > served_before


def test_server_that_always_fails_is_excluded(fakes, tmp_path):
    bad, good = fakes(), fakes()
    servers = servers_of([bad, good])
    servers.sync(weights(tmp_path, 0))
    bad.always = "garbage"
    assert generate(servers) == expected(0)
    assert bad.responses == 0


def test_generate_without_any_server_names_each_with_its_last_error(fakes, tmp_path):
    first, second = fakes(), fakes()
    servers = servers_of([first, second], start_timeout=0.2)
    servers.sync(weights(tmp_path, 0))
    first.faults, second.always = ["die"], "error"
    with pytest.raises(RolloutFailed) as failed:
        generate(servers)
    message = str(failed.value)
    assert f"{first.url}: it does not answer after 0.2 s" in message
    assert f"{second.url}: /inference/v1/generate: answered 500: " in message
    assert "EngineCore died" in message


def test_response_that_fails_on_every_server_raises(fakes, tmp_path):
    fake = fakes()
    servers = servers_of([fake], batch_size=1)
    servers.sync(weights(tmp_path, 0))
    fake.faults = ["none"] * 3
    with pytest.raises(RolloutFailed, match=r"a response failed 3 times, .*returned 0 responses"):
        servers.generate(PROMPTS[:1], SEEDS[:1], SAMPLING, lambda *_: None)


@pytest.mark.parametrize("lie", ["keeps the old weights", "log-probs after sampling settings"])
def test_sync_with_other_logprobs_raises_with_both_means(fakes, tmp_path, lie):
    honest, liar = fakes(), fakes()
    servers = servers_of([honest, liar])
    servers.sync(weights(tmp_path, 0))
    assert generate(servers) == expected(0)
    keeps = lie == "keeps the old weights"
    liar.loads, liar.processed = not keeps, not keeps
    why = rf"{liar.url} does not sample from .* step 1"
    with pytest.raises(RolloutFailed, match=why) as failed:
        servers.sync(weights(tmp_path, 1))
    theirs = "-1.000000" if keeps else "-0.333333"
    assert f"-0.500000 in training and {theirs} on the server" in str(failed.value)


def test_sync_with_another_tensor_raises_with_both_digests(fakes, tmp_path):
    honest, other = fakes(), fakes()
    other.num_workers = 2
    servers = servers_of([honest, other])
    servers.sync(weights(tmp_path, 0, checksums=True))
    assert generate(servers) == expected(0)

    other.damaged = "value"
    wanted = weights(tmp_path, 1, checksums=True)
    assert wanted.digests
    with pytest.raises(RolloutFailed) as failed:
        servers.sync(wanted)
    damaged = torch.tensor([-0.5])
    damaged.view(torch.uint8)[-1] ^= 1
    assert str(failed.value) == (
        f"worker 0 of {other.url} loaded another value than training has: sha256 "
        f"{digest(damaged)}; expected {wanted.digests['value']}"
    )
    assert other.label == "0-run", "the server must not resume under the new label"

    other.damaged, other.lost = "", "value"
    servers.sync(weights(tmp_path, 2, checksums=True))  # skips the server that is not ready
    with pytest.raises(
        RolloutFailed, match=rf"{other.url} loaded 0 of 1 tensors; expected also value"
    ):
        generate(servers)

    # Sent instead of loaded.
    other.lost, other.damaged = "", "value"
    digests = {"value": digest(torch.tensor([UNLOADED]))}
    with pytest.raises(RolloutFailed, match=rf"of {other.url} loaded another value"):
        transfer(Receivers(servers), "3-run", digests)


def transfer(receivers: Receivers, label: str, digests: dict[str, str] | None = None) -> None:
    """Transfer no bytes; the fakes then have their `sent_value`."""
    _, joined = receivers.prepare()
    if joined is None:
        receivers.join(label, 0, "an id")
    receivers.begin(digests=digests is not None)
    infos = {"a": TensorInfo(torch.bfloat16, (2, 3)), "b": TensorInfo(torch.float32, (4,))}
    receivers.receive(0, infos)
    receivers.end(label, digests)


def test_colocated_servers_sleep_until_they_sample_again(fakes, tmp_path):
    """The fakes refuse requests while they sleep, and sleep loses their weights."""
    first, second = fakes(), fakes()
    servers = servers_of([first, second], placement="colocated")
    servers.sync(weights(tmp_path, 0))
    assert generate(servers) == expected(0)
    servers.sleep()
    assert first.is_asleep and second.is_asleep
    assert generate(servers) == expected(0)
    assert [folder.name for folder in first.loaded] == ["step-0", "step-0"]
    servers.sleep()
    servers.sync(weights(tmp_path, 1))
    assert not first.is_asleep and first.loaded[-1].name == "step-1"
    assert generate(servers) == expected(1)


def test_each_version_of_an_adapter_has_a_name_of_its_own(fakes, tmp_path):
    """The fakes refuse a name twice, and answer requests without a name by the base model."""
    first, second = fakes(), fakes()
    servers = servers_of([first, second])
    for version in (0, 1):
        servers.sync(weights(tmp_path, version, is_adapter=True))
        assert generate(servers) == expected(version)
        assert list(first.adapters) == list(second.adapters) == [f"{version}-run"]

    second.loads = False
    with pytest.raises(RolloutFailed, match=rf"{second.url} does not sample from .* step 2"):
        servers.sync(weights(tmp_path, 2, is_adapter=True))


def test_server_that_lost_its_adapter_gets_it_again(fakes, tmp_path):
    fake = fakes()
    servers = servers_of([fake])
    servers.sync(weights(tmp_path, 0, is_adapter=True))
    fake.die()
    fake.start()  # answers 404 to the first request
    assert generate(servers) == expected(0)
    assert [folder.name for folder in fake.loaded] == ["step-0", "step-0"]


def test_colocated_servers_keep_the_base_model_of_an_adapter(fakes, tmp_path):
    fake = fakes()
    servers = servers_of([fake], placement="colocated")
    servers.sync(weights(tmp_path, 0, is_adapter=True))
    servers.sleep()
    assert generate(servers) == expected(0)
    servers.sleep()
    servers.sync(weights(tmp_path, 1, is_adapter=True))
    assert generate(servers) == expected(1)
    assert fake.sleeps == [1, 1] and list(fake.adapters) == ["1-run"]


def test_unseeded_requests_have_no_seed(fakes, tmp_path):
    servers = servers_of([fakes()], seeded=False)
    servers.sync(weights(tmp_path, 0))
    limit = SAMPLING.max_response_tokens
    responses = [list(rollout.response_ids) for rollout in generate(servers)]
    assert responses == [response_to(prompt, UNSEEDED, limit) for prompt in PROMPTS]


def test_default_tolerance_knows_fp8_and_experts():
    bf16 = torch.bfloat16
    assert default_tolerance(torch.float32, fp8=False, experts=False) == 1e-3
    assert default_tolerance(bf16, fp8=False, experts=False) == 0.1
    assert default_tolerance(bf16, fp8=True, experts=False) == 0.3
    assert default_tolerance(bf16, fp8=True, experts=True) == 0.6


def test_memory_folder_needs_room_for_two_versions(tmp_path, capsys):
    folder = memory_folder(1000, tmp_path)
    assert folder and folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert memory_folder(shutil.disk_usage(tmp_path).free // 2, tmp_path) is None
    assert "two versions of the weights need" in capsys.readouterr().err
    assert memory_folder(1000, tmp_path / "missing") is None


def test_server_command_has_the_flags_of_sleep_and_transfer():
    settings: Any = {"dtype": "bf16", "max_length": 9, "port": 8000}
    more: Any = {"receives": True, "memory_share": 0.4567}
    plain = server_command(VllmConfig(), Path("model"), **settings)
    assert server_command(VllmConfig(), Path("model"), **settings, **more)[len(plain) :] == [
        *("--weight-transfer-config", '{"backend": "nccl"}'),
        *("--enable-sleep-mode", "--gpu-memory-utilization", "0.457"),
    ]


def test_adapter_arguments_name_the_adapted_layers():
    dense, experts = (
        read_architecture(tiny_config(name).to_dict()) for name in ("qwen2", "mixtral")
    )
    arguments = adapter_arguments(AdapterSpec(33, 1.0, ("down_proj", "q_proj")), dense)
    layers = ["--lora-target-modules", "down_proj", "q_proj"]
    assert arguments == ["--enable-lora", "--max-lora-rank", "64", *layers]
    of_experts = adapter_arguments(AdapterSpec(512, 1.0, ("o_proj", "w1", "w2", "w3")), experts)
    assert of_experts[2:] == ["512", layers[0], "o_proj", "w1", "w2", "w3", "experts"]
    assert "experts" not in adapter_arguments(AdapterSpec(8, 1.0, ("o_proj",)), experts)
    with pytest.raises(ValueError, match=r"adapter.rank 513: expected at most 512"):
        adapter_arguments(AdapterSpec(513, 1.0, ("o_proj",)), dense)
    with pytest.raises(ValueError, match=r"adapter.targets o_proj, w1: expected also w2, w3"):
        adapter_arguments(AdapterSpec(8, 1.0, ("o_proj", "w1")), experts)


def test_check_digests_needs_every_tensor_on_some_worker():
    server = Server("server 0", None)
    check_digests(
        server, {"a": "1", "b": "2", "c": "3"}, [{"a": "1", "b": "2"}, {"a": "1", "c": "3"}]
    )
    with pytest.raises(RolloutFailed, match=r"loaded 2 of 3 tensors; expected also b"):
        check_digests(server, {"a": "1", "b": "2", "c": "3"}, [{"a": "1"}, {"c": "3"}])
    with pytest.raises(RolloutFailed, match=r"worker 1 .* another d .* expected no such tensor"):
        check_digests(server, {"a": "1"}, [{"a": "1"}, {"d": "4"}])


def test_digests_are_of_the_tensors_passed_to_load_weights():
    """On a worker with the extension as a base class, as in vLLM."""

    class Model(torch.nn.Module):
        given: dict[str, torch.Tensor]

        def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            self.given = dict(tensors)
            return set(self.given)

    class Worker(Extension):
        model = Model()

        def get_model(self) -> Model:
            return self.model

    worker, tensors = Worker(), {"a": torch.ones(3, 2).bfloat16(), "b": torch.tensor(2.0)}
    for _ in range(2):
        worker.aropd_note_digests()
        worker.aropd_note_digests()  # as after a failed load
        assert worker.model.load_weights(iter(tensors.items())) == {"a", "b"}
        assert worker.model.given == tensors
        assert worker.aropd_noted_digests() == {name: digest(t) for name, t in tensors.items()}
    worker.model.load_weights(iter({"c": torch.ones(1)}.items()))
    assert worker.aropd_digests.keys() == tensors.keys(), "recording must have stopped"
    others = (
        torch.ones(2, 3).bfloat16(),
        torch.ones(3, 2).half(),
        torch.full((3, 2), 1.01).bfloat16(),
    )
    assert len({digest(tensor) for tensor in (tensors["a"], *others)}) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "0.31.4"}, "it runs vLLM 0.31.4; expected at least 0.32 and below 0.33"),
        ({"version": "1.0"}, "it runs vLLM 1.0; expected"),
        ({"key": "another"}, "/health: answered 401"),
    ],
)
def test_server_that_refuses_is_not_retried(fakes, tmp_path, settings, message):
    servers = servers_of([fakes(**settings)], key="mine", retries=1000)
    servers.sync(weights(tmp_path, 0))
    with pytest.raises(RolloutFailed, match=message):
        generate(servers)


def test_transfer_includes_every_server_that_is_up(fakes):
    """The HTTP part; NCCL needs GPUs. A restarted server waits for the next transfer."""
    first, second = fakes(), fakes()
    second.num_workers = 2
    servers = servers_of([first, second])
    receivers = Receivers(servers)

    def send(version: int) -> None:
        for fake in (first, second):
            fake.sent_value = -1.0 - version
        transfer(receivers, f"{version}-run")
        probe = [-1.0 - version] * (len(PROBE) - 1)
        servers.sync(Weights(version, f"{version}-run", None, probe))

    send(0)
    send(0)
    assert len(first.joined) == len(second.joined) == 1, "the same servers need no new communicator"
    assert generate(servers) == expected(0)
    first.die()
    first.start()
    served = first.responses + 4  # requests before its loss of weights is noticed are refused
    assert generate(servers) == expected(0)
    assert first.responses <= served

    send(1)
    assert generate(servers) == expected(1)
    assert first.responses > served
    whom = sorted((first, second), key=lambda fake: fake.joined[0]["rank_offset"])
    offsets = [fake.joined[0]["rank_offset"] for fake in whom]
    assert offsets == [1, 1 + whom[0].num_workers]
    assert [fake.joined[0]["world_size"] for fake in whom] == [4, 4]
    assert len(first.joined) == len(second.joined) == 2
    assert first.loaded == second.loaded == []


# --- servers that the run starts: the fake as a program instead of vLLM's interpreter ---


def owned_config(tmp_path: Path, *arguments: str):
    from aropd_mcore.config_file import load_config
    from tests.conftest import REPO
    from tests.support.tiny_runs import write_run

    interpreter = tmp_path / "python"
    interpreter.write_text(
        f"#!/bin/sh\nPYTHONPATH={REPO} exec {sys.executable} -m tests.support.fake_vllm $@\n"
    )
    interpreter.chmod(0o700)
    vllm = {"python": str(interpreter), "arguments": list(arguments)}
    return load_config(write_run(tmp_path, rollout={"engine": "vllm", "vllm": vllm}))


def owned_servers(config) -> Servers:
    from functools import partial

    from aropd_mcore.rollout.vllm_process import Serving, new_key, start_server

    key = new_key()
    return Servers(
        [Server("server 0", key, start=partial(start_server, Serving.from_config(config), key, 0))],
        config.rollout.vllm,
        batch_size=4,
        eos_token_ids=(EOS,),
        probe_ids=PROBE,
        tolerance=1e-3,
    )


def test_extension_keeps_a_communicator_per_sender():
    """On a worker whose transfer engine holds the communicator that it has joined last."""

    class Communicator:
        is_open = True

        def destroy(self) -> None:
            self.is_open = False

    class Engine:
        model_update_group: Communicator

    class Worker(Extension):
        weight_transfer_engine = Engine()

    worker, engine = Worker(), Worker.weight_transfer_engine
    assert worker.aropd_senders_name() is None
    first = []
    for sender in (0, 1):
        engine.model_update_group = Communicator()
        first.append(engine.model_update_group)
        worker.aropd_keep_sender("a run", sender)
    worker.aropd_choose_sender(0)
    assert engine.model_update_group is first[0] and worker.aropd_senders_name() == "a run"
    engine.model_update_group = Communicator()
    worker.aropd_keep_sender("another", 0)
    assert not any(communicator.is_open for communicator in first)
    assert engine.model_update_group.is_open and worker.aropd_senders_name() == "another"


def test_own_server_that_dies_is_restarted_with_its_weights(tmp_path):
    config = owned_config(tmp_path, "--exit-once", str(tmp_path / "has-died"))
    servers = owned_servers(config)
    try:
        servers.sync(weights(tmp_path, 0))
        assert generate(servers) == expected(0)
        assert (tmp_path / "has-died").exists()
        log = (tmp_path / "out" / "vllm-0.log").read_text()
        assert log.count("'--logprobs-mode', 'raw_logprobs'") == 2, "two starts"
        assert "VLLM_API_KEY" not in log and servers.servers[0].key not in log
    finally:
        servers.close()
    process = servers.servers[0].process
    assert process is not None and not process.is_running


def test_own_server_that_does_not_start_reports_its_log(tmp_path):
    servers = owned_servers(owned_config(tmp_path, "--refuse"))
    servers.sync(weights(tmp_path, 0))
    with pytest.raises(RolloutFailed, match=r"code 1; the end of .*vllm-0\.log:") as failed:
        generate(servers)
    assert "unrecognized arguments: --refuse" in str(failed.value)


def test_server_ends_with_its_children_when_the_run_is_killed(tmp_path):
    watched, scratch = tmp_path / "watched", tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "weights").write_text("in memory")
    one = f"echo $$ >>{watched}; exec sleep 600"
    command = f"sh -c '{one}' & {one}"
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from aropd_mcore.rollout.vllm_process import ServerProcess\n"
        f"scratch, log = Path({str(scratch)!r}), Path({str(tmp_path / 'log')!r})\n"
        "ServerProcess(['sh', '-c', sys.argv[1]], os.environ, log, scratch=scratch)\n"
        "time.sleep(600)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program, command])
    deadline = time.monotonic() + 60
    while len(pids := watched.read_text().split() if watched.exists() else []) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    while (alive := [pid for pid in pids if is_alive(int(pid))]) or scratch.exists():
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (
        FileNotFoundError,
        ProcessLookupError,
    ):  # the second if the process ends during the read
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # a zombie
