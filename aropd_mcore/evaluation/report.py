"""`aropd report`: runs' folders -> one HTML page that needs nothing else.

What a run's folder may hold, each part by itself:

    metrics.jsonl             curves, step time, drift by position
    config.yaml               the method
    eval/**/summary.json      of `aropd eval`: accuracy, also by length
    diagnose/*.json           of `aropd diagnose`: the reader, thresholds, reliability

The page is report_page/: Python puts style, scripts and the data, as JSON, into page.html. Whatever
comes from a run is shown as text: no script of the page makes HTML of it.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aropd_mcore import __version__
from aropd_mcore.config import Config
from aropd_mcore.config_file import load_config
from aropd_mcore.data.prepare import write_atomically
from aropd_mcore.evaluation.diagnose.summary import SCHEMA
from aropd_mcore.evaluation.figures import read_metrics
from aropd_mcore.numerics.position_metrics import METRICS

_PAGE = Path(__file__).with_name("report_page")
_SCRIPTS = ("labels.js", "chart.js", "sections.js", "reader.js", "page.js")
_MAX_POINTS = 1000
"""Of a curve; longer ones become means of neighbours."""


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page; `out`.

    Raises:
        ValueError: a folder holds nothing that can be shown, or what it holds cannot be read.
    """
    data = {
        "version": __version__,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "labels": {name: [metric.title, metric.unit] for name, metric in METRICS.items()},
        "runs": [{"name": name} | _run(run) for name, run in zip(_names(runs), runs, strict=True)],
    }
    write_atomically(out, [render(data)])
    return out


def render(data: Mapping[str, Any]) -> str:
    """The page with this data in it."""
    # JSON knows another way to write `<`: no text can end the element that it stands in.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    script = "\n".join((_PAGE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    parts = {
        "/*STYLE*/": (_PAGE / "style.css").read_text(encoding="utf-8"),
        "/*SCRIPT*/": f'"use strict";\n(() => {{\n{script}\n}})();',
        "/*DATA*/": text,
    }
    page = (_PAGE / "page.html").read_text(encoding="utf-8")
    for place, part in parts.items():  # the data last: it may hold the others' names
        before, _, after = page.partition(place)
        page = before + part + after
    return page


def _names(runs: Sequence[Path]) -> list[str]:
    """Folders' names where they differ, else their paths from where they part."""
    whole = [run.resolve() for run in runs]
    if len(set(whole)) < len(whole):
        raise ValueError(f"runs {', '.join(map(str, runs))}: expected each of them once")
    names = [path.name for path in whole]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(whole)
    return [os.path.relpath(path, common) for path in whole]


def _run(run: Path) -> dict[str, Any]:
    lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    found = {
        "num_steps": len(lines),
        **_columns(lines),
        "method": _method(run / "config.yaml"),
        "evaluations": list(_evaluations(run)),
        "diagnoses": list(_diagnoses(run)),
    }
    if not (lines or found["evaluations"] or found["diagnoses"]):
        raise ValueError(
            f"{run}: nothing to show; expected metrics.jsonl, diagnose/*.json or "
            "eval/**/summary.json, as a run's output_dir has"
        )
    return found


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each metric its values over the steps; null where there is none."""
    size = -(-len(lines) // _MAX_POINTS) or 1
    pieces = [lines[start : start + size] for start in range(0, len(lines), size)]
    names = sorted({name for line in lines for name in line} - {"step"})
    metrics = {
        name: [_mean([line.get(name) for line in piece]) for piece in pieces] for name in names
    }
    return {"steps": [piece[-1]["step"] for piece in pieces], "metrics": metrics}


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [value for value in values if isinstance(value, int | float)]
    return float(f"{sum(numbers) / len(numbers):.6g}") if numbers else None


def _method(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    config = load_config(path)
    objective, is_sft = config.objective, config.objective.name == "sft"
    return {
        "name": _method_name(config),
        "residual_scale": None if is_sft else objective.residual_scale,
        "residual_clip": None if is_sft else objective.residual_clip,
        "teacher": None if is_sft else config.teacher.kind,
    }


def _method_name(config: Config) -> str:
    """METHOD section 8."""
    objective = config.objective
    if objective.name == "sft":
        return "SFT"
    if objective.residual_scale == 0:
        return "Partial OPD"
    is_full = objective.residual_scale == 1 and objective.residual_clip is None
    return "Full OPD" if is_full else "AR-OPD"


def _evaluations(run: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((run / "eval").rglob("summary.json")):
        summary = _read(path)
        if not isinstance(summary.get("tasks"), dict):
            raise ValueError(f"{path}: expected the summary that `aropd eval` writes, with `tasks`")
        yield {"name": str(path.parent.relative_to(run / "eval")), "tasks": summary["tasks"]}


def _diagnoses(run: Path) -> Iterator[dict[str, Any]]:
    """By their steps, the last one last."""
    found = []
    for path in sorted((run / "diagnose").glob("*.json")):
        diagnosis = _read(path)
        if diagnosis.get("schema") != SCHEMA:
            raise ValueError(
                f"{path}: schema: found {diagnosis.get('schema')!r}, expected {SCHEMA!r}; "
                "run `aropd diagnose` again"
            )
        found.append({"name": path.stem} | diagnosis)
    yield from sorted(found, key=lambda one: one["model"]["step"] or 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, found {type(found).__name__}")
    return found
