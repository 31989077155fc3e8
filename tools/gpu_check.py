"""Check on one GPU what CPU ranks cannot show: tests, speed, memory and resumed runs.

    python tools/gpu_check.py                     # all parts that have no result yet
    python tools/gpu_check.py --list
    python tools/gpu_check.py --parts loss memory --again loss
    python tools/gpu_check.py --dry-run           # tiny shapes, also without a GPU
    python tools/gpu_check.py --constants         # measured values for plan/constants.yaml

Every part is a process of its own with a time budget. Its result is written when it ends, so that
an interrupted check continues. A part that fails or takes too long is recorded, and the next one
runs. Results of other code, another machine or other packages are measured again.

OUT/gpu_check.json has all results, and OUT/gpu_check.md is a section for docs/benchmarks.md. Logs
are in OUT/logs. The exit code is 0 if all parts ended, no test failed and every goal is met.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_checks.parts import PARTS, REPO, Part
from gpu_checks.report import render_constants, report_path, write_report

from aropd_mcore import lifetime
from aropd_mcore.data.prepare import write_atomically

PACKAGES = ("torch", "triton", "transformer_engine", "megatron-core", "flash-attn", "liger-kernel")
_LEAST_SECONDS = 5.0
"""A part is not started in less remaining time."""
DRY_FACTOR = 10.0
"""Factor of the budgets and of --minutes in a dry run, whose machine may be slow or busy."""


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    args = parse(argv, parts)
    if args.list:
        for part in parts:
            print(f"{part.name:20}at most {part.seconds:4.0f} s")
        return 0
    if args.constants:
        print(render_constants(json.loads(report_path(args.out, dry=args.dry_run).read_text())))
        return 0
    chosen = [part for part in parts if not args.parts or part.name in args.parts]
    factor = DRY_FACTOR if args.dry_run else 1.0
    until = time.monotonic() + factor * 60 * args.minutes
    context = describe(dry=args.dry_run)
    (args.out / "parts").mkdir(parents=True, exist_ok=True)
    for part in chosen:
        path = _record_path(args.out, part, dry=args.dry_run)
        before = _read_record(path, context)
        if before and part.name not in args.again:
            print(f"{part.name:20}{before['status']} before", flush=True)
            continue
        left = until - time.monotonic()
        if left < _LEAST_SECONDS:
            print(f"{part.name:20}not run: no time is left; run the command again", flush=True)
            continue
        record = run_part(part, args.out, min(factor * part.seconds, left), dry=args.dry_run)
        write_atomically(path, [json.dumps(record | {"context": context}, indent=2)])
        print(f"{part.name:20}{_summary(record)}", flush=True)
        _report(args.out, parts, context)
    return 0 if _report(args.out, parts, context, chosen) else 1


def parse(argv: Sequence[str] | None, parts: Sequence[Part]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in parts]
    parser.add_argument(
        "--out",
        type=Path,
        default=REPO / "build" / "gpu_check",
        help="folder of the results (default: build/gpu_check)",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=names, metavar="PART", help="parts to run (default: all)"
    )
    parser.add_argument(
        "--again",
        nargs="+",
        choices=names,
        default=[],
        metavar="PART",
        help="parts to run although they have a result",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="time of all parts together (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run every part with tiny shapes, without a GPU"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and their budgets")
    parser.add_argument(
        "--constants", action="store_true", help="print the constants of the last check as YAML"
    )
    args = parser.parse_args(argv)
    if args.constants and not report_path(args.out, dry=args.dry_run).exists():
        parser.error(f"--constants: {args.out} has no results, run the check first")
    if args.parts:
        args.parts += [name for name in args.again if name not in args.parts]
    reads_only = args.list or args.constants
    if not args.dry_run and not reads_only and not _gpu_name():
        parser.error("no GPU was found, expected one; add --dry-run to try the parts without a GPU")
    return args


def run_part(part: Part, out: Path, seconds: float, *, dry: bool) -> dict[str, Any]:
    """Run a part for at most `seconds`. Return its record, also if it fails."""
    folder, logs = out / "work" / part.name, out / "logs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    logs.mkdir(exist_ok=True)
    log = logs / f"{part.name}{'.dry' if dry else ''}.log"
    command = part.command(folder, dry)
    started = time.monotonic()
    with log.open("wb") as file:
        process = lifetime.start(
            command,
            cwd=REPO,
            env=_environment(dry=dry),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # also ends what the command has left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    record: dict[str, Any] = {
        "name": part.name,
        "status": "done",
        "reason": "",
        "seconds": round(time.monotonic() - started, 1),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command).replace(f"{REPO}/", ""),
        "checks": [],
    }
    if code is None:
        return record | {"status": "over time", "reason": f"stopped after {seconds:.0f} s"}
    if code != 0 and not part.may_fail:
        return record | {"status": "failed", "reason": f"exit code {code}: {_last_line(log)}"}
    try:
        record["checks"] = [asdict(check) for check in part.read(folder)]
    except Exception as error:  # unexpected figures must not end the check
        reason = f"exit code {code}, {type(error).__name__}: {error}"
        return record | {"status": "failed", "reason": reason}
    shutil.rmtree(folder)
    return record


def describe(*, dry: bool) -> dict[str, Any]:
    """Describe code, machine and packages. Results with another description are not reused."""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    digest = hashlib.sha256()
    for folder in ("aropd_mcore", "tools", "tests"):
        for path in sorted((REPO / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return {
        "dry": dry,
        "code": digest.hexdigest()[:16],
        "commit": _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "machine": {
            "gpu": None if dry else _gpu_name(),
            "driver": None if dry else _smi("driver_version"),
            "cpu": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": versions,
    }


def _report(
    out: Path, parts: Sequence[Part], context: dict[str, Any], chosen: Sequence[Part] = ()
) -> bool:
    """Write all results. Return whether every chosen part has a good one."""
    records = {}
    for part in parts:
        record = _read_record(_record_path(out, part, dry=context["dry"]), context)
        missing = {"name": part.name, "status": "not run", "reason": "no result yet"}
        records[part.name] = record or {**missing, "seconds": 0.0, "checks": []}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = shlex.join(["python", "tools/gpu_check.py", *(["--dry-run"] * context["dry"])])
    heading = {"date": date, "command": command}
    write_report(out, context | heading | {"parts": list(records.values())})
    return all(_is_good(records[part.name], dry=context["dry"]) for part in chosen)


def _is_good(record: dict[str, Any], *, dry: bool) -> bool:
    bad = {"failed"} if dry else {"failed", "not met"}  # a dry run measures nothing
    verdicts = {check["verdict"] for check in record["checks"]}
    return record["status"] == "done" and not verdicts & bad


def _record_path(out: Path, part: Part, *, dry: bool) -> Path:
    return out / "parts" / f"{part.name}{'.dry' if dry else ''}.json"


def _read_record(path: Path, context: dict[str, Any]) -> dict[str, Any] | None:
    """Read a part's result; None without one, or if it is of other code or another machine."""
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record.pop("context") == context else None


def _summary(record: dict[str, Any]) -> str:
    verdicts = [check["verdict"] for check in record["checks"]]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    return f"{record['status']} in {record['seconds']:.0f} s: {record['reason'] or counts}"


def _environment(*, dry: bool) -> dict[str, str]:
    paths = [str(REPO), os.environ.get("PYTHONPATH", "")]
    added = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if dry:
        added |= {"CUDA_VISIBLE_DEVICES": "", "AROPD_DRY_GPU_TESTS": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | added


def _gpu_name() -> str | None:
    return _smi("name")


def _smi(field: str) -> str | None:
    lines = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"


if __name__ == "__main__":
    raise SystemExit(main())
