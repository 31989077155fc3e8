"""Measure the cost of saving during training, in the background and with training waiting.

    python tools/benchmarks/save.py [--repeats N] [--steps N] [--layers N] [--folder FOLDER]

docs/benchmarks.md describes the measurement.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from random_runs import DENSE, on_ranks

from aropd_mcore.config_file import load_config

CONFIG: dict[str, Any] = {
    "output_dir": "unused",
    "model": {"path": "unused"},
    "data": {"train": ["unused"]},
    "training": {"num_steps": 1, "global_batch_size": 4, "micro_batch_size": 2, "packing": False},
    "views": {"max_prompt_tokens": 64},
    "rollout": {"max_response_tokens": 16, "batch_size": 4},
}
METHODS = ("no save", "waiting for the disk", "in the background")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="number of repetitions (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=8, help="steps from save to save (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=int, default=2, help="number of ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="folder to write to (default: a temporary folder)"
    )
    parser.add_argument(
        "--layers", type=int, default=4, help="layers of the model (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures (default: none)")
    args = parser.parse_args(argv)
    hf = DENSE | {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        (Path(folder) / "run.yaml").write_text(yaml.safe_dump(CONFIG))
        sizes = args.repeats, args.steps
        on_ranks(measure, args.ranks, folder, hf, *sizes, exact_memory=False)
        figures = json.loads((Path(folder) / "figures.json").read_text())
    print_table(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def measure(folder: str, hf: dict[str, Any], repeats: int, num_steps: int) -> None:
    """Run every method in turn, `repeats` times, on a rank. The first rank writes the figures."""
    from random_runs import build_run

    from aropd_mcore.convert.manifest import iterations
    from aropd_mcore.mcore.checkpoint import directory, state
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.step import train_step

    config = load_config(Path(folder) / "run.yaml")
    runtime = start_runtime(config)
    run = build_run(config, runtime, hf)
    saves = Path(folder) / "checkpoints"
    directory.prepare(saves)
    parts = run.student, run.teacher, {}, runtime
    train_step(run, 0)
    state.save(saves, 0, *parts)  # the first save starts processes of Megatron that remain
    blocked: dict[str, list[float]] = {method: [] for method in METHODS}
    total: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(1, repeats + 1):
        for method in METHODS:
            waited, started = 0.0, time.perf_counter()
            saving = None
            for step in range(num_steps):
                train_step(run, step)
                save_started = time.perf_counter()
                if step == 0 and method != METHODS[0]:
                    background = method == METHODS[2]
                    saving = state.Saving(saves, repeat, *parts)
                    if not background:
                        saving.commit()
                        saving = None
                is_last = step + 1 == num_steps
                if saving is not None and (saving.is_written() or is_last):
                    saving.commit()
                    saving = None
                waited += time.perf_counter() - save_started
            blocked[method].append(waited)
            total[method].append(time.perf_counter() - started)
            if runtime.rank == 0:
                directory.prune(saves, keep_last=1)
            dist.barrier()
    if runtime.rank == 0:
        (last,) = iterations(saves)
        size = sum(file.stat().st_size for file in last.iterdir())
        figures = {"bytes": size, "steps": num_steps, "blocked": blocked, "total": total}
        (Path(folder) / "figures.json").write_text(json.dumps(figures))


def print_table(figures: dict[str, Any]) -> None:
    steps, total, blocked = figures["steps"], figures["total"], figures["blocked"]
    base = statistics.median(total[METHODS[0]])
    size = figures["bytes"] / 1e6
    print(f"one checkpoint of {size:.0f} MB per {steps} steps of {base / steps:.3f} s")
    rows = {}
    for method in METHODS[1:]:
        # Differences to the block without a save right before, under the same load of the machine.
        added = [a - b for a, b in zip(total[method], total[METHODS[0]], strict=True)]
        rows[method] = statistics.median(blocked[method]), statistics.median(added)
        waits, adds = blocked[method], added
        print(
            f"{method:>22}: training waits {rows[method][0]:.3f} s per save "
            f"({min(waits):.3f} to {max(waits):.3f}), and the steps take {rows[method][1]:.3f} s "
            f"({min(adds):.3f} to {max(adds):.3f}) longer"
        )
    (sync, sync_added), (background, background_added) = rows.values()
    print(
        f"in the background / waiting: {background / sync:.2f} of the wait, "
        f"{background_added / sync_added:.2f} of the additional time"
    )


if __name__ == "__main__":
    raise SystemExit(main())
