"""A real Slurm on this machine: munged, slurmctld and a slurmd for each node, in one folder.

It needs Debian's `slurm-wlm` and `munge` and no settings of the system: keys, sockets, state and
logs are in that folder, the daemons belong to whoever runs the tests, and they end with the test.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
"""What has to be installed."""

# Nodes are called by loopback addresses of their own, so that their names are found without DNS.
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job becomes eligible when the credentials of its last start have ended.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
# The CPUs and the memory that are declared here, whatever the machine has.
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """The programs of PROGRAMS that are not here."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Slurm:
    """Commands of a Slurm that runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
        }

    def __call__(self, *command: object, check: bool = True) -> str:
        """What a command prints."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        if check and done.returncode:
            raise AssertionError(f"{words} ended with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def submit(self, *words: object, cwd: Path, env: Mapping[str, str]) -> int:
        """`sbatch` with these words and this environment beside its own: the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)],
            cwd=cwd,
            env={**self.environment, **env},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: int) -> str:
        return self.job(job)["JobState"]

    def restarts(self, job: int) -> int:
        return int(self.job(job)["Restarts"])

    def wait_for(self, what: str, is_so: Callable[[], bool], *, seconds: float) -> None:
        """Until it is so."""
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds:g} s")
            time.sleep(0.3)

    def wait_until_ended(self, job: int, *, seconds: float) -> str:
        """The state that a job ends in; one that is requeued goes on."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
        self.wait_for(f"job {job} ends", lambda: self.state(job) in over, seconds=seconds)
        return self.state(job)


@contextmanager
def slurm(folder: Path, *, num_nodes: int, cpus: int) -> Iterator[Slurm]:
    """A Slurm of nodes 127.0.0.1, 127.0.0.2, ... with so many CPUs declared each.

    Everything that it started is gone at the end, whatever happens in between.
    """
    (folder / "state").mkdir(parents=True)
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    _write_conf(folder, num_nodes, cpus)
    here = Slurm(folder)
    names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
    files = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in names]
    daemons: list[subprocess.Popen] = []

    def start(*words: str) -> None:
        output = (folder / "daemons.log").open("ab")
        daemons.append(
            subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *words],
                env=here.environment,
                stdout=output,
                stderr=output,
            )
        )

    try:
        # --force: it wants a folder that every user may pass, and there is but one.
        start("munged", "--foreground", "--force", *files)
        here.wait_for("munged", (folder / "munge.socket").exists, seconds=10)
        start("slurmctld", "-D", "-c")
        for node in range(num_nodes):
            start("slurmd", "-D", "-c", "-N", f"127.0.0.{node + 1}")
        idle = ("sinfo", "-h", "-t", "idle", "-o", "%D")
        here.wait_for("idle nodes", lambda: here(*idle, check=False) == str(num_nodes), seconds=30)
        yield here
    finally:
        if len(daemons) > 1:
            _end_jobs(here)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            _reap(daemon)


def _end_jobs(here: Slurm) -> None:
    if here("squeue", "-h", check=False):
        here("scancel", "--state=PENDING", "--user", getpass.getuser(), check=False)
        here("scancel", "--user", getpass.getuser(), check=False)
        with suppress(AssertionError):
            here.wait_for("no jobs", lambda: not here("squeue", "-h", check=False), seconds=40)


def _reap(daemon: subprocess.Popen) -> None:
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _write_conf(folder: Path, num_nodes: int, cpus: int) -> None:
    host = socket.gethostname().partition(".")[0]
    names = ",".join(f"127.0.0.{node + 1}" for node in range(num_nodes))
    controller_port, *ports = _free_ports(1 + num_nodes)
    nodes = "\n".join(
        f"NodeName=127.0.0.{node + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
        f"CPUs={cpus} RealMemory=64000 State=UNKNOWN"
        for node, port in enumerate(ports)
    )
    conf = _CONF.format(
        folder=folder,
        host=host,
        user=getpass.getuser(),
        controller_port=controller_port,
        nodes=nodes,
        names=names,
    )
    (folder / "slurm.conf").write_text(conf)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
