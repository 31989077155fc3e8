"""Measure the host memory of a background save, per byte of the checkpoint's tensors.

    python tools/benchmarks/pinned.py [--layers N] [--json FILE]

On a GPU a save copies its tensors into pinned memory, whose blocks torch rounds up to powers of
two. The model has Qwen2.5-1.5B's width and random weights. Without a GPU the model is small,
nothing is pinned, and the blocks are computed from the sizes of the tensors.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from memory import DENSE
from random_runs import on_ranks
from save import CONFIG
from torch import Tensor

from aropd_mcore.config_file import load_config


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=8, help="layers of the model (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="for the save (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file for the figures (default: none)")
    args = parser.parse_args(argv)
    hf = DENSE | {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        tree = CONFIG | {"model": {"path": "unused", "dtype": "bf16"}}
        (Path(folder) / "run.yaml").write_text(yaml.safe_dump(tree))
        on_ranks(measure, 1, folder, hf, exact_memory=False)
        figures = json.loads((Path(folder) / "figures.json").read_text())
    size = figures["bytes"]
    print(f"{figures['tensors']} tensors of {size / 1e9:.3f} GB")
    print(f"computed from their sizes: {figures['rounded'] / size:.3f} bytes per byte")
    if figures["pinned"] is not None:
        print(f"pinned by torch: {figures['pinned'] / size:.3f} bytes per byte")
    if args.json:
        args.json.write_text(json.dumps(figures))
    return 0


def measure(folder: str, hf: dict[str, Any]) -> None:
    """Save a run in the background on a rank, and write the figures."""
    from random_runs import build_run

    from aropd_mcore.mcore.checkpoint import directory, state
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.step import train_step

    config = load_config(Path(folder) / "run.yaml")
    runtime = start_runtime(config)
    run = build_run(config, runtime, hf)
    train_step(run, 0)  # creates the optimizer's state
    saves = Path(folder) / "checkpoints"
    directory.prepare(saves)
    before = _pinned_bytes()
    saving = state.Saving(saves, 0, run.student, run.teacher, {}, runtime)
    after = _pinned_bytes()
    copies = {copy.data_ptr(): copy for copy in _tensors(saving._writing._host_copies)}
    sizes = [copy.untyped_storage().nbytes() for copy in copies.values()]
    figures = {
        "tensors": len(sizes),
        "bytes": sum(sizes),
        "rounded": sum(1 << (size - 1).bit_length() for size in sizes if size),
        "pinned": after - before if before is not None and after is not None else None,
    }
    saving.commit()
    (Path(folder) / "figures.json").write_text(json.dumps(figures))


def _pinned_bytes() -> int | None:
    """Return the bytes of torch's pinned blocks; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.host_memory_stats()["allocated_bytes.current"]


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)


if __name__ == "__main__":
    raise SystemExit(main())
