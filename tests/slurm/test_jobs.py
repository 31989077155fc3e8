"""The job scripts of slurm/ on a real Slurm, with the arithmetic example on four ranks.

The nodes have no GPU, so each job is submitted with --gpus-per-node=0 and RANKS_PER_NODE.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.cluster import Slurm, missing_programs, slurm

pytestmark = pytest.mark.timeout(900)

EXAMPLE = REPO / "examples" / "arithmetic"
RUN = Path("runs/arithmetic/aropd")
SMALL = ["training.global_batch_size=32", "training.micro_batch_size=16"]
SMALL += ["validation.rows=[]", "logging.samples=0"]
CPUS = 4


class Site:
    """A Slurm, and the folder from which jobs are submitted, with the example's data."""

    def __init__(self, slurm: Slurm, folder: Path):
        self.slurm = slurm
        self.folder = folder
        self.environment = {
            "AROPD_HOME": str(REPO),
            "VENV": sys.prefix,
            "PYTHONPATH": str(REPO),
            "RANKS_PER_NODE": str(CPUS),
            "OMP_NUM_THREADS": "1",
        }

    def submit(self, script: str, *words: object, options: tuple = (), **environment: str) -> int:
        gpus = () if script == "convert" else ("--gpus-per-node=0",)
        return self.slurm.submit(
            *gpus,
            "--output=job-%j.out",
            *options,
            REPO / "slurm" / f"{script}.sbatch",
            *words,
            cwd=self.folder,
            env=self.environment | environment,
        )

    def log(self, job: int) -> str:
        """Return the job's own log."""
        path = self.folder / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def attempt(self, job: int, attempt: int = 0) -> Path:
        return self.folder / "logs" / str(job) / f"attempt-{attempt}"

    def everything(self, job: int) -> str:
        """Return all logs of a job, for the message of a failed assertion."""
        logs = sorted((self.folder / "logs" / str(job)).glob("attempt-*/*.log"))
        texts = [f"--- {path.parent.name}/{path.name}\n{path.read_text()[-3000:]}" for path in logs]
        return "\n".join([self.log(job), *texts])

    def steps(self, output_dir: Path) -> list[int]:
        """Return the steps in the run's metrics."""
        path = self.folder / output_dir / "metrics.jsonl"
        if not path.exists():
            return []
        whole = path.read_text().rpartition("\n")[0]
        return [json.loads(line)["step"] for line in whole.splitlines()]

    def finish(self, job: int, *, seconds: float = 300) -> None:
        state = self.slurm.wait_until_ended(job, seconds=seconds)
        assert state == "COMPLETED", self.everything(job)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    if "AROPD_SLURM" not in os.environ:
        pytest.skip("takes minutes on a real Slurm: run `make test-slurm`")
    assert not missing_programs(), f"missing {missing_programs()}: install slurm-wlm and munge"
    folder = tmp_path_factory.mktemp("with a space ")
    data, model = folder / "runs/arithmetic/data", folder / "runs/arithmetic/random"
    for script, *words in (
        ("make_data.py", data, "--num-sft", "2000"),
        ("make_model.py", model),
    ):
        subprocess.run([sys.executable, EXAMPLE / script, *map(str, words)], check=True)
    with slurm(tmp_path_factory.mktemp("slurm") / "s", num_nodes=2, cpus=CPUS) as started:
        yield Site(started, folder)


@pytest.fixture(scope="module")
def base(site: Site) -> Path:
    """The example's base model: trained for a few steps under torchrun, then converted."""
    train = site.submit(
        "train",
        EXAMPLE / "sft.yaml",
        "training.num_steps=10",
        "training.micro_batch_size=16",
        LAUNCHER="torchrun",
    )
    site.finish(train)
    export = site.submit("convert", "export", "runs/arithmetic/sft", "runs/arithmetic/base")
    site.finish(export)
    assert "-> runs/arithmetic/base" in (site.attempt(export) / "rank-0.log").read_text()
    return site.folder / "runs/arithmetic/base"


def test_train_by_torchrun_and_convert_write_the_base_model(base: Path):
    assert (base / "model.safetensors").is_file()


def test_train_usr1_saves_requeues_and_completes(site: Site, base: Path):
    num_steps, output_dir = 16, RUN.with_name("signalled")
    words = [f"output_dir={output_dir}", f"training.num_steps={num_steps}", *SMALL]
    job = launch(site, *words, "--", "--gpus-per-node=0", "--output=job-%j.out")
    site.slurm.wait_for("a few steps", lambda: len(site.steps(output_dir)) > 3, seconds=180)
    site.slurm("scancel", "--batch", "--signal=USR1", job)
    site.slurm.wait_for("a restart", lambda: site.slurm.restarts(job) == 1, seconds=120)
    assert "saved and stopped early" in site.log(job), site.everything(job)
    first = (site.attempt(job) / "rank-0.log").read_text()
    site.finish(job)
    second = (site.attempt(job, 1) / "rank-0.log").read_text()
    resumed = re.search(r"resuming at step (\d+)", second)
    assert resumed and 3 < int(resumed[1]) < num_steps, site.everything(job)
    # No step runs twice.
    assert f"step {resumed[1]}/" in first and f"step {int(resumed[1]) + 1}/" not in first
    assert site.steps(output_dir) == list(range(num_steps))


def test_train_time_limit_shorter_than_the_run_requeues_until_complete(site: Site, base: Path):
    """Slurm signals between 90 and 120 s after the start of an attempt. The run has steps for
    130 s, by their time in the previous test."""
    lines = (site.folder / RUN.with_name("signalled") / "metrics.jsonl").read_text().splitlines()
    phases = ("rollout", "teacher", "student", "optimizer", "sync")
    seconds = sorted(sum(json.loads(line)[f"seconds/{p}"] for p in phases) for line in lines)
    num_steps, output_dir = int(130 / seconds[len(seconds) // 2]), RUN.with_name("limited")
    job = site.submit(
        "train",
        EXAMPLE / "aropd.yaml",
        f"output_dir={output_dir}",
        f"training.num_steps={num_steps}",
        *SMALL,
        options=("--time=3", "--signal=B:USR1@60"),
    )
    site.finish(job, seconds=800)
    assert site.slurm.restarts(job) >= 1
    assert site.log(job).count("saved and stopped early") == site.slurm.restarts(job)
    assert site.steps(output_dir) == list(range(num_steps))


def test_train_crash_is_retried_up_to_max_restarts(site: Site, base: Path):
    job = site.submit("train", EXAMPLE / "aropd.yaml", *SMALL, MAX_RESTARTS="1")
    for attempt in (0, 1):
        log = site.attempt(job, attempt) / "rank-1.log"
        site.slurm.wait_for("rank 1", lambda log=log: log.exists() and rank(job, 1), seconds=60)
        os.kill(rank(job, 1), signal.SIGKILL)
        if attempt == 0:
            site.slurm.wait_for("a restart", lambda: site.slurm.restarts(job) == 1, seconds=60)
    assert site.slurm.wait_until_ended(job, seconds=60) == "FAILED"
    assert "rank-1" in site.log(job) and "ended with 137: failure 2 in a row" in site.log(job)
    assert "given up" in site.log(job)


def test_train_invalid_input_is_not_retried(site: Site, base: Path):
    bad = site.submit("train", EXAMPLE / "aropd.yaml", "training.num_stepz=3")
    missing = site.submit("train", "no such.yaml")
    for job in (bad, missing):
        assert site.slurm.wait_until_ended(job, seconds=90) == "FAILED"
        assert site.slurm.job(job)["ExitCode"] == "2:0"
        assert site.slurm.restarts(job) == 0
    assert "did you mean 'num_steps'?" in site.log(bad)
    assert "there is no file no such.yaml" in site.log(missing)
    assert not site.attempt(missing).exists(), "expected an end before srun"


def test_train_cancelled_job_is_not_requeued(site: Site, base: Path):
    job = site.submit("train", EXAMPLE / "aropd.yaml", *SMALL)
    site.slurm.wait_for("a rank", lambda: bool(rank(job, 0)), seconds=60)
    site.slurm("scancel", job)
    assert site.slurm.wait_until_ended(job, seconds=60) == "CANCELLED"
    assert site.slurm.restarts(job) == 0


def test_generate_writes_one_response_per_prompt(site: Site, base: Path):
    words = ["--model", base, "--prompts", "runs/arithmetic/data/heldout.jsonl"]
    words += ["--out", "out.jsonl", "--max-response-tokens", 8, "--tensor", 2]
    site.finish(site.submit("generate", *words))
    num_prompts = len((site.folder / words[3]).read_text().splitlines())
    assert len((site.folder / "out.jsonl").read_text().splitlines()) == num_prompts


def test_serve_and_train_restarts_after_a_server_dies(site: Site, base: Path):
    """The last node serves. Its server dies during the first attempt."""
    interpreter = site.folder / "python with vllm"
    interpreter.write_text(
        f"#!/bin/sh\nPYTHONPATH='{REPO}' "
        f"exec '{sys.executable}' -m tests.support.fake_vllm \"$@\"\n"
    )
    interpreter.chmod(0o700)
    output_dir = RUN.with_name("served")
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    vllm = [
        f"python={interpreter}",
        f"arguments=[--exit-once, {site.folder / 'died once'}]",
        "request_timeout=20",
    ]
    job = site.submit(
        "serve_and_train",
        EXAMPLE / "aropd.yaml",
        f"output_dir={output_dir}",
        "training.num_steps=3",
        *SMALL,
        *(f"rollout.vllm.{setting}" for setting in vllm),
        options=("--nodes=2",),
        SERVERS_PER_NODE="1",
        VLLM_PORT=str(port),
    )
    site.finish(job)
    assert site.slurm.restarts(job) == 1, site.everything(job)
    assert "server-0 (" in site.log(job) and "failure 1 in a row" in site.log(job)
    assert f"http://127.0.0.2:{port}" in site.log(job)
    assert site.steps(output_dir) == list(range(3))
    keys = [line for line in site.everything(job).splitlines() if "VLLM_API_KEY" in line]
    assert not keys


def launch(site: Site, *words: object) -> int:
    """Submit a job by `aropd launch`, and return its number."""
    command = [sys.executable, "-m", "aropd_mcore.cli", "launch", EXAMPLE / "aropd.yaml", *words]
    done = subprocess.run(
        list(map(str, command)),
        cwd=site.folder,
        env=site.slurm.environment | site.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def rank(job: int, number: int) -> int | None:
    """Return the process of a job's rank, once it runs Python."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        expected = {f"SLURM_JOB_ID={job}".encode(), f"RANK={number}".encode()}
        if expected <= set(variables) and b"train" in words and words[0].endswith(b"python"):
            return int(folder.name)
    return None
