"""`aropd report`: one self-contained HTML page that shows the folders of runs.

A folder may contain any of these files:

    metrics.jsonl             curves, step time, drift by position
    validation.jsonl          accuracy while the run trains
    samples.jsonl             answers to one question over the run (evaluation/sample_history.py)
    config.yaml               method
    eval/**/summary.json      accuracy, also by response length (from `aropd eval`)
    diagnose/*.json           reader, thresholds, reliability (from `aropd diagnose`)

This module inserts the style, the scripts and the data (as JSON) of report_page/ into page.html.
The scripts show text from a run as text only, never as HTML.
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
from aropd_mcore.evaluation.sample_history import read_histories
from aropd_mcore.numerics.position_metrics import METRICS

_PAGE = Path(__file__).with_name("report_page")
_SCRIPTS = ("labels.js", "chart.js", "sections.js", "reader.js", "answers.js", "page.js")
_MAX_POINTS = 1000
"""Number of points per curve. A longer curve is shown as means of neighbouring steps."""


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report page of runs to `out`, and return `out`.

    Raises:
        ValueError: a folder has no file that the page shows, or a file cannot be read.
    """
    names = _display_names(runs)
    data = {
        "version": __version__,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "labels": {name: [metric.title, metric.unit] for name, metric in METRICS.items()},
        "runs": [{"name": name} | _load_run(run) for name, run in zip(names, runs, strict=True)],
    }
    write_atomically(out, [render(data)])
    return out


def render(data: Mapping[str, Any]) -> str:
    """Insert data into the page, and return its HTML."""
    # Escape `<`, so that no text in the data can end the script element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    script = "\n".join((_PAGE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    parts = {
        "/*STYLE*/": (_PAGE / "style.css").read_text(encoding="utf-8"),
        "/*SCRIPT*/": f'"use strict";\n(() => {{\n{script}\n}})();',
        "/*DATA*/": text,
    }
    page = (_PAGE / "page.html").read_text(encoding="utf-8")
    for place, part in parts.items():  # the data last: it may contain the other placeholders
        before, _, after = page.partition(place)
        page = before + part + after
    return page


def _display_names(runs: Sequence[Path]) -> list[str]:
    """Return the names of folders if they differ, or else paths relative to their common parent."""
    paths = [run.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"runs {', '.join(map(str, runs))}: expected each run only once")
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def _load_run(run: Path) -> dict[str, Any]:
    validations, samples = run / "validation.jsonl", run / "samples.jsonl"
    lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    data = {
        "num_steps": len(lines),
        **_columns(lines),
        "method": _method(run / "config.yaml"),
        "validations": read_metrics(validations) if validations.exists() else [],
        "histories": read_histories(samples) if samples.exists() else [],
        "evaluations": list(_evaluations(run)),
        "diagnoses": list(_diagnoses(run)),
    }
    if not (lines or data["evaluations"] or data["diagnoses"]):
        raise ValueError(
            f"{run}: nothing to show: expected a run's output_dir with metrics.jsonl, "
            "diagnose/*.json or eval/**/summary.json"
        )
    return data


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the steps, and the values of each metric over the steps. None: not reported."""
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
        "teacher": ", ".join(name or t.kind for name, t in config.named_teachers.items()) or None,
    }


def _method_name(config: Config) -> str:
    """Return the name of the method of a config (METHOD section 8)."""
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
            raise ValueError(f"{path}: no `tasks`: expected a summary.json of `aropd eval`")
        yield {"name": str(path.parent.relative_to(run / "eval")), "tasks": summary["tasks"]}


def _diagnoses(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the diagnoses of a run, sorted by step."""
    diagnoses = []
    for path in sorted((run / "diagnose").glob("*.json")):
        diagnosis = _read(path)
        if diagnosis.get("schema") != SCHEMA:
            raise ValueError(
                f"{path}: schema {diagnosis.get('schema')!r}, expected {SCHEMA!r}: rerun "
                "`aropd diagnose`"
            )
        diagnoses.append({"name": path.stem} | diagnosis)
    yield from sorted(diagnoses, key=lambda diagnosis: diagnosis["model"]["step"] or 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return content
