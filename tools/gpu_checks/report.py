"""Results of the check as JSON and as a Markdown section for docs/benchmarks.md."""

import json
from pathlib import Path
from typing import Any

from aropd_mcore.data.prepare import write_atomically

DRY = "DRY RUN, NOT A MEASUREMENT"


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write gpu_check.json and gpu_check.md, for a dry run gpu_check.dry.json and .dry.md."""
    path = report_path(folder, dry=results["dry"])
    write_atomically(path, [json.dumps(results, indent=2), "\n"])
    write_atomically(path.with_suffix(".md"), [render(results)])


def report_path(folder: Path, *, dry: bool) -> Path:
    return folder / ("gpu_check.dry.json" if dry else "gpu_check.json")


def render(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    title = machine["gpu"] or machine["cpu"]
    lines = [f"### {f'{DRY}: ' if results['dry'] else ''}gpu_check.py on {title}", ""]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines += [
        f"    {results['command']}",
        "",
        f"{results['date']}, commit {results['commit']}, {listed}, {machine['cores']} CPU cores"
        f"{', driver ' + machine['driver'] if machine['driver'] else ''}. "
        f"All parts together took {sum(p['seconds'] for p in results['parts']) / 60:.1f} minutes.",
    ]
    if results["dry"]:
        lines += ["", f"**{DRY}: tiny shapes on a CPU. Times and verdicts show nothing.**"]
    lines += ["", "| part | what | measured | goal | verdict |", "|---|---|---|---|---|"]
    for part in results["parts"]:
        for check in part["checks"]:
            note = f" ({check['note']})" if check["note"] else ""
            cells = check["what"], check["measured"], check["goal"], check["verdict"] + note
            lines.append(_row(part["name"], cells, results["dry"]))
        if part["status"] != "done":
            cells = "the part", "–", "–", f"{part['status']}: {part['reason']}"
            lines.append(_row(part["name"], cells, results["dry"]))
    return "\n".join(lines) + "\n"


def render_constants(results: dict[str, Any]) -> str:
    """Return the measured values of the plan's constants as YAML for constants.yaml.

    Each replaces an end of a range, or `used`. Which one it is depends on the measured case.
    """
    if results["dry"]:
        return "a dry run measures no constants\n"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = []
    for part in results["parts"]:
        for check in part["checks"]:
            if check["constant"] and check["value"] is not None:
                lines += [
                    f"{check['constant']}:",
                    f"    value: {check['value']:.4g}",
                    f"    measured: {json.dumps(check['what'])}",
                    f"    machine: {json.dumps(results['machine']['gpu'])}",
                    f"    versions: {json.dumps(versions)}",
                    f"    date: {part['finished'][:10]}",
                    f"    command: {json.dumps(part['command'])}",
                ]
    return "\n".join(lines or ["no part that measures a constant has a result"]) + "\n"


def _row(name: str, cells: tuple[str, ...], is_dry: bool) -> str:
    *most, verdict = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join([name, *most, f'dry: {verdict}' if is_dry else verdict])} |"
