"""Tests of the sandbox for code: verdicts, and malicious samples."""

import ast
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from aropd_mcore.evaluation.sandbox import Limits, Outcome, Program, run_tests

pytestmark = pytest.mark.slow

LIMITS = Limits(cpu=1, wall=5.0, memory=1 << 30, disk=1 << 20)
RIGHT = "def double(x): return x * 2\n"
TESTS = """
assert double(2) == 4
assert double("ab") == "abab"
assert double([1, (2, None)]) == [1, (2, None)] * 2
"""
WRONG = {
    "wrong": ("def double(x): return x + 3", "AssertionError"),
    "raises": ("def double(x): return x / 0", "ZeroDivisionError"),
    "absent": ("def triple(x): return x * 3", "AttributeError"),
    "invalid Python": ("def double(x) return x * 2", "SyntaxError"),
}


def run(code: str, tests: str = TESTS, isolate: bool = True) -> Outcome:
    return run_tests(Program(code, ["double"], tests), LIMITS, isolate=isolate)


@pytest.fixture(scope="module")
def isolated() -> None:
    outcome = run(RIGHT)
    assert outcome.failure == ""
    if outcome.not_isolated:
        pytest.skip(f"this kernel allows no namespaces: {outcome.not_isolated}")


@pytest.mark.parametrize("isolate", [True, False])
def test_run_tests_returns_the_verdict_of_the_tests(isolate):
    assert run(RIGHT, isolate=isolate).failure == ""
    for code, failure in WRONG.values():
        assert run(code, isolate=isolate).failure == failure


def test_values_sent_both_ways_are_unchanged():
    values = "1.5, -0.0, 10**5000, 2 + 3j, b'a\\xff', 'ü\\ud800', None, True, (), {1}, frozenset()"
    nested = "{(1, 'a'): [{2: {3.0}}], 'b': float('inf')}"
    tests = f"for value in [{values}, {nested}]:\n    same = double(value)\n"
    tests += "    assert type(same) is type(value) and repr(same) == repr(value)\n"
    tests += "assert double(float('nan')) != double(0)\n"
    assert run("def double(x): return x", tests).failure == ""
    # Other objects stay in the sample's process. Tests can pass, read, write and iterate them.
    code = "class Pair:\n  def __init__(self, a): self.a = a\n"
    code += "def total(pairs): return sum(pair.a for pair in pairs)\n"
    code += "def upto(n): yield from range(n)\n"
    tests = "pair = Pair(3)\npair.a += 1\nassert pair.a == 4 and total([pair, Pair(5)]) == 9\n"
    tests += "assert list(upto(3)) == [0, 1, 2] and upto(3)"
    program = Program(code, ["Pair", "total", "upto"], tests)
    assert run_tests(program, LIMITS).failure == ""
    # A value of a subclass arrives as a value of its base class.
    code = "import collections, types\nclass No:\n  def __bool__(self): return False\n"
    code += "class Flat(list): pass\nPoint = collections.namedtuple('Point', 'x y')\n"
    code += "def odd(n): return [No(), Flat([1]), Point(1, 2), collections.Counter('aab')][n]\n"
    tests = "assert not odd(0) and odd(1) == [1] and odd(2) == (1, 2) and type(odd(2)) is tuple\n"
    tests += "assert odd(3) == {'a': 2, 'b': 1} and type(odd(3)) is dict and type(odd(1)) is list"
    assert run_tests(Program(code, ["odd"], tests), LIMITS).failure == ""
    # A helper of the task runs in the checker, even if the sample defines the same name.
    code = "def double(x): return 0\ndef helper(x): return 0"
    program = Program(code, ["double"], "assert double(1) == helper(1)", setup="helper = abs")
    assert run_tests(program, LIMITS).failure == "AssertionError"


IMPORTS = """
import array, collections, datetime, decimal, fractions, pathlib, types, uuid
import numpy as np
"""
VALUES = """
np.int64(3); np.uint8(3); np.float64(0.5); np.float32(0.1); np.bool_(True); np.bool_(False)
np.str_('a'); np.bytes_(b'a'); np.complex128(1j); np.float64('nan'); np.datetime64('2024-02-29')
np.array([1, 2]); np.array([3]); np.array(3); np.array([[1, 2], [3, 4]]); np.array([])
np.array([True]); np.array([[1], [2, 3]], dtype=object); np.array(['a', 'bc']); np.arange(3)[::-1]
[np.int64(1), np.int64(2)]; (np.float64(1.0), 2); {np.int64(1): np.bool_(True)}; {np.int64(3)}
fractions.Fraction(3); fractions.Fraction(1, 2); [fractions.Fraction(1), fractions.Fraction(2)]
decimal.Decimal('0.5'); decimal.Decimal('3.00'); decimal.Decimal('NaN'); {decimal.Decimal(3)}
datetime.date(2024, 2, 29); datetime.datetime(2024, 2, 29, 1); datetime.time(1, 2)
datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc); datetime.timedelta(hours=1)
range(3); range(0); range(1, 7, 2); slice(1, 2); {1: 2}.keys(); {1: 2}.items(); {1: 2}.values()
collections.OrderedDict([(1, 2), (3, 4)]); collections.OrderedDict([(3, 4), (1, 2)])
collections.Counter('aab'); collections.defaultdict(int, {1: 2}); {'a': 2, 'b': 1}; {1: 2}
collections.deque([1, 2]); collections.deque([1, 2], 2); collections.namedtuple('P', 'x y')(1, 2)
types.MappingProxyType({1: 2}); array.array('i', [1, 2]); bytearray(b'a'); memoryview(b'a'); b'a'
uuid.UUID(int=5); pathlib.Path('a'); pathlib.PurePosixPath('a'); 1j; 3; 3.0; 0.5; 0.1; True; 'a'
[1, 2]; (1, 2); {1, 2}; [0, 1, 2]; [2, 1, 0]; [3]; []; (); None; [True]; ['a', 'bc']; {1}; {3}
"""


def test_results_compare_with_expected_values_as_in_one_process():
    """The published harnesses run the sample and its tests in one process."""
    values = [value.strip() for line in VALUES.split("\n") for value in line.split(";") if value]
    compare = f"""{IMPORTS}
expected = [{", ".join(values)}]
def compared(result, value):
    try:
        return bool(result == value)
    except Exception as error:
        return type(error).__name__
"""
    here: dict[str, Any] = {}
    exec(compare, here)
    results = eval(f"[{', '.join(values)}]", here)
    table = [[here["compared"](a, b) for b in here["expected"]] for a in results]
    # Skip the mapping proxy: it is not sent as data and stays an object of the sample.
    proxy = values.index("types.MappingProxyType({1: 2})")
    rows = [i for i in range(len(values)) if i != proxy]
    code = f"{IMPORTS}\ndef double(i): return [{', '.join(values)}][i]"
    tests = f"{compare}\ntable = {table}\nwrong = [(i, j) for i in {rows}\n"
    tests += "  for j, value in enumerate(expected) if compared(double(i), value) != table[i][j]]\n"
    tests += "if wrong: raise type(str(wrong), (Exception,), {})"
    outcome = run_tests(Program(code, ["double"], tests), Limits(cpu=20))
    pairs = [(values[i], values[j]) for i, j in ast.literal_eval(outcome.failure or "[]")]
    assert not pairs


def test_library_values_passed_to_the_sample_keep_their_types():
    tests = f"{IMPORTS}\nfor value in [np.float64(0.5), np.array([1, 2]), fractions.Fraction(1, 2),"
    tests += " datetime.date(2024, 2, 29), collections.deque([1], 1), range(3)]:\n"
    tests += "    same = double(value)\n    assert type(same) is type(value)\n"
    tests += "    assert str(same) == str(value)"
    assert run("def double(x): return x", tests).failure == ""


FORGERIES = {
    "exits with 0": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits when called": "import os\ndef double(x): os._exit(0)",
    "equal to everything": """
class Equal(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
    __ne__ = lambda self, other: False
def double(x): return Equal()""",
    "equal to everything, not a number": """
class Equal:
    def __eq__(self, other): return True
def double(x): return Equal()""",
    "a fraction equal to everything": """
import fractions
class Fraction(fractions.Fraction):
    __module__ = 'fractions'
    def __eq__(self, other): return True
def double(x): return Fraction(1, 3)""",
    "an array equal to everything": """
import numpy as np
class ndarray(np.ndarray):
    __module__ = 'numpy'
    def __eq__(self, other): return True
np.ndarray = ndarray
def double(x): return np.zeros(1).view(ndarray)""",
    "patches numpy and fractions": """
import fractions, numpy as np
fractions.Fraction.__eq__ = lambda self, other: True
np.equal = lambda *a: True
def double(x): return fractions.Fraction(1, 3)""",
    "names a type that would run code": """
import sys
code = '''
import os
for fd in range(64):
    try: os.write(fd, b'{"failure": "", "not_isolated": ""}')
    except OSError: pass
os._exit(0)'''
main = sys.modules['__main__']
main.encode = lambda *a: {'value': ['builtins.exec', [code]]}
def double(x): return None""",
    "names a dtype that would run code": """
import sys
main = sys.modules['__main__']
main.encode = lambda *a: {'numpy': ['V8', None, '00' * 8]}
def double(x): return None""",
    "patches the interpreter": """
import builtins, json, sys
main = sys.modules['__main__']
for name in ('check', '_run', 'encode'):
    setattr(main, name, lambda *a, **k: '')
json.dumps = lambda *a, **k: '{"failure": "", "not_isolated": ""}'
builtins.AssertionError = Exception
def double(x): return None""",
    "writes a verdict to every descriptor": """
import os
for fd in range(64):
    for text in (b'{"failure": "", "not_isolated": ""}', bytes(3) + b'\\x04true' * 9):
        try: os.write(fd, text)
        except OSError: pass
def double(x): return None""",
    "raises SystemExit": "def double(x): raise SystemExit(0)",
    "searches for the tests": """
import gc, os, sys
def double(x):
    frame, found = sys._getframe(), ''
    while frame:
        found += repr(frame.f_locals) + repr(frame.f_globals)
        frame = frame.f_back
    found += repr([o for o in gc.get_objects() if isinstance(o, (str, bytes, dict))])
    found += repr(sys.argv)
    return x * 2 if 'assert double(' + '2)' in found else None""",
    "kills other processes": """
import os, signal
for pid in (-1, os.getppid()):
    try: os.kill(pid, signal.SIGTERM)
    except OSError: pass
def double(x): return None""",
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_run_tests_of_a_forgery_fails(code):
    assert run(code).failure


HOGS = {
    "loops": ("while True: pass", "time"),
    "loops when called": ("def double(x):\n  while True: pass", "time"),
    "sleeps": ("import time\ntime.sleep(1000)", "time"),
    "ignores its time limit": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "time",
    ),
    "prints forever": ("while True: print('x' * 10**6)", "time"),
    "sends messages forever": ("import os\nwhile True:\n  for fd in range(64):\n"
                         "    try: os.write(fd, bytes([0, 0, 0, 1, 48]) * 999)\n"
                         "    except OSError: pass", None),
    "fills the memory": ("hog = []\nwhile True: hog.append(bytearray(10**7))", "MemoryError"),
    "fills the disk": ("import os\nwith open('hog', 'wb') as file:\n"
                       "  while True: file.write(bytes(10**5))", None),
    "returns too much": ("def double(x): return ['x' * 10**6] * 100", None),
    "fork bomb": ("import os\nwhile True: os.fork()", "BlockingIOError"),
    "quiet fork bomb": ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "time"),
    "threads": ("import _thread\nwhile True: _thread.start_new_thread(int, ())", "RuntimeError"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("isolate", [True, False])
def test_run_tests_of_a_hog_stops_it_and_leaves_no_process(isolate):
    """All hogs run at the same time, each in its own sandbox, and do not affect each other."""
    failures: dict[str, str] = {}

    def work(name: str, code: str) -> None:
        failures[name] = run(code, isolate=isolate).failure

    threads = [threading.Thread(target=work, args=(n, code)) for n, (code, _) in HOGS.items()]
    for thread in threads:
        thread.start()
    assert run(RIGHT, isolate=isolate).failure in (
        "",
        "time",
    )  # while the hogs keep the machine busy
    for thread in threads:
        thread.join()
    for name, (_, failure) in HOGS.items():
        assert failures[name], name
        assert failure is None or failures[name] in (failure, "time"), name
    until = time.monotonic() + 10  # the kernel needs time to end the processes
    while running_sandboxes() and time.monotonic() < until:
        time.sleep(0.05)
    assert not running_sandboxes()


def running_sandboxes() -> list[str]:
    """Return the command lines of sandboxes of these tests that are still running."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
            state = path.with_name("stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        is_ours = "sandbox_child.py" in command and f'"disk": {LIMITS.disk}' in command
        if is_ours and state not in "ZX":
            lines.append(command)
    return lines


def test_isolated_sample_has_no_environment_and_no_files_of_the_user(
    isolated, tmp_path, monkeypatch
):
    monkeypatch.setenv("A_SECRET", "hunter2")
    tmp_path.chmod(0o777)
    note = tmp_path / "note"
    note.write_text("hunter2")
    note.chmod(0o666)
    code = f"""
import os, glob
seen = [dict(os.environ)]
for path in ['/proc/self/environ', '/proc/1/environ', {str(note)!r}, *glob.glob('/proc/*/environ')]:
    try: seen.append(open(path, 'rb').read())
    except OSError: pass
for path in ['/usr/aropd', '/lib/aropd', '/aropd', {str(tmp_path / "other")!r}, {str(note)!r}]:
    try: open(path, 'w').write('was here'); seen.append(path)
    except OSError: pass
open('own', 'w').write('allowed')
for work in (lambda: os.setuid(0), lambda: os.chroot('/tmp'), lambda: os.mkfifo('/usr/fifo')):
    try: work(); seen.append('allowed')
    except OSError: pass
def double(x): return repr(seen) + open('own').read()"""
    tests = "seen = double(0)\nassert seen.endswith('allowed') and 'hunter2' not in seen\n"
    tests += "assert seen.count('allowed') == 1 and '/' not in seen, seen"
    assert run(code, tests).failure == ""
    assert note.read_text() == "hunter2" and [note] == list(tmp_path.iterdir())


def test_isolated_sample_has_no_network(isolated):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
import socket
def double(x):
    socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)
    return x * 2"""
        assert run(code).failure == "OSError"
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_run_tests_removes_the_folders_of_its_sandbox(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    code = f"import os\nos.makedirs('a/b')\nopen('a/c', 'w').close()\nos.chmod('a', 0)\n{RIGHT}"
    for isolate in (True, False):
        assert run(code, isolate=isolate).failure == ""
        assert not list(tmp_path.iterdir())
