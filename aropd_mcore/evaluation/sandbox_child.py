"""Program of the two processes of a sandbox. Uses the standard library only.

    candidate   runs the sample's code and executes calls of its functions
    checker     runs the task's tests, which call those functions through a pipe

The sample and the tests do not share an interpreter. The sample returns data only. From this data
the checker builds plain values, value types of the standard library and numpy values, so that
comparisons give the same results as in one process. The checker reports the verdict to the parent.
A sample can end, hang or patch only its own process.

numpy is imported only if a sample or a test has created a numpy value.
"""

import builtins
import ctypes
import importlib
import json
import os
import random
import resource
import select
import signal
import struct
import sys
import types
from collections.abc import Callable
from itertools import islice
from typing import Any

NOBODY = 65534
_LONGEST_MESSAGE = 1 << 26
_MOST_ITEMS = 1_000_000
_MODULE = 0
"""Number of the object that is the sample's module."""

# From linux/sched.h, mount.h, fcntl.h, prctl.h and capability.h.
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class Ended(BaseException):
    """The other process has ended or sent an unreadable message.

    A BaseException, so that the tests' `except Exception` does not catch it.
    """


# Confinement


def confine(folder: str, limits: dict[str, int], *, isolate: bool, parent: int) -> str:
    """Give up every resource that a sample does not need. May return in a child of this process.

    Args:
        folder: empty folder that no other process uses.
        isolate: enter new namespaces: no network, no other processes, and no files except the
            interpreter and system libraries (read-only) and an empty memory disk.
        parent: process id of the grader. The kernel kills this process when the grader ends.
    Returns:
        The reason why the process is not isolated. Empty if it is isolated.
    """
    is_root, problem = os.geteuid() == 0, ""

    def parent_is_gone() -> bool:
        return os.getppid() != parent

    try:
        if not isolate:
            raise OSError("not requested")
        _enter_namespaces(is_root)
        _end_with_parent(parent_is_gone)
        parent_is_gone = _continue_in_child()
        _enter_new_root(folder, limits["disk"])
    except (OSError, AttributeError) as error:  # AttributeError: the C library lacks the call
        problem = str(error)
        if is_root:
            os.chown(folder, NOBODY, NOBODY)
        os.chdir(folder)
    for name, limit in (
        ("CPU", limits["cpu"]),
        ("AS", limits["memory"]),
        ("FSIZE", limits["disk"]),
        ("NOFILE", 64),
        ("CORE", 0),
        ("NPROC", 0),  # neither processes nor threads
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if is_root:  # RLIMIT_NPROC does not apply to root
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    _check(_libc.capset(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), bytes(24)))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    # No process with the same user id may trace this process or read its memory.
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    _end_with_parent(parent_is_gone)  # fork and setuid clear the setting
    return problem


def _end_with_parent(is_gone: Callable[[], bool]) -> None:
    """Make the kernel kill this process when its parent ends. Exit if the parent has ended."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if is_gone():
        os._exit(1)


def _enter_namespaces(is_root: bool) -> None:
    """Enter new mount, IPC, network and process namespaces. Non-root: a user namespace too."""
    flags = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    ids = {"uid": os.geteuid(), "gid": os.getegid()}
    _check(_libc.unshare(flags if is_root else flags | _CLONE_NEWUSER))
    if not is_root:
        with open("/proc/self/setgroups", "w") as file:
            file.write("deny")
        for kind, id in ids.items():
            with open(f"/proc/self/{kind}_map", "w") as file:
                file.write(f"{id} {id} 1")


def _continue_in_child() -> Callable[[], bool]:
    """Fork, and return in the child only: the first process of the new process namespace.

    When that process ends, the kernel kills all processes of the namespace.

    Returns:
        Function that returns whether the parent has ended. It may be called once.
    """
    parent = os.pidfd_open(os.getpid())
    child = os.fork()
    if child:
        os.closerange(0, 1 << 20)  # only the child may hold the ends of the pipes
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)

    def is_gone() -> bool:  # getppid() is 0 here: the parent is outside the namespace
        gone = bool(select.select([parent], [], [], 0)[0])
        os.close(parent)
        return gone

    return is_gone


def _enter_new_root(folder: str, size: int) -> None:
    """Change the root to a memory disk of `size` bytes with read-only system libraries."""
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=755,size={size}")
    mounted: list[str] = []
    # A path inside a mounted path needs no mount.
    for path in sorted({"/usr", "/lib", "/lib64", "/dev/null", sys.prefix, sys.base_prefix}):
        if os.path.exists(path) and not any(path.startswith(f"{other}/") for other in mounted):
            mounted.append(path)
            _mount_read_only(path, folder + path)
    os.makedirs(f"{folder}/tmp", exist_ok=True)
    os.chmod(f"{folder}/tmp", 0o777)
    os.chroot(folder)
    os.chdir("/tmp")


def _mount_read_only(path: str, target: str) -> None:
    """Bind-mount `path` at `target`, read-only."""
    if os.path.isdir(path):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target))
        open(target, "w").close()
    _mount(path, target, "", _MS_BIND | _MS_REC)
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    _check(
        _libc.syscall(
            _SYS_MOUNT_SETATTR,
            _AT_FDCWD,
            target.encode(),
            _AT_RECURSIVE,
            attributes,
            ctypes.c_size_t(len(attributes)),
        )
    )


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _check(
        _libc.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
        )
    )


def _check(result: int) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# Data that the two processes exchange


_VALUES: dict[str, Callable[[Any], list[Any]]] = {
    "array.array": lambda value: [value.typecode, value.tolist()],
    "builtins.bytearray": lambda value: [bytes(value)],
    "builtins.memoryview": lambda value: [value.tobytes()],
    "builtins.range": lambda value: [value.start, value.stop, value.step],
    "builtins.slice": lambda value: [value.start, value.stop, value.step],
    "collections.OrderedDict": lambda value: [list(value.items())],
    "collections.deque": lambda value: [list(value), value.maxlen],
    "datetime.date": lambda value: [value.year, value.month, value.day],
    "datetime.datetime": lambda value: [
        *(value.year, value.month, value.day, value.hour, value.minute, value.second),
        *(value.microsecond, value.tzinfo),
    ],
    "datetime.time": lambda value: [
        *(value.hour, value.minute, value.second, value.microsecond, value.tzinfo)
    ],
    "datetime.timedelta": lambda value: [value.days, value.seconds, value.microseconds],
    "datetime.timezone": lambda value: [value.utcoffset(None)],
    "decimal.Decimal": lambda value: [str(value)],
    "fractions.Fraction": lambda value: [value.numerator, value.denominator],
    "pathlib.PosixPath": lambda value: [str(value)],
    "pathlib.PurePosixPath": lambda value: [str(value)],
    "uuid.UUID": lambda value: [value.hex],
}
"""Value types of the standard library -> arguments that construct an equal value."""
_VIEWS: dict[str, Callable[[list[Any]], Any]] = {
    "dict_items": lambda items: dict(items).items(),
    "dict_keys": lambda items: dict.fromkeys(items).keys(),
    "dict_values": lambda items: dict(enumerate(items)).values(),
}
_ARRAY_KINDS = "biufcSUmM"
"""Kinds of numpy dtypes whose bytes are the value: booleans, numbers, strings and dates."""


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """Encode a value for JSON such that the decoded value compares like the original.

    numpy scalars and arrays and value types of the standard library keep their type. A value of a
    subclass becomes a value of its base class, because a sample may have overridden methods such as
    `__eq__`. Any other object becomes its number.

    Args:
        keep: function that returns the number of an object.
    """
    kind = type(value)
    if kind.__module__ == "numpy" and (data := _encode_numpy(value, keep)):
        return data
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in _VALUES:
        return {"value": [name, [encode(item, keep) for item in _VALUES[name](value)]]}
    if kind.__qualname__ in _VIEWS and kind.__module__ == "builtins":
        return {"view": [kind.__qualname__, [encode(item, keep) for item in value]]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return [encode(item, keep) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k, keep), encode(v, keep)] for k, v in value.items()]}
    for base in (tuple, set, frozenset):
        if isinstance(value, base):
            return {base.__name__: [encode(item, keep) for item in value]}
    return {"object": keep(value)}


def _encode_numpy(value: Any, keep: Callable[[Any], int]) -> Any:
    """Encode a scalar or array as dtype, shape (None for a scalar) and bytes or items.

    Returns:
        None for any other numpy object.
    """
    import numpy

    if type(value) is not numpy.ndarray and not isinstance(value, numpy.generic):
        return None
    array = numpy.asarray(value)
    shape = list(array.shape) if type(value) is numpy.ndarray else None
    if array.dtype.kind == "O":
        return {"numpy": ["O", shape, [encode(item, keep) for item in array.ravel().tolist()]]}
    if array.dtype.kind not in _ARRAY_KINDS:
        return None
    return {"numpy": [array.dtype.str, shape, array.tobytes().hex()]}


def decode(data: Any, find: Callable[[int], Any]) -> Any:
    """Decode the output of `encode`. Builds only the types that `encode` supports.

    Args:
        find: function that returns the object with a number.
    """
    if isinstance(data, list):
        return [decode(item, find) for item in data]
    if not isinstance(data, dict):
        return data
    [(kind, content)] = data.items()
    if kind == "object":
        return find(int(content))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "numpy":
        dtype, shape, items = content
        return _decode_numpy(dtype, shape, items, find)
    if kind in ("value", "view"):
        name, items = content[0], [decode(item, find) for item in content[1]]
        if kind == "view":
            return _VIEWS[name](items)
        module, _, type_name = name.rpartition(".")
        if name not in _VALUES:
            raise TypeError(name)
        return getattr(importlib.import_module(module), type_name)(*items)
    items = [decode(item, find) for item in content]
    return {"dict": dict, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](items)


def _decode_numpy(dtype: str, shape: list[int] | None, content: Any, find: Any) -> Any:
    import numpy

    if dtype == "O":
        array = numpy.empty(len(content), dtype=object)
        for i, item in enumerate(content):  # assigning a slice would treat a list as a row
            array[i] = decode(item, find)
    elif dtype.strip("<>=|")[0] in _ARRAY_KINDS:
        array = numpy.frombuffer(bytearray.fromhex(content), dtype)
    else:
        raise TypeError(dtype)
    return array[0] if shape is None else array.reshape(shape)


class Channel:
    """Connection to the other process. A message is four bytes of length, then JSON."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        rest = memoryview(struct.pack("!I", len(data)) + data)
        try:
            while rest:
                rest = rest[os.write(self._writes, rest) :]
        except OSError as error:
            raise Ended from error

    def receive(self) -> Any:
        [length] = struct.unpack("!I", self._read(4))
        if length > _LONGEST_MESSAGE:
            raise Ended
        try:
            return json.loads(self._read(length))
        except (ValueError, RecursionError) as error:
            raise Ended from error

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self._reads, min(count, 1 << 20))
            if not part:
                raise Ended
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


# The candidate


class _Objects:
    """Table of the sample's objects that the tests hold and that cannot be sent as data."""

    def __init__(self, module: types.ModuleType) -> None:
        self._objects: list[Any] = [module]

    def keep(self, value: Any) -> int:
        self._objects.append(value)
        return len(self._objects) - 1

    def find(self, number: int) -> Any:
        return self._objects[number]

    def do(self, request: dict[str, Any]) -> Any:
        target = self.find(request["object"])
        match request["do"]:
            case "call":
                args = [decode(arg, self.find) for arg in request["args"]]
                named = {key: decode(arg, self.find) for key, arg in request["named"].items()}
                return encode(target(*args, **named), self.keep)
            case "get":
                return encode(getattr(target, request["name"]), self.keep)
            case "set":
                return setattr(target, request["name"], decode(request["value"], self.find))
            case "bool":
                return bool(target)
            case "list":
                return encode(list(islice(target, _MOST_ITEMS)), self.keep)


def candidate(channel: Channel) -> None:
    """Run the code in the first message, then execute the requests in the following messages."""
    module = types.ModuleType("sample")
    sys.modules["sample"] = module  # dataclasses look up the module there
    objects = _Objects(module)
    random.seed(0)
    code = channel.receive()
    channel.send(_run(lambda: exec(compile(code, "sample.py", "exec"), module.__dict__)))
    while True:
        request = channel.receive()
        channel.send(_run(lambda request=request: objects.do(request)))


def _run(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": work()}
    except Ended:
        raise
    except BaseException as error:
        return {"error": type(error).__name__}


# The checker


class _Remote:
    """Proxy of an object of the sample, which the tests use."""

    __slots__ = ("_number", "_send_request")

    def __init__(self, request: Callable[[dict[str, Any]], Any], number: int) -> None:
        object.__setattr__(self, "_send_request", request)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **named: Any) -> Any:
        coded = [encode(arg, _object_number) for arg in args]
        coded_named = {key: encode(arg, _object_number) for key, arg in named.items()}
        return self._send_request(
            {"do": "call", "object": self._number, "args": coded, "named": coded_named}
        )

    def __getattr__(self, name: str) -> Any:
        return self._send_request({"do": "get", "object": self._number, "name": name})

    def __setattr__(self, name: str, value: Any) -> None:
        coded = encode(value, _object_number)
        self._send_request({"do": "set", "object": self._number, "name": name, "value": coded})

    def __bool__(self) -> bool:
        return self._send_request({"do": "bool", "object": self._number}) is True

    def __iter__(self) -> Any:
        return iter(self._send_request({"do": "list", "object": self._number}))


def _object_number(value: Any) -> int:
    if type(value) is not _Remote:
        raise TypeError(f"a test passes an object of type {type(value).__name__} to the sample")
    return value._number


def check(channel: Channel, spec: dict[str, Any]) -> str:
    """Run a task's tests.

    Args:
        spec: `code` (the sample's code), `setup` (code that this process runs before the tests),
            `names` (the sample's functions and classes that the tests use) and `tests`.
    Returns:
        Empty if the tests pass. `ended` if the sample's process has ended. Otherwise the name of
        the exception that stopped the tests.
    """

    def send(request: Any) -> Any:
        channel.send(request)
        return read(channel.receive())

    def read(reply: Any) -> Any:
        if not isinstance(reply, dict):
            raise Ended
        if "error" in reply:
            kind = getattr(builtins, str(reply["error"]), None)
            # SystemExit is excluded: a sample must not end the tests.
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise RuntimeError("the sample raised an exception that is not a built-in one")
            raise kind
        return decode(reply.get("value"), lambda number: _Remote(send, number))

    names: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(spec["setup"], "setup.py", "exec"), names)
        send(spec["code"])
        module = _Remote(send, _MODULE)
        names |= {name: getattr(module, name) for name in spec["names"]}
        exec(compile(spec["tests"], "tests.py", "exec"), names)
    except Ended:
        return "ended"
    except BaseException as error:
        return type(error).__name__
    return ""


def main() -> None:
    """Run a role (candidate or checker) with settings (JSON), both given as arguments.

    evaluation/sandbox.py starts the processes.
    """
    role, settings = sys.argv[1], json.loads(sys.argv[2])
    sys.set_int_max_str_digits(0)
    spec = json.load(sys.stdin.buffer) if role == "checker" else {}
    verdict = os.dup(1)
    channel = Channel(*settings["pipes"]) if role == "checker" else Channel(os.dup(0), verdict)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    problem = confine(
        settings["folder"],
        settings["limits"],
        isolate=settings["isolate"],
        parent=settings["parent"],
    )
    if role == "candidate":
        channel.send(problem)
        return candidate(channel)
    # The candidate's first message is trusted, because it has not run any code yet.
    try:
        problem = channel.receive() or problem
        failure = check(channel, spec)
    except Ended:
        failure = "ended"
    os.write(verdict, json.dumps({"failure": failure, "not_isolated": problem}).encode())
    return None


if __name__ == "__main__":
    main()
