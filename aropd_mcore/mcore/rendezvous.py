"""Report of a long rendezvous: the address that gloo binds to, and what to change."""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

WAIT_SECONDS = 60.0
"""Time in seconds after which a rank reports that it still waits for the others."""

_VARIABLE = "GLOO_SOCKET_IFNAME"


@contextmanager
def reporting_long_wait() -> Iterator[None]:
    """Context of the rendezvous and the first exchanges of a job of several ranks.

    After WAIT_SECONDS in it, the first rank of each machine prints a report on stderr.
    """
    is_reporter = os.environ.get("LOCAL_RANK", "0") == "0"
    timer = threading.Timer(WAIT_SECONDS, _report)
    timer.daemon = True
    if "RANK" in os.environ and is_reporter:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _report() -> None:
    sys.stderr.write(describe_wait() + "\n")  # a single write, since ranks share the log
    sys.stderr.flush()


def describe_wait() -> str:
    """Describe the rendezvous of this rank, gloo's address, and what to do."""
    variables = os.environ
    store = f"{variables.get('MASTER_ADDR')}:{variables.get('MASTER_PORT')}"
    addresses = _addresses()
    address, origin = _gloo_address()
    interface = next((name for name, ip in addresses if ip == address), "no interface")
    others = ", ".join(f"{name} {ip}" for name, ip in addresses if not _is_loopback(ip))
    if address is None:
        cause = f"gloo finds no address from {origin}."
    else:
        cause = f"gloo binds to {address} ({interface}), from {origin}."
        if _is_loopback(address):
            cause += " Other machines cannot reach this address."
    return (
        f"[rank {variables.get('RANK')}] has waited {WAIT_SECONDS:g} s for the "
        f"{variables.get('WORLD_SIZE')} ranks of the job, at {store}. {cause} Check that every "
        "rank has started and that MASTER_ADDR names the first node. If the job has several nodes, "
        f"set {_VARIABLE}, and for GPUs also NCCL_SOCKET_IFNAME, to the interface that connects "
        f"them. Interfaces of {socket.gethostname()}: {others or 'none but loopback'}."
    )


def _gloo_address() -> tuple[str | None, str]:
    """Return the address that gloo binds to, or None, and its origin.

    Source: torch's ProcessGroupGloo.createDefaultDevice: the first address of the interface or of
    the host name that a socket can be bound to, else the loopback address.
    """
    names = os.environ.get(_VARIABLE)
    if names:
        first = names.split(",")[0]
        own = [ip for name, ip in _addresses() if name == first]
        return (own[0] if own else None), f"{_VARIABLE}={names}"
    host = socket.gethostname()
    origin = f"the host name {host}"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return "127.0.0.1", f"{origin}, which does not resolve to an address of this machine"
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return str(address[0]), origin
    return "127.0.0.1", f"{origin}, which does not resolve to an address of this machine"


def _addresses() -> list[tuple[str, str]]:
    """Return interface and IP address of this machine's network interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return [
        (name, entry.address.partition("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families
    ]


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
