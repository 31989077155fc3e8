"""A real Slurm on this machine: munged, slurmctld and one slurmd per node, in one folder.

It needs Debian's `slurm-wlm` and `munge`, but no system settings. Keys, sockets, state and logs are
in the folder. The daemons run as the user of the tests, and end with the test.
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
"""Programs that must be installed."""

# Node names are loopback addresses, which need no DNS.
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job becomes eligible when the credentials of its last start have expired.
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
# Use the CPUs and the memory that are declared here, not those of the machine.
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Return the programs of PROGRAMS that are not installed."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Slurm:
    """Commands of a running Slurm."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
        }

    def __call__(self, *command: object, check: bool = True) -> str:
        """Run a command and return its output."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        if check and done.returncode:
            raise AssertionError(f"{words} exited with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def submit(self, *words: object, cwd: Path, env: Mapping[str, str]) -> int:
        """Call `sbatch` with these arguments and added variables, and return the job's number."""
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
        """Return the fields of `scontrol show job`."""
        words = self("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: int) -> str:
        return self.job(job)["JobState"]

    def restarts(self, job: int) -> int:
        return int(self.job(job)["Restarts"])

    def wait_for(self, event: str, has_happened: Callable[[], bool], *, seconds: float) -> None:
        """Wait until `has_happened()` is true; raise AssertionError after `seconds`."""
        deadline = time.monotonic() + seconds
        while not has_happened():
            if time.monotonic() > deadline:
                raise AssertionError(f"{event}: not within {seconds:g} s")
            time.sleep(0.3)

    def wait_until_ended(self, job: int, *, seconds: float) -> str:
        """Wait until a job has ended, and return its state. A requeued job has not ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
        self.wait_for(f"job {job} ends", lambda: self.state(job) in over, seconds=seconds)
        return self.state(job)


@contextmanager
def slurm(folder: Path, *, num_nodes: int, cpus: int) -> Iterator[Slurm]:
    """Run a Slurm with nodes 127.0.0.1, 127.0.0.2, ... and `cpus` declared CPUs on each.

    On exit, also after an error, all its processes are ended.
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
        # --force: munged requires a folder that all users can enter, and this one is private.
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
