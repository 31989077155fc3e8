"""Find out why AR-OPD on the untouched model leads to responses without an EOS.

    python examples/smollm2/endings.py --jobs 2    # trains what is missing, prints the table

Each variant trains the untouched model for 24 steps of 16 responses of up to 80 tokens, on problems
of one step, and changes one setting. All variants have the same rows, seeds and held-out problems.

Columns of the first table, for greedy responses: share of right responses, of responses cut at the
limit, of responses cut after they stated the answer, of responses with a line that occurs three
times (ignoring numbers), of responses with a preamble ("To solve", "Let's"), and the number of
tokens. The last columns are P(EOS) under student and target at the ends of sampled responses, over
the first and the last four steps. The second table has P(EOS) of each trained model at the ends of
the untouched model's greedy responses.
"""

import argparse
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from problems import shop
from study import aropd, over_cores
from tables import markdown
from transformers import AutoModelForCausalLM

from aropd_mcore.data.prepare import write_atomically
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.evaluation.figures import read_metrics

HERE = Path(__file__).parent
CONFIG = HERE / "aropd.yaml"
LIMIT = 80
NUM_HELDOUT, NUM_TRAIN = 100, 400
COMMON = (
    "rollout.batch_size=16",
    "training.global_batch_size=16",
    "views.system_prompt=null",
    "views.partial_view=prefix_with_answer",
    "optimizer.lr=5e-5",
    f"rollout.max_response_tokens={LIMIT}",
)
"""Settings of all variants. No view asks for the trace's format. The learning rate is high."""
ASKED = 'views.system_prompt="Show the calculation, then write: The answer is X."'
VARIANTS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "lr 1e-5": ("optimizer.lr=1e-5",),
    "no skipped tokens": ("objective.skip_response_tokens=0",),
    "views ask for the format": (ASKED,),
    "limit 160": ("rollout.max_response_tokens=160",),
    "temperature 0.7": ("rollout.temperature=0.7",),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/endings"))
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of runs at a time, one per core (default: 1)"
    )
    args = parser.parse_args(argv)
    write_problems(args.out)
    over_cores(lambda name, core: make(args.out, args.model, name, core), VARIANTS, args.jobs)
    heading = ["", "right, %", "cut, %", "cut after the answer, %", "loops, %", "preamble, %"]
    heading += ["tokens", "P(EOS), first 4", "last 4"]
    lines = [line(args.out / folder_name("as it is") / "untouched", "untouched model", [])]
    for name in VARIANTS:
        folder = args.out / folder_name(name)
        lines.append(line(folder / "eval", name, read_metrics(folder / "metrics.jsonl")))
    print(markdown(heading, lines))
    print()
    ends = response_ends(args.model, args.out / folder_name("as it is") / "untouched")
    lines = [[name, *eos_probs(path, ends)] for name, path in exported(args.out, args.model)]
    print(markdown(["P(EOS) at ends", *(f"{k} ({len(ids)})" for k, ids in ends.items())], lines))


def write_problems(out: Path) -> None:
    rng, seen = random.Random("endings"), set[str]()
    for name, size in {"heldout": NUM_HELDOUT, "train": NUM_TRAIN}.items():
        lines = []
        while len(lines) < size:
            row = shop(rng, num_steps=1)
            if row.question not in seen:
                seen.add(row.question)
                lines.append(json.dumps(row._asdict()) + "\n")
        write_atomically(out / f"{name}.jsonl", lines)


def folder_name(variant: str) -> str:
    return variant.replace(", ", "-").replace(" ", "_")


def make(out: Path, model: Path, variant: str, core: int) -> str:
    """Train a variant and answer the held-out problems, unless the results exist."""
    folder = out / folder_name(variant)
    settings = [
        f"output_dir={folder}",
        f"model.path={model}",
        f"data.train=[{out / 'train.jsonl'}]",
        *COMMON,
        *VARIANTS[variant],
    ]
    if not (folder / "eval/summary.json").exists():
        aropd("train", CONFIG, *settings, core=core, log=folder / "train.log")
        evaluate(out, folder, folder / "config.yaml", folder / "eval", core)
    if variant == "as it is" and not (folder / "untouched/summary.json").exists():
        evaluate(out, model, folder / "config.yaml", folder / "untouched", core)
    return variant


def evaluate(out: Path, model: Path, config: Path, results: Path, core: int) -> None:
    """Answer the held-out problems greedily, under the student view of `config`."""
    aropd(
        "eval", "--model", model, "--config", config, "--dtype", "fp32", "--out", results,
        "--task", f"heldout:math={out / 'heldout.jsonl'}", "--max-response-tokens", LIMIT,
        "--batch-size", NUM_HELDOUT, core=core, log=results.with_suffix(".log"),
    )  # fmt: skip


def read_samples(results: Path) -> list[dict]:
    return [json.loads(line) for line in (results / "samples.jsonl").read_text().splitlines()]


def states_answer(sample: dict) -> bool:
    return "The answer is" in sample["text"]


def is_cut(sample: dict) -> bool:
    return sample["finish_reason"] == "length"


def loops(text: str) -> bool:
    """Return whether a sentence or line occurs three times, ignoring numbers."""
    parts = [re.sub(r"\d+", "#", part.strip()) for part in re.split(r"(?<=[.\n])\s*", text)]
    return max(Counter(filter(None, parts)).values(), default=0) >= 3


def response_ends(model: Path, results: Path) -> dict[str, list[list[int]]]:
    """Return prompt and response ids before the end of each response, by kind of response."""
    tokenizer = load_tokenizer(model)
    ends: dict[str, list[list[int]]] = {"answer stated": [], "no answer stated": []}
    for sample in read_samples(results):
        if not is_cut(sample):
            prompt = tokenizer(sample["prompt"], add_special_tokens=False).input_ids
            kind = "answer stated" if states_answer(sample) else "no answer stated"
            ends[kind].append(prompt + sample["response_ids"][:-1])
    return ends


def exported(out: Path, model: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and HF folder of each model, the untouched one first."""
    yield "untouched model", model
    for name in VARIANTS:
        path = out / folder_name(name) / "model"
        if not path.exists():
            log = out / folder_name(name) / "export.log"
            core = min(os.sched_getaffinity(0))
            aropd("convert", "export", out / folder_name(name), path, core=core, log=log)
        yield name, path


def eos_probs(path: Path, ends: Mapping[str, list[list[int]]]) -> list[str]:
    """Return the mean P(EOS) at the ends of each kind of response, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    eos = load_tokenizer(path).eos_token_id
    cells = []
    for sequences in ends.values():
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0, -1] for ids in sequences]
        cells.append(f"{mean(float(row.softmax(-1)[eos]) for row in logits):.2f}")
    return cells


def line(results: Path, name: str, metrics: Sequence[dict]) -> list[str]:
    samples = read_samples(results)
    shares = [
        mean(sample["verdict"] == "right" for sample in samples),
        mean(is_cut(sample) for sample in samples),
        mean(is_cut(sample) and states_answer(sample) for sample in samples),
        mean(loops(sample["text"]) for sample in samples),
        mean(sample["text"].startswith(("To ", "Let")) for sample in samples),
    ]
    cells = [f"{100 * share:.0f}" for share in shares]
    cells.append(f"{mean(sample['length'] for sample in samples):.0f}")
    for steps in (metrics[:4], metrics[-4:]):
        ends = [step for step in steps if "eos_prob_target" in step]
        means = [
            mean(step[f"eos_prob_{role}"] for step in ends)
            for role in ("student", "target")
            if ends
        ]
        cells.append(" / ".join(f"{value:.2f}" for value in means) or "–")
    return [name, *cells]


if __name__ == "__main__":
    main()
