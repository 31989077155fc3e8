"""What saving adds to training steps: in the background, and with training waiting for the disk.

    python tools/benchmarks/save.py [--repeats N] [--steps N] [--layers N] [--folder FOLDER]

README.md says what is measured and how.
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
    "training": {"num_steps": 1, "global_batch_size": 4, "micro_batch_size": 2},
    "views": {"max_prompt_tokens": 64},
    "rollout": {"max_response_tokens": 16, "batch_size": 4},
}
METHODS = ("no save", "waiting for the disk", "in the background")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=8, help="from one save to the next (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args(argv)
    hf = DENSE | {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        (Path(folder) / "run.yaml").write_text(yaml.safe_dump(CONFIG))
        sizes = args.repeats, args.steps
        on_ranks(measure, args.ranks, folder, hf, *sizes, exact_memory=False)
        found = json.loads((Path(folder) / "found.json").read_text())
    print_table(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure(folder: str, hf: dict[str, Any], repeats: int, num_steps: int) -> None:
    """On a rank: every method in turn, as many times; the first rank writes what it took."""
    from random_runs import build_run

    from aropd_mcore.convert.manifest import iterations
    from aropd_mcore.mcore import checkpoint, checkpoint_folder
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.step import train_step

    config = load_config(Path(folder) / "run.yaml")
    runtime = start_runtime(config)
    run = build_run(config, runtime, hf)
    saves = Path(folder) / "checkpoints"
    checkpoint_folder.prepare(saves)
    parts = run.student, run.teacher, {}, runtime
    train_step(run, 0)
    checkpoint.save(saves, 0, *parts)  # what Megatron starts for the first one stays
    blocked: dict[str, list[float]] = {method: [] for method in METHODS}
    total: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(1, repeats + 1):
        for method in METHODS:
            waited, started = 0.0, time.perf_counter()
            saving = None
            for step in range(num_steps):
                train_step(run, step)
                asked = time.perf_counter()
                if step == 0 and method != METHODS[0]:
                    background = method == METHODS[2]
                    saving = checkpoint.Saving(saves, repeat, *parts)
                    if not background:
                        saving.commit()
                        saving = None
                is_last = step + 1 == num_steps
                if saving is not None and (saving.is_written() or is_last):
                    saving.commit()
                    saving = None
                waited += time.perf_counter() - asked
            blocked[method].append(waited)
            total[method].append(time.perf_counter() - started)
            if runtime.rank == 0:
                checkpoint_folder.prune(saves, keep_last=1)
            dist.barrier()
    if runtime.rank == 0:
        (last,) = iterations(saves)
        size = sum(file.stat().st_size for file in last.iterdir())
        found = {"bytes": size, "steps": num_steps, "blocked": blocked, "total": total}
        (Path(folder) / "found.json").write_text(json.dumps(found))


def print_table(found: dict[str, Any]) -> None:
    steps, total, blocked = found["steps"], found["total"], found["blocked"]
    base = statistics.median(total[METHODS[0]])
    print(f"a checkpoint of {found['bytes'] / 1e6:.0f} MB in {steps} steps of {base / steps:.3f} s")
    rows = {}
    for method in METHODS[1:]:
        # Against the steps without a save right before: what else the machine does, both saw.
        added = [a - b for a, b in zip(total[method], total[METHODS[0]], strict=True)]
        rows[method] = statistics.median(blocked[method]), statistics.median(added)
        waits, adds = blocked[method], added
        print(
            f"{method:>22}: training waits {rows[method][0]:.3f} s a save "
            f"({min(waits):.3f} to {max(waits):.3f}), which takes {rows[method][1]:.3f} s "
            f"({min(adds):.3f} to {max(adds):.3f}) more than none"
        )
    (sync, sync_added), (background, background_added) = rows.values()
    print(
        f"in the background / waiting: {background / sync:.2f} of the waiting, "
        f"{background_added / sync_added:.2f} of the time"
    )


if __name__ == "__main__":
    raise SystemExit(main())
