"""Count what each rank writes, reads and holds in memory for a checkpoint. Times are not measured.

    python tools/benchmarks/save_counts.py [--ranks 2 4 8] [--layers N] [--folder FOLDER]

docs/benchmarks.md describes the counters.
"""

import argparse
import builtins
import io
import json
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from random_runs import DENSE, on_ranks, read_peak, settle
from save import CONFIG

from aropd_mcore.config_file import load_config


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4, 8], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="folder to write to (default: a temporary folder)"
    )
    parser.add_argument(
        "--layers", type=int, default=8, help="layers of the model (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    for num_ranks in args.ranks:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            job = partial(_on_ranks, num_ranks=num_ranks, folder=folder, layers=args.layers)
            saved = job(save, tensor=1)
            _print_save(saved)
            _print_load("the same layout", saved, job(load, tensor=1))
            _print_load("TP 2", saved, job(load, tensor=2))
    return 0


def _on_ranks(
    function: Any, num_ranks: int, folder: str, layers: int, *, tensor: int
) -> list[dict[str, Any]]:
    """Run a function on ranks of a new job. Return each rank's figures."""
    job = Path(folder) / "job"
    shutil.rmtree(job, ignore_errors=True)
    job.mkdir()
    sizes = {"training": CONFIG["training"] | {"global_batch_size": 2 * num_ranks}}
    config = CONFIG | sizes | {"parallel": {"tensor": tensor}, "model": {"path": "-"}}
    config["model"] |= {"dtype": "bf16"}
    (job / "run.yaml").write_text(yaml.safe_dump(config))
    on_ranks(function, num_ranks, str(job), folder, layers, exact_memory=True)
    return [json.loads((job / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def save(job: str, folder: str, layers: int) -> None:
    """Save a run on a rank."""
    from aropd_mcore.convert.manifest import iterations
    from aropd_mcore.mcore.checkpoint import state

    run = _build(job, layers)
    saves = Path(folder) / "checkpoints"
    parts = run.student, run.teacher, {"step": 1}, run.runtime
    state.save(Path(folder) / "warm-up", 1, *parts)  # starts processes of Megatron that remain
    held = settle()
    state.save(saves, 1, *parts)
    grown = read_peak() - held
    files = {path.name: path.stat().st_size for path in iterations(saves)[0].iterdir()}
    rank = run.runtime.rank
    written = sum(size for name, size in files.items() if name.startswith(f"__{rank}_"))
    figures = {"written": written, "grown": grown, "checkpoint": sum(files.values())}
    (Path(job) / f"{rank}.json").write_text(json.dumps(figures))


def load(job: str, folder: str, layers: int) -> None:
    """Check and load the saved run on a rank."""
    from aropd_mcore.mcore.checkpoint import directory, state

    run = _build(job, layers)
    held = settle()
    with _CountedReads() as checked:
        path, _ = directory.find(Path(folder) / "checkpoints")
    assert path is not None
    with _CountedReads() as loaded:
        state.load(path, run.student, run.teacher, run.runtime)
    figures = {
        "checked": checked.bytes.total(),
        "tensors": loaded.bytes[".distcp"],
        "index": loaded.bytes.total() - loaded.bytes[".distcp"],
        "grown": read_peak() - held,
    }
    (Path(job) / f"{run.runtime.rank}.json").write_text(json.dumps(figures))


def _build(job: str, layers: int) -> Any:
    from random_runs import build_run

    from aropd_mcore.trainer.build import start_runtime

    config = load_config(Path(job) / "run.yaml")
    return build_run(config, start_runtime(config), DENSE | {"num_hidden_layers": layers})


class _CountedReads:
    """Context in which the bytes that Python reads from files are counted, by suffix."""

    def __init__(self) -> None:
        self.bytes = Counter[str]()
        self._lock = threading.Lock()

    def __enter__(self) -> "_CountedReads":
        counts, lock, self._open = self.bytes, self._lock, io.open

        class File(io.FileIO):
            def _count(self, num_bytes: int | None) -> None:
                with lock:
                    counts[Path(str(self.name)).suffix] += num_bytes or 0

            def readinto(self, buffer: Any) -> int | None:  # type: ignore[override]
                num_bytes = super().readinto(buffer)
                self._count(num_bytes)
                return num_bytes

            def readall(self) -> bytes:
                content = super().readall()
                self._count(len(content))
                return content

        def counted_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kw: Any):
            if mode != "rb" or isinstance(file, int):
                return self._open(file, mode, buffering, *args, **kw)
            raw = File(file, "r")
            return raw if buffering == 0 else io.BufferedReader(raw)

        io.open = builtins.open = counted_open  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        io.open = builtins.open = self._open


def _print_save(ranks: list[dict[str, Any]]) -> None:
    size = ranks[0]["checkpoint"]
    share = size / len(ranks)
    written = [rank["written"] / share for rank in ranks]
    grown = [rank["grown"] / share for rank in ranks]
    print(f"{len(ranks)} ranks, a checkpoint of {size / 1e6:.0f} MB; in shares of a rank:")
    print(f"  written by a rank                {min(written):.2f} to {max(written):.2f}")
    print(f"  host memory of a save            {min(grown):.2f} to {max(grown):.2f}")


def _print_load(layout: str, saved: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> None:
    size = saved[0]["checkpoint"]
    whole = {name: sum(rank[name] for rank in ranks) / size for name in ("checked", "tensors")}
    index = sum(rank["index"] for rank in ranks)
    grown = max(rank["grown"] for rank in ranks) * len(ranks) / size
    print(
        f"  resume in {layout}: checksums read {whole['checked']:.2f} of the checkpoint, the load "
        f"{whole['tensors']:.2f} and {index / 1e6:.1f} MB of indexes; host memory {grown:.2f} "
        "shares"
    )


if __name__ == "__main__":
    raise SystemExit(main())
