"""Count the collectives and bytes of handing weights to vLLM servers, on small models and ranks.
Compute them for large models. Times are not measured.

    python tools/benchmarks/sync_counts.py [--layers N] [--bucket BYTES] [--skip-ranks]

docs/benchmarks.md describes the counters.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from random_runs import DENSE, on_ranks
from rich.console import Console
from rich.table import Table

from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.rates import FASTEST, SLOWEST
from aropd_mcore.plan.setup import Setup
from aropd_mcore.plan.sync import sync_cost, sync_seconds

EXPERTS = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SMALL: tuple[tuple[str, dict[str, Any], int, dict[str, Any]], ...] = (
    ("dense", DENSE, 2, {"tensor": 2}),
    ("dense", DENSE, 4, {"tensor": 2, "pipeline": 2}),
    ("experts", EXPERTS, 4, {"expert": 2, "pipeline": 2}),
    ("experts", EXPERTS, 8, {"expert": 4, "pipeline": 2}),
)
"""Model, its config.json, number of ranks, layout."""
LARGE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Qwen2.5-7B-Instruct", {"tensor": 4, "data": 2}),
    ("Llama-3.1-70B-Instruct", {"tensor": 8, "pipeline": 4, "data": 2}),
    ("Qwen3-235B-A22B", {"tensor": 4, "pipeline": 2, "data": 32, "expert": 64}),
)
"""Folder in examples/clusters, layout."""
CLUSTERS = Path(__file__).resolve().parents[2] / "examples" / "clusters"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=8, help="layers of the small models (default: %(default)s)"
    )
    parser.add_argument(
        "--bucket",
        type=int,
        default=2**21,
        help="bytes of a bucket of the small models (default: %(default)s)",
    )
    parser.add_argument("--skip-ranks", action="store_true", help="only compute the large models")
    args = parser.parse_args(argv)
    console = Console(width=110)
    if not args.skip_ranks:
        table = _table("Counted on ranks")
        for name, hf, num_ranks, layout in SMALL:
            hf = hf | {"num_hidden_layers": args.layers}
            counted = count(hf, num_ranks, layout, args.bucket)
            _check(hf, num_ranks, layout, args.bucket, counted)
            for path, cost in counted.items():
                _add_row(table, f"{name}, {_text(layout)}", path, cost)
        console.print(table)
    table = _table("Computed")
    for folder, layout in LARGE:
        setup = Setup(read_architecture(CLUSTERS / folder), **layout)
        name = f"{folder}, {_text(layout)}"
        for path in ("disk", "nccl"):
            cost = sync_cost(setup, path)
            low, high = (sync_seconds(setup, cost, rates) for rates in (FASTEST, SLOWEST))
            _add_row(table, name, path, vars(cost), f"{low:.1f} – {high:.1f}")
    console.print(table)
    return 0


def count(
    hf: dict[str, Any], num_ranks: int, layout: dict[str, Any], bucket_bytes: int
) -> dict[str, dict[str, int]]:
    """Count every path's calls and bytes on a job of small ranks."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(count_on_rank, num_ranks, folder, hf, layout, bucket_bytes, exact_memory=False)
        ranks = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(num_ranks)]
    counted = {}
    for path in ranks[0]:
        own = [rank[path] for rank in ranks]
        counted[path] = {
            "num_bytes": sum(rank["bytes"] for rank in own),
            "busiest_bytes": max(rank["bytes"] for rank in own),
            "num_owners": sum(rank["bytes"] > 0 for rank in own),
            "gathers": max(rank["gathers"] for rank in own),
            "sends": max(rank["sends"] for rank in own),
            "broadcasts": sum(rank["broadcasts"] for rank in own),
        }
    return counted


def count_on_rank(
    folder: str, hf: dict[str, Any], layout: dict[str, Any], bucket_bytes: int
) -> None:
    """Count a rank's calls and bytes, by path, and write them to a file of the folder."""
    import torch

    from aropd_mcore.mcore import runtime as mcore_runtime
    from aropd_mcore.mcore import weight_buckets
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.rollout.vllm_nccl import packed

    runtime = mcore_runtime.start(**layout)
    model = build_model(hf, runtime, dtype=torch.float32)
    weight_buckets.BUCKET_BYTES = bucket_bytes
    buckets = weight_buckets.WeightBuckets(model, runtime)
    figures: dict[str, dict[str, int]] = {}

    with _counted() as calls:
        for bucket in buckets.written():
            flat = buckets.gather(bucket)
            calls["bytes"] += 0 if flat is None else flat.nbytes
    figures["disk"] = dict(calls)
    with _counted() as calls:

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for bucket in buckets.sent():
                flat = buckets.gather_on_sender(bucket)
                if flat is not None and buckets.is_sender:
                    yield from bucket.views(flat)

        for flat in packed(tensors(), bucket_bytes):
            calls["bytes"] += flat.nbytes
            calls["broadcasts"] += 1
    figures["nccl"] = dict(calls)
    (Path(folder) / f"{runtime.rank}.json").write_text(json.dumps(figures))


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Count this rank's gathers, and its sends and receives."""
    calls = Counter({"bytes": 0, "gathers": 0, "sends": 0, "broadcasts": 0})
    usual = {name: getattr(dist, name) for name in ("gather", "send", "recv")}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls["gathers" if name == "gather" else "sends"] += 1
            return usual[name](*args, **kwargs)

        return call

    for name in usual:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in usual.items():
            setattr(dist, name, function)


def _check(
    hf: dict[str, Any],
    num_ranks: int,
    layout: dict[str, Any],
    bucket_bytes: int,
    counted: dict[str, dict[str, int]],
) -> None:
    """Compare what was counted with what plan/sync.py computes."""
    sizes: dict[str, Any] = {"tensor": 1, "pipeline": 1} | layout
    data = num_ranks // (sizes["tensor"] * sizes["pipeline"])
    setup = Setup(read_architecture(hf), **sizes, data=data, dtype_bytes=4)
    costs = {
        "disk": sync_cost(setup, "disk", limit=bucket_bytes),
        "nccl": sync_cost(setup, "nccl", limit=bucket_bytes),
    }
    for path, figures in counted.items():
        cost = costs[path]
        computed = {name: getattr(cost, name) for name in figures}
        assert computed == figures, (path, layout, computed, figures)


def _table(title: str) -> Table:
    table = Table(title=title)
    for name in ("model and layout", "path"):
        table.add_column(name)
    for name in ("GB", "busiest rank, GB", "owners", "gathers", "sends", "broadcasts", "seconds"):
        table.add_column(name, justify="right")
    return table


def _add_row(table: Table, name: str, path: str, cost: dict[str, Any], seconds: str = "") -> None:
    table.add_row(
        name,
        path,
        *(f"{cost[key] / 1e9:.3g}" for key in ("num_bytes", "busiest_bytes")),
        *(str(cost[key]) for key in ("num_owners", "gathers", "sends", "broadcasts")),
        seconds,
    )


def _text(layout: dict[str, Any]) -> str:
    names = {"tensor": "TP", "pipeline": "PP", "expert": "EP", "data": "DP"}
    return " ".join(f"{names[name]} {size}" for name, size in layout.items())


if __name__ == "__main__":
    raise SystemExit(main())
