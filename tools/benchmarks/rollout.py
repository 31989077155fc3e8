"""Measure the speed of the native engine.

    python tools/benchmarks/rollout.py [--tensor N --pipeline N] [--model HF_CONFIG] [--repeats 5]

Comparisons:

- the engine with a loop that reads the whole prefix for every token;
- different numbers of new tokens;
- replacement of finished rows with separate batches;
- with pipeline stages, groups of rows that take turns with all rows at once, of 64 rows;
- on a GPU, decoding with CUDA graphs with decoding without them.

A random model decodes greedily, on a GPU in bf16. Start one process, or several ranks with
torchrun. Methods take turns within each repetition. Times are medians.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from aropd_mcore.config import SamplingConfig
from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.mcore.model import StageModel, build_model
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.rollout.decode_batch import DecodeBatch
from aropd_mcore.rollout.engine import PromptBatch
from aropd_mcore.rollout.native import NativeEngine

MODEL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
ROWS, PROMPT, NEW = 16, 64, 128
MEAN_RESPONSE = 32
"""Mean length of responses that end with EOS."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the speed of the native rollout engine.")
    parser.add_argument(
        "--tensor", type=int, default=1, help="tensor-parallel size (default: %(default)s)"
    )
    parser.add_argument(
        "--pipeline", type=int, default=1, help="pipeline-parallel size (default: %(default)s)"
    )
    parser.add_argument(
        "--model", type=Path, help="HF config.json of the model (default: a small model)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="number of repetitions (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    hf = json.loads(args.model.read_text()) if args.model else MODEL
    runtime = mcore_runtime.start(tensor=args.tensor, pipeline=args.pipeline)
    model = random_model(hf, runtime)
    figures = measure(model, runtime, repeats=args.repeats)
    if runtime.rank == 0:
        print(report(figures))
    mcore_runtime.stop(leave_job=True)
    return 0


def random_model(hf: dict[str, Any], runtime: Runtime) -> StageModel:
    model = build_model(hf, runtime, dtype=runtime.dtype("auto"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def measure(model: StageModel, runtime: Runtime, *, repeats: int, scale: int = 1) -> dict[str, Any]:
    """Measure the median seconds of each method.

    Args:
        scale: divisor of the numbers of tokens, for a quick run.
    """
    prompts = random_prompts(ROWS, PROMPT // scale, model.vocab_size)
    new = NEW // scale
    greedy = NativeEngine(model, runtime, eos_token_ids=(), batch_size=ROWS, cuda_graphs=True)
    methods: dict[str, Callable[[], Any]] = {
        f"new {n}": partial(generate, greedy, prompts, n) for n in (new, 2 * new, 4 * new)
    }
    if runtime.device.type == "cuda":
        plain = NativeEngine(model, runtime, eos_token_ids=(), batch_size=ROWS, cuda_graphs=False)
        methods["without graphs"] = partial(generate, plain, prompts, new)
        # The first call of each number of rows and keys runs plainly, the second captures.
        for _ in range(2):
            generate(greedy, prompts, 4 * new)
    if runtime.world_size == 1:
        methods["prefix reread"] = partial(reread_prefix, model, prompts, new)
        expected = reread_prefix(model, prompts, new)
        assert generate(greedy, prompts, new) == expected, "expected the same tokens"
    # One in MEAN_RESPONSE tokens ends a response, and sampling is nearly uniform.
    eos = range(0, model.vocab_size, MEAN_RESPONSE)
    many = random_prompts(4 * ROWS, PROMPT // scale, model.vocab_size)
    engine = NativeEngine(model, runtime, eos_token_ids=eos, batch_size=ROWS)
    sampling = SamplingConfig(max_response_tokens=4 * new)
    methods["rows replaced"] = partial(sample, engine, many, sampling)
    methods["separate batches"] = partial(sample_batches, engine, many, sampling)
    if runtime.pp_size > 1:
        wide = NativeEngine(model, runtime, eos_token_ids=(), batch_size=4 * ROWS)
        methods["groups in turns"] = partial(generate, wide, many, new)
        methods["all rows at once"] = partial(generate_at_once, wide, many, new)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    num_tokens = sum(map(len, sample(engine, many, sampling)))
    for _ in range(repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"seconds": medians, "new": new, "num_sampled": num_tokens}


def random_prompts(number: int, length: int, vocab_size: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(vocab_size) for _ in range(length)] for _ in range(number)]


def generate(engine: NativeEngine, prompts: list[list[int]], new: int) -> list[list[int]]:
    return sample(engine, prompts, SamplingConfig(max_response_tokens=new, temperature=0))


def generate_at_once(engine: NativeEngine, prompts: list[list[int]], new: int) -> None:
    decode = DecodeBatch._decode
    with patch.object(
        DecodeBatch, "_decode", lambda self, num_tokens, _: decode(self, num_tokens, 1)
    ):
        generate(engine, prompts, new)


def sample(
    engine: NativeEngine, prompts: list[list[int]], sampling: SamplingConfig, first: int = 0
) -> list[list[int]]:
    seeds = range(first, first + len(prompts))
    pending = engine.submit(PromptBatch(prompts, seeds, sampling))
    return [list(rollout.response_ids) for rollout in pending.result()]


def sample_batches(
    engine: NativeEngine, prompts: list[list[int]], sampling: SamplingConfig
) -> None:
    for start in range(0, len(prompts), ROWS):
        sample(engine, prompts[start : start + ROWS], sampling, first=start)


@torch.no_grad()
def reread_prefix(model: StageModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Decode greedily, with a forward over the whole sequence for each token."""
    model.eval()
    weight: Tensor = model.head_weight()
    tokens_BS = torch.tensor(prompts, device=weight.device)
    for _ in range(new):
        positions_BS = torch.arange(tokens_BS.size(1), device=weight.device).expand_as(tokens_BS)
        hidden_BH = model[0](tokens_BS, positions_BS, None)[-1]
        logits_BV = functional.linear(hidden_BH, weight)[:, : model.vocab_size]
        tokens_BS = torch.cat([tokens_BS, logits_BV.argmax(-1, keepdim=True)], dim=1)
    return tokens_BS[:, len(prompts[0]) :].tolist()


def report(figures: dict[str, Any]) -> str:
    seconds, new = figures["seconds"], figures["new"]
    base = seconds[f"new {new}"]
    lines = [f"{'':24}{'seconds':>9}{'tokens/s':>10}"]
    for name, median in seconds.items():
        num_tokens = figures["num_sampled"]
        if name.startswith(("new", "prefix", "without")):
            num_tokens = ROWS * (int(name.removeprefix("new ")) if name.startswith("new") else new)
        elif name.startswith(("groups", "all rows")):
            num_tokens = 4 * ROWS * new
        lines.append(f"{name:24}{median:9.2f}{num_tokens / median:10.0f}")
    if "prefix reread" in seconds:
        speedup = seconds["prefix reread"] / base
        lines.append(f"engine / prefix reread:            {speedup:.1f} x the speed")
    if "without graphs" in seconds:
        lines.append(f"engine / without graphs:           {seconds['without graphs'] / base:.1f} x")
        lines.append(f"per token, {ROWS} rows:                {base / new * 1e3:.2f} ms")
    if "groups in turns" in seconds:
        speedup = seconds["all rows at once"] / seconds["groups in turns"]
        lines.append(f"groups in turns / all at once:     {speedup:.2f} x the speed")
    for factor in (2, 4):
        per_token = seconds[f"new {factor * new}"] / base / factor
        lines.append(f"per token, {factor * new} / {new} new tokens: {per_token:.2f} x the time")
    speedup = seconds["separate batches"] / seconds["rows replaced"]
    lines.append(f"rows replaced / separate batches:  {speedup:.2f} x the speed")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
