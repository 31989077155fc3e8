"""Write the tables of planned memory and time into the documentation.

    python tools/plan_tables.py

Each table is between two comments of its page. The layouts are those of examples/clusters.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

from aropd_mcore.config_file import load_config
from aropd_mcore.plan.fit import Estimate, PlannedRun, build_planned_run, sweep
from aropd_mcore.plan.host_memory import host_memory
from aropd_mcore.plan.layout import describe
from aropd_mcore.plan.setup import Setup

REPO = Path(__file__).resolve().parents[1]
CLUSTERS = REPO / "examples" / "clusters"
ROOM = 80e9
_EXAMPLES = (
    ("Qwen2.5-7B-Instruct, 7.6B", "qwen2.5-7b-8xh100", 8),
    ("gpt-oss-20b, 20.9B", "gpt-oss-20b-16xh100", 16),
    ("Qwen2.5-32B teaches 7B", "qwen2.5-32b-to-7b-16xh100", 16),
    ("Qwen2.5-32B and Coder-32B teach 7B", "qwen2.5-two-teachers-16xh100", 16),
    ("Qwen3-32B, 32.8B", "qwen3-32b-32xh100", 32),
    ("Llama-3.1-70B-Instruct, 70.6B", "llama3.1-70b-64xh100", 64),
    ("Llama-3.1-70B-Instruct, 70.6B, LoRA", "llama3.1-70b-lora-8xh100", 8),
    ("GLM-4.5-Air, 106.9B", "glm-4.5-air-64xh100", 64),
    ("Qwen3-235B-A22B, 235B", "qwen3-235b-a22b-256xh100", 256),
    ("DeepSeek-V3, 671B", "deepseek-v3-1024xh100", 1024),
)
_HOST = "teacher.weights=host"
_TP_4, _TP_8 = "parallel.tensor=4", "parallel.tensor=8"
_ONE_NODE = (
    ("Qwen2.5-7B-Instruct", "7b", [_TP_4]),
    ("the same, `teacher.weights: host`", "7b", [_TP_4, _HOST]),
    ("the same", "7b", ["parallel.tensor=2"]),
    ("the same, `teacher.weights: host`", "7b", ["parallel.tensor=2", _HOST]),
    ("a dense 14.8B model (Qwen3's shape: 40 layers, hidden size 5120)", "14.8b", [_TP_8]),
    ("Qwen3-32B", "32b", [_TP_8]),
)
"""Rows of the table of 8 GPUs: description, model, overrides of the 7B example."""


def render_clusters() -> str:
    """Return the table of examples/clusters/README.md."""
    lines = [
        "| model | GPUs | layout | peak per GPU | phase of the peak | host memory per node, with a "
        "save | step | of it rollout |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, name, num_gpus in _EXAMPLES:
        estimate = _planned(name, [], num_gpus).estimate()
        shortest, longest = estimate.shortest, estimate.time
        ranks = min(estimate.setup.gpus_per_node, num_gpus)
        host = ranks * sum(sum(parts.values()) for parts in host_memory(estimate.setup).values())
        cells = [model, str(num_gpus), _layout(estimate), _peak(estimate)]
        cells += [estimate.memory.peak_phase, f"{host / 1e9:.0f} GB"]
        cells += [f"{shortest.total:.0f} – {longest.total:.0f} s"]
        cells += [f"{shortest.rollout:.0f} – {longest.rollout:.0f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render_one_node() -> str:
    """Return the table of docs/parallelism.md: what fits on 8 GPUs, with microbatches of 2."""
    lines = ["| model | layout | peak | in |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        models = _models(Path(folder))
        for description, model, overrides in _ONE_NODE:
            two = ["training.micro_batch_size=2"]
            path = [f"model.path={models[model]}"]
            run = _planned("qwen2.5-7b-8xh100", [*path, *two, *overrides], 8)
            estimate = run.estimate()
            peak = _peak(estimate)
            if not run.fits(estimate.memory):
                peak += ": does not fit" if sweep(run) else ": no layout of 8 GPUs fits"
            cells = description, _layout(estimate), peak, estimate.memory.peak_phase
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _models(folder: Path) -> dict[str, Path]:
    """Return the folders of the models, and write the one that is not in the examples."""
    large = CLUSTERS / "Qwen3-32B"
    hf = json.loads((large / "config.json").read_text())
    hf |= {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 17408}
    hf |= {"num_attention_heads": 40, "max_window_layers": 40}
    (folder / "config.json").write_text(json.dumps(hf))
    return {"7b": CLUSTERS / "Qwen2.5-7B-Instruct", "14.8b": folder, "32b": large}


def _planned(name: str, overrides: list[str], num_gpus: int) -> PlannedRun:
    config = load_config(CLUSTERS / f"{name}.yaml", overrides)
    with chdir(REPO):  # model.path is relative to it
        return build_planned_run(config, num_gpus, gpus_per_node=8, memory_bytes=ROOM)


def _layout(estimate: Estimate) -> str:
    """Format the layout, and that of teachers with their own."""
    own = [t for t in estimate.setup.of_teachers if not t.has_head]
    return "; teacher ".join(dict.fromkeys(map(_sizes, (estimate.setup, *own))))


def _sizes(setup: Setup) -> str:
    """Format a layout without sizes of 1."""
    words = describe(setup, setup.data).replace(" x ", ", ").split(", ")
    return ", ".join(word for word in words if not word.endswith(" 1"))


def _peak(estimate: Estimate) -> str:
    return f"{estimate.memory.peak / 1e9:.0f} GB"


TABLES = (
    (CLUSTERS / "README.md", render_clusters),
    (REPO / "docs" / "parallelism.md", render_one_node),
)


def pages() -> Iterator[tuple[Path, str]]:
    """Yield each page and its contents with the present table."""
    mark = "<!-- Written by tools/plan_tables.py. Do not edit. -->"
    for path, render in TABLES:
        pattern = f"({re.escape(mark)}\n\n).*?(\n\n<!-- end -->)"
        new = r"\1" + render().replace("\\", r"\\") + r"\2"
        old = path.read_text(encoding="utf-8")
        text, count = re.subn(pattern, new, old, flags=re.DOTALL)
        assert count == 1, path
        yield path, text


if __name__ == "__main__":
    for page, contents in pages():
        page.write_text(contents, encoding="utf-8")
