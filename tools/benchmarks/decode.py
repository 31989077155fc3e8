"""Measure the time of a decoded token in the native engine, with and without CUDA graphs.

    python tools/benchmarks/decode.py --shape 7b [--rows 64] [--json FILE]

The model has random weights and one of these shapes:

- 1.5b, 7b: Qwen2.5's.
- launch, launch-experts: 28 layers so narrow that a token takes the launches of its kernels.
- tiny: for a quick run.

Every row decodes the same number of tokens, and no row ends. The time of a token is the difference
of a long and a short run, divided by the difference of their tokens, so it includes no prefill.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rollout import MODEL, generate, random_model, random_prompts

from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.rollout.native import NativeEngine

_NARROW = MODEL | {"num_hidden_layers": 28}
_QWEN2_5_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN2_5_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
_EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": MODEL | _QWEN2_5_1_5B,
    "7b": MODEL | _QWEN2_5_7B,
    "launch": _NARROW,
    "launch-experts": _NARROW | _EXPERTS,
    "tiny": MODEL | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512},
    "tiny-experts": MODEL | _EXPERTS | {"hidden_size": 64, "num_hidden_layers": 2},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1.5b", help="(default: %(default)s)")
    for name, default, meaning in (
        ("rows", 64, "number of responses that are decoded together"),
        ("prompt", 128, "number of tokens of each prompt"),
        ("new", 96, "number of tokens of each response in the long run; the short one has a third"),
        ("repeats", 3, "number of repetitions"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument("--json", type=Path, help="file for the figures (default: none)")
    args = parser.parse_args(argv)
    if args.new < 3:
        parser.error(f"--new {args.new}: expected at least 3")
    figures = measure(SHAPES[args.shape], args)
    for name, seconds in figures["seconds_per_token"].items():
        low, high = min(seconds) * 1e3, max(seconds) * 1e3
        print(f"{args.shape}, {args.rows} rows, {name}: {low:.3f} to {high:.3f} ms per token")
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, "rows": args.rows} | figures))
    mcore_runtime.stop(leave_job=True)
    return 0


def measure(hf: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds per token of each method: all repetitions, the median first."""
    runtime = mcore_runtime.start()
    model = random_model(hf, runtime)
    prompts = random_prompts(args.rows, args.prompt, model.vocab_size)
    short, long = args.new // 3, args.new
    seconds: dict[str, list[float]] = {}
    is_captured = False
    for name, graphs in (("graphs", True), ("plain", False)):
        engine = NativeEngine(
            model, runtime, eos_token_ids=(), batch_size=args.rows, cuda_graphs=graphs
        )
        if graphs and engine._graphs is None:
            continue  # these layers cannot be captured
        for _ in range(2):  # the first run of a step allocates, the second captures
            generate(engine, prompts, long)
        times = {}
        for new in (short, long):
            times[new] = [_timed(engine, prompts, new) for _ in range(args.repeats)]
        seconds[name] = [
            (b - a) / (long - short) for a, b in zip(times[short], times[long], strict=True)
        ]
        seconds[name].insert(0, statistics.median(seconds[name]))
        is_captured |= engine._graphs is not None and len(engine._graphs._replays) > 0
    return {
        "layers": hf["num_hidden_layers"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "is_captured": is_captured,
        "seconds_per_token": seconds,
    }


def _timed(engine: NativeEngine, prompts: list[list[int]], new: int) -> float:
    started = time.perf_counter()
    generate(engine, prompts, new)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
