"""The report of a rank that waits for the job's other ranks, and gloo's address in it."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from tests.conftest import REPO

WAIT_ALONE = """
from aropd_mcore.mcore import rendezvous, runtime
rendezvous.WAIT_SECONDS = 0.1
runtime.start()
"""
OWN_ADDRESS = """
import psutil
import torch.distributed as dist
from aropd_mcore.mcore.rendezvous import _gloo_address
before = {c.laddr for c in psutil.Process().net_connections("tcp")}
device = dist.ProcessGroupGloo.create_default_device()
bound = {c.laddr for c in psutil.Process().net_connections("tcp")} - before
print(_gloo_address()[0], *{address.ip for address in bound})
"""


def test_rank_without_its_peers_reports_the_address_of_gloo():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    job |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT_ALONE],
        env=os.environ | job,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr
        report = next(line for line in process.stderr if "has waited" in line)
    finally:
        process.kill()
        process.communicate()
    assert f"for the 2 ranks of the job, at 127.0.0.1:{port}" in report
    assert "gloo binds to 127.0.0.1 (lo), from GLOO_SOCKET_IFNAME=lo." in report
    assert "Other machines cannot reach this address" in report
    own = {a.address for entries in psutil.net_if_addrs().values() for a in entries}
    listed = report.rpartition("Interfaces of ")[2]
    assert all(ip in listed for ip in own if ip.count(".") == 3 and not ip.startswith("127."))


@pytest.mark.parametrize("interface", [None, "lo"])
def test_gloo_address_is_the_one_that_gloo_binds(interface):
    own = {name: v for name, v in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    own |= {"GLOO_SOCKET_IFNAME": interface} if interface else {}
    done = subprocess.run(
        [sys.executable, "-c", OWN_ADDRESS],
        env=own | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=True,
    )
    expected, bound = done.stdout.split()
    assert expected == bound
