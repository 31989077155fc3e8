"""tools/gpu_check.py: parts that succeed, fail and hang, and a dry run of all parts."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPO


@pytest.fixture
def tool(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import gpu_check  # type: ignore[reportMissingImports]

    monkeypatch.setattr(gpu_check, "DRY_FACTOR", 1.0)
    return gpu_check


def build_parts(tool: ModuleType, counts: Path) -> list:
    """Return parts that note each of their runs in a file of `counts`."""
    from gpu_checks.parts import Part, bound  # type: ignore[reportMissingImports]

    def part(name: str, code: str, seconds: float = 60) -> Part:
        def command(folder: Path, _is_dry: bool) -> list[str]:
            note = f"open({str(counts / name)!r}, 'a').write('x')"
            return [sys.executable, "-c", f"folder = {str(folder)!r}; {note}; {code}"]

        def read(folder: Path) -> Iterator:
            yield bound("ratio", float((folder / "value").read_text()), 2.0)

        return Part(name, seconds, command, read)

    value = "open(folder + '/value', 'w').write('{}')"
    return [
        part("good", value.format(1.5)),
        part("poor", value.format(2.5)),
        part("broken", "raise SystemExit('no such kernel')"),
        part("hung", "import time; time.sleep(600)", seconds=10),
        part("strange", "pass"),
        part("last", value.format(1)),
    ]


def test_each_part_is_recorded_and_only_missing_parts_run_again(tool, tmp_path, capsys):
    parts = build_parts(tool, tmp_path)
    words = ["--dry-run", "--out", str(tmp_path / "out")]
    path = tmp_path / "out" / "gpu_check.dry.json"
    assert tool.main([*words, "--parts", "good", "hung"], parts) == 1
    records = {part["name"]: part for part in json.loads(path.read_text())["parts"]}
    assert records["good"]["status"] == "done" and records["last"]["status"] == "not run"

    assert tool.main(words, parts) == 1
    results = json.loads(path.read_text())
    records = {part["name"]: part for part in results["parts"]}
    statuses = [(part["name"], part["status"]) for part in results["parts"]]
    assert statuses == [
        ("good", "done"),
        ("poor", "done"),
        ("broken", "failed"),
        ("hung", "over time"),
        ("strange", "failed"),
        ("last", "done"),
    ]
    assert records["broken"]["reason"] == "exit code 1: no such kernel"
    assert records["hung"]["reason"] == "stopped after 10 s"
    assert "FileNotFoundError" in records["strange"]["reason"]
    verdicts = [records[name]["checks"][0]["verdict"] for name in ("good", "poor")]
    assert verdicts == ["met", "not met"]
    assert all((tmp_path / part.name).read_text() == "x" for part in parts)

    capsys.readouterr()
    tool.main([*words, "--again", "broken"], parts)
    assert "good                done before" in capsys.readouterr().out
    assert [len((tmp_path / part.name).read_text()) for part in parts] == [1, 1, 2, 1, 1, 1]


def test_report_of_a_dry_run_cannot_be_taken_for_a_measurement(tool, tmp_path):
    parts = build_parts(tool, tmp_path)
    words = ["--dry-run", "--out", str(tmp_path / "out"), "--parts", "good", "broken"]
    tool.main(words, parts)
    text = (tmp_path / "out" / "gpu_check.dry.md").read_text()
    assert text.startswith("### DRY RUN, NOT A MEASUREMENT: ")
    assert "| good | ratio | 1.5 | ≤ 2 | dry: met |" in text
    assert "| broken | the part | – | – | dry: failed: exit code 1: no such kernel |" in text
    assert not (tmp_path / "out" / "gpu_check.json").exists()


def test_no_part_starts_without_time_and_other_code_is_measured_again(
    tool, tmp_path, monkeypatch, capsys
):
    parts = build_parts(tool, tmp_path)
    words = ["--dry-run", "--out", str(tmp_path / "out"), "--parts", "good"]
    assert tool.main([*words, "--minutes", "0"], parts) == 1
    assert "not run: no time is left" in capsys.readouterr().out
    assert tool.main(words, parts) == 0
    described = tool.describe(dry=True)
    monkeypatch.setattr(tool, "describe", lambda **_: described | {"code": "changed"})
    assert tool.main(words, parts) == 0
    assert (tmp_path / "good").read_text() == "xx"


def test_measured_constants_are_printed_for_the_plan(tool, tmp_path, monkeypatch, capsys):
    from gpu_checks.parts import Part, bound  # type: ignore[reportMissingImports]

    from aropd_mcore.plan.constants import constants

    def read(_folder: Path) -> Iterator:
        yield bound("launches", 0.5e-3, None, " ms", scale=1e3, constant="launch_seconds")

    parts = [Part("launches", 60, lambda *_: [sys.executable, "-c", ""], read)]
    monkeypatch.setattr(tool, "_gpu_name", lambda: "NVIDIA H200")
    words = ["--out", str(tmp_path)]
    assert tool.main(words, parts) == 0
    capsys.readouterr()
    assert tool.main([*words, "--constants"], parts) == 0
    entry = capsys.readouterr().out
    assert entry.startswith("launch_seconds:\n    value: 0.0005\n") and "NVIDIA H200" in entry
    # The names in the code of the parts are names of constants.
    source = (REPO / "tools" / "gpu_checks" / "parts.py").read_text()
    named = re.findall(r'constant="(\w+)"', source)
    assert named and set(named) < constants().keys()


def test_every_gpu_test_is_in_one_part(tool, tmp_path):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    chosen = []
    for part in tool.PARTS:
        words = part.command(tmp_path, False)
        if "pytest" in words:
            file = words[words.index("pytest") + 1].removeprefix(f"{REPO}/")
            names = words[words.index("-k") + 1].split(" or ") if "-k" in words else [""]
            of_file = [test for test in tests if test.startswith(f"{file}::")]
            chosen += [test for test in of_file if any(name in test for name in names)]
    assert tests and sorted(chosen) == sorted(tests)


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_dry_run_of_every_part_succeeds(tmp_path):
    """The commands, readers and reports of all parts, with tiny shapes."""
    command = [sys.executable, str(REPO / "tools" / "gpu_check.py"), "--dry-run"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu_check.dry.json").read_text())
    assert {part["status"] for part in results["parts"]} == {"done"}
    assert all(part["checks"] for part in results["parts"])
    # Parts that need no library of a GPU measure something.
    skipped = {
        part["name"]
        for part in results["parts"]
        if {check["verdict"] for check in part["checks"]} == {"skipped"}
    }
    needs_gpu = {"graphs", "fp8", "fp8_teacher", "fp8_rollouts", "precision", "kernels"}
    needs_gpu |= {"experts", "nccl", "colocated"}
    assert skipped == needs_gpu
