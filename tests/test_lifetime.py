"""Children and their forks end with the parent process, not with the thread that started them."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from aropd_mcore import lifetime
from tests.conftest import REPO

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]

PARENT = """
import os, sys, time
from aropd_mcore import lifetime
code = '''
import os, time
from aropd_mcore import lifetime
lifetime.end_with_parent()
if os.fork() == 0:
    os.fork()
os.write(1, b"%d " % os.getpid())  # in a single write
time.sleep(600)
'''
lifetime.start([sys.executable, "-c", code])
time.sleep(600)
"""


def test_sigkill_ends_a_child_and_the_forks_of_its_forks():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = ""
    while len(pids.split()) < 3 or not pids.endswith(" "):
        pids += parent.stdout.read(1)
    family = [psutil.Process(int(pid)) for pid in pids.split()]
    for process in family:
        process.suspend()  # like a process in a C call that hangs
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 10
    while alive := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < until, alive
        time.sleep(0.01)


def test_child_outlives_the_thread_that_started_it():
    started: list[subprocess.Popen] = []
    thread = threading.Thread(target=lambda: started.append(lifetime.start(SLEEP)))
    thread.start()
    thread.join()
    [child] = started
    until = time.monotonic() + 30
    while psutil.Process(child.pid).cmdline() != SLEEP:
        assert time.monotonic() < until
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    child.kill()
    assert child.wait() == -signal.SIGKILL


def test_child_whose_parent_has_ended_does_not_start(tmp_path):
    """The parent may be killed between its fork and the child's first instruction."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    done = subprocess.run(
        [sys.executable, lifetime.__file__, str(gone.pid), "touch", str(tmp_path / "started")]
    )
    assert done.returncode == 1 and not (tmp_path / "started").exists()


def test_missing_command_is_reported_in_one_line():
    child = lifetime.start(["/no/such/program"], stderr=subprocess.PIPE)
    assert child.communicate()[1] == b"/no/such/program: No such file or directory\n"
    assert child.returncode == 1


def test_rank_whose_launcher_and_store_have_ended_exits_at_once():
    """Ranks do not know torchrun's process id, so they cannot compare it."""
    with socket.socket() as probe:  # bind and close a port, which then refuses connections
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-m", "aropd_mcore.cli", "train", "run.yaml"],
        env={**os.environ, **job, "TORCHELASTIC_USE_AGENT_STORE": "True"},
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "aropd: the process that started this rank has ended\n"


STARTS = {
    "evaluation/grade.py": "math_child.py: lifetime.start",
    "evaluation/sandbox.py": "sandbox_child.py, which requests the signal itself",
    "evaluation/sandbox_child.py": "its fork requests the signal again",
    "lifetime.py": "the mechanism",
    "mcore/checkpoint/writer.py": "the queue's server and the writers request the signal first",
    "local_launch.py": "ranks: lifetime.start",
    "rollout/vllm_process.py": "the first watchdog, which watches this process",
    "rollout/vllm_side/aropd_watchdog.py": "two watchdogs, which watch each other",
    "trainer/slurm_launch.py": "sbatch, which ends by itself and must not be interrupted",
}
"""Modules that start processes, and the reason why none of these processes is left behind."""


def test_every_module_that_starts_processes_is_listed():
    call = re.compile(
        r"subprocess\.(Popen|run|call|check_\w+)\b|os\.(fork|forkpty|system|spawn\w+|posix_spawn)\("
        r"|\w*(Manager|Process|ProcessPoolExecutor)\(ctx|multiprocessing\.\w*(Process|Pool)"
        r"|lifetime\.start\("
    )
    package = REPO / "aropd_mcore"
    files = [file for file in package.rglob("*.py") if call.search(file.read_text())]
    assert {str(file.relative_to(package)) for file in files} == STARTS.keys()
