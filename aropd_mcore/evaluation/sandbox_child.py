"""The two processes of a sandbox; run as a program, with the standard library alone.

numpy is imported only where a sample or a test has made one of its values.

    candidate   runs the sample's code, and answers calls of its functions
    checker     runs the task's tests, which call those functions through a pipe

The sample shares no interpreter with the tests. What comes back from it is data, of which the
checker builds values of plain types, of the standard library's value types and of numpy's; it
compares them as one process would, and tells the parent. A sample can end, hang or patch its own
process only.
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
"""The object that stands for the sample's module."""

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
    """The other process is gone, or says what cannot be read. No test can catch it by mistake."""


# Confinement


def confine(folder: str, limits: dict[str, int], *, isolate: bool, parent: int) -> str:
    """Give up everything that a sample does not need; goes on in a child of this process.

    Args:
        folder: empty, and this process's alone.
        isolate: into namespaces of its own: no network, no processes and no files but the
            interpreter's and the system's libraries, read-only, and an empty memory disk.
        parent: process id of the grader. The kernel kills this process when the grader ends.
    Returns:
        Nothing, or why the process is not isolated.
    """
    is_root, problem = os.geteuid() == 0, ""

    def parent_is_gone() -> bool:
        return os.getppid() != parent

    try:
        if not isolate:
            raise OSError("not asked for")
        _leave_namespaces(is_root)
        _end_with_parent(parent_is_gone)
        parent_is_gone = _in_a_child()
        _new_root(folder, limits["disk"])
    except (OSError, AttributeError) as error:  # AttributeError: a system without the call
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
    if is_root:  # whom the limit on processes does not bind
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    _check(_libc.capset(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), bytes(24)))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    # Nobody with the same user id may trace it, or read its memory.
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    _end_with_parent(parent_is_gone)  # a fork and a change of the user clear the setting
    return problem


def _end_with_parent(is_gone: Callable[[], bool]) -> None:
    """Have the kernel kill this process when its parent ends; end now if the parent is gone."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if is_gone():
        os._exit(1)


def _leave_namespaces(is_root: bool) -> None:
    flags = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    ids = {"uid": os.geteuid(), "gid": os.getegid()}
    _check(_libc.unshare(flags if is_root else flags | _CLONE_NEWUSER))
    if not is_root:
        with open("/proc/self/setgroups", "w") as file:
            file.write("deny")
        for kind, id in ids.items():
            with open(f"/proc/self/{kind}_map", "w") as file:
                file.write(f"{id} {id} 1")


def _in_a_child() -> Callable[[], bool]:
    """Go on in the first process of the new process namespace; with it ends whatever is in there.

    Returns:
        Whether the process before it is gone; to be called once.
    """
    before = os.pidfd_open(os.getpid())
    child = os.fork()
    if child:
        os.closerange(0, 1 << 20)  # the pipes' ends are the child's alone
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)

    def is_gone() -> bool:  # getppid() is 0 here: the parent is outside of the namespace
        gone = bool(select.select([before], [], [], 0)[0])
        os.close(before)
        return gone

    return is_gone


def _new_root(folder: str, size: int) -> None:
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=755,size={size}")
    shown: list[str] = []
    # A path inside another one comes with it.
    for path in sorted({"/usr", "/lib", "/lib64", "/dev/null", sys.prefix, sys.base_prefix}):
        if os.path.exists(path) and not any(path.startswith(f"{other}/") for other in shown):
            shown.append(path)
            _show(path, folder + path)
    os.makedirs(f"{folder}/tmp", exist_ok=True)
    os.chmod(f"{folder}/tmp", 0o777)
    os.chroot(folder)
    os.chdir("/tmp")


def _show(path: str, target: str) -> None:
    """`path` at `target`, for reading."""
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


# Data between the two


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
"""Value types of the standard library -> the arguments that make an equal value."""
_VIEWS: dict[str, Callable[[list[Any]], Any]] = {
    "dict_items": lambda items: dict(items).items(),
    "dict_keys": lambda items: dict.fromkeys(items).keys(),
    "dict_values": lambda items: dict(enumerate(items)).values(),
}
_ARRAY_KINDS = "biufcSUmM"
"""numpy's booleans, numbers, strings and dates, whose bytes are the value."""


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """Encode a value for JSON, so that the decoded one compares as the value itself would.

    numpy's scalars and arrays and the standard library's value types keep their type. A subclass's
    value becomes its base class's, without methods such as `__eq__` that a sample may have written.
    Any other object becomes its number.

    Args:
        keep: returns the number of an object.
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
    """A scalar or array as dtype, shape (None of a scalar) and bytes or items; None of the rest."""
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
    """Return the value that `encode` was given; builds only types that `encode` knows.

    Args:
        find: returns the object of a number.
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
        for i, item in enumerate(content):  # a slice would take a list for a row
            array[i] = decode(item, find)
    elif dtype.strip("<>=|")[0] in _ARRAY_KINDS:
        array = numpy.frombuffer(bytearray.fromhex(content), dtype)
    else:
        raise TypeError(dtype)
    return array[0] if shape is None else array.reshape(shape)


class Channel:
    """Messages with the other process: four bytes of length, and JSON."""

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
    """What a sample has given out that is no data."""

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
    """Run the code that the first message holds, and then what the others ask for."""
    module = types.ModuleType("sample")
    sys.modules["sample"] = module  # dataclasses look there
    objects = _Objects(module)
    random.seed(0)
    code = channel.receive()
    channel.send(_answer(lambda: exec(compile(code, "sample.py", "exec"), module.__dict__)))
    while True:
        request = channel.receive()
        channel.send(_answer(lambda request=request: objects.do(request)))


def _answer(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": work()}
    except Ended:
        raise
    except BaseException as error:
        return {"error": type(error).__name__}


# The checker


class _Remote:
    """An object of the sample, as the tests see it."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Callable[[dict[str, Any]], Any], number: int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **named: Any) -> Any:
        coded = [encode(arg, _number_of) for arg in args]
        coded_named = {key: encode(arg, _number_of) for key, arg in named.items()}
        return self._ask(
            {"do": "call", "object": self._number, "args": coded, "named": coded_named}
        )

    def __getattr__(self, name: str) -> Any:
        return self._ask({"do": "get", "object": self._number, "name": name})

    def __setattr__(self, name: str, value: Any) -> None:
        coded = encode(value, _number_of)
        self._ask({"do": "set", "object": self._number, "name": name, "value": coded})

    def __bool__(self) -> bool:
        return self._ask({"do": "bool", "object": self._number}) is True

    def __iter__(self) -> Any:
        return iter(self._ask({"do": "list", "object": self._number}))


def _number_of(value: Any) -> int:
    if type(value) is not _Remote:
        raise TypeError(f"a test hands {type(value).__name__} to the sample")
    return value._number


def check(channel: Channel, spec: dict[str, Any]) -> str:
    """Run a task's tests; nothing where they pass, or what stopped them.

    Args:
        job: code: the sample's; setup: run before the tests, here; names: of the sample's that the
            tests know; tests.
    """

    def ask(request: Any) -> Any:
        channel.send(request)
        return value_of(channel.receive())

    def value_of(answer: Any) -> Any:
        if not isinstance(answer, dict):
            raise Ended
        if "error" in answer:
            kind = getattr(builtins, str(answer["error"]), None)
            # No SystemExit: it is not the sample that ends the tests.
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise RuntimeError("an error of the sample's own")
            raise kind
        return decode(answer.get("value"), lambda number: _Remote(ask, number))

    names: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(spec["setup"], "setup.py", "exec"), names)
        ask(spec["code"])
        module = _Remote(ask, _MODULE)
        names |= {name: getattr(module, name) for name in spec["names"]}
        exec(compile(spec["tests"], "tests.py", "exec"), names)
    except Ended:
        return "ended"
    except BaseException as error:
        return type(error).__name__
    return ""


def main() -> None:
    """`role settings`, as evaluation/sandbox.py starts it."""
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
    # What the candidate says before it has seen any code can be believed.
    try:
        problem = channel.receive() or problem
        failure = check(channel, spec)
    except Ended:
        failure = "ended"
    os.write(verdict, json.dumps({"failure": failure, "not_isolated": problem}).encode())
    return None


if __name__ == "__main__":
    main()
