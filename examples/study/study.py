"""Train and evaluate each method with each seed. tables.py reads the results.

    python examples/study/study.py --seeds 0 1 2 3 4 --jobs 2
    python examples/study/study.py --methods full_opd partial_opd --seeds 0

The command makes what is missing: data, base model, the base model's answers under each view, and a
run for each method and seed. A finished run has a result.json. Rerun an interrupted command to
resume. The seed determines the order of the problems and all sampling. All runs start from the same
base model.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from make_data import LETTERS
from methods import ABLATIONS, MAIN, METHODS

from aropd_mcore.config_file import load_config
from aropd_mcore.data.answer_match import is_premature
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.evaluation.figures import read_metrics

if TYPE_CHECKING:
    from aropd_mcore.mcore.runtime import Runtime

HERE = Path(__file__).parent
CONFIG = HERE / "study.yaml"
ARITHMETIC = HERE.parent / "arithmetic"
DECODINGS = {"greedy": 0.0, "sampled": 1.0}
"""Temperatures of the answers to held-out problems."""
VIEWS = {"none": "heldout", "partial": "heldout-partial", "full": "heldout-full"}
"""File of problems by the view under which the base model answers them."""
NUM_LAST_STEPS = 10
"""Number of last steps over which a result averages training metrics."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = {"main": list(MAIN), "ablations": list(ABLATIONS)}
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--methods", nargs="+", choices=[*groups, *METHODS], default=list(groups), metavar="NAME"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of processes (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="additional overrides of all runs"
    )
    parser.add_argument(
        "--sizes", type=int, nargs=3, default=[300, 1200, 32000], metavar="N",
        help="numbers of held-out, training and pretraining rows (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--pretraining-steps", type=int, default=1000)
    args = parser.parse_args(argv)

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prepare(args.out, args.sizes, args.pretraining_steps)
    methods = [name for group in args.methods for name in groups.get(group, [group])]
    # Ordered by method: the runs of the main table come first.
    runs = [(args.out, method, seed, tuple(args.set)) for method in methods for seed in args.seeds]
    todo = [run for run in runs if not is_done(*run)]
    print(f"{len(todo)} of {len(runs)} runs to do", flush=True)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        args.jobs,
        mp_context=context,
        initializer=start_worker,
        initargs=(context.Value("i", 0),),
    )
    with pool:
        for number, done in enumerate(as_completed([pool.submit(make, *run) for run in todo]), 1):
            print(f"[{number}/{len(todo)}] {done.result()}", flush=True)


def prepare(out: Path, sizes: Sequence[int], pretraining_steps: int) -> None:
    """Make data, the base model, and its answers under each view, unless they exist."""
    if not (out / "base").exists():
        names = ("heldout", "train", "pretrain")
        counts = [
            word for name, n in zip(names, sizes, strict=True) for word in (f"--num-{name}", n)
        ]
        python(HERE / "make_data.py", out / "data", *counts)
        python(ARITHMETIC / "make_model.py", out / "random", "--hidden-size", 64)
        aropd(
            "train", HERE / "pretrain.yaml", f"output_dir={out / 'pretrain'}",
            f"model.path={out / 'random'}", f"data.train=[{out / 'data/pretrain.jsonl'}]",
            f"training.num_steps={pretraining_steps}",
        )  # fmt: skip
        aropd("convert", "export", out / "pretrain", out / "base")
    for decoding, temperature in DECODINGS.items():
        folder = out / f"base-{decoding}"
        if not (folder / "summary.json").exists():
            tasks = [f"--task={view}={out / 'data' / name}.jsonl" for view, name in VIEWS.items()]
            aropd(
                "eval", "--model", out / "base", "--config", CONFIG, "--out", folder, *tasks,
                "--temperature", temperature, "--max-response-tokens", 64, "--batch-size", 300,
            )  # fmt: skip


def aropd(*arguments: object) -> None:
    python("-m", "aropd_mcore.cli", *arguments)


def python(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    print(f"$ python {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, *words], check=True)


def run_folder(out: Path, method: str, seed: int) -> Path:
    return out / method / f"seed-{seed}"


def run_overrides(out: Path, method: str, seed: int, common: Sequence[str]) -> list[str]:
    return [
        f"output_dir={run_folder(out, method, seed)}",
        f"model.path={out / 'base'}",
        f"data.train=[{out / 'data/train.jsonl'}]",
        f"training.seed={seed}",
        *common,
        *METHODS[method],
    ]


def is_done(out: Path, method: str, seed: int, common: Sequence[str]) -> bool:
    """Return whether the run has a result.

    Raises:
        ValueError: the result belongs to a run with other settings.
    """
    path = run_folder(out, method, seed) / "result.json"
    if not path.exists():
        return False
    settings = load_config(CONFIG, run_overrides(out, method, seed, common)).model_dump(mode="json")
    if json.loads(path.read_text())["config"] != settings:
        raise ValueError(
            f"{path}: result of a run with other settings; remove the folder to run again"
        )
    return True


_runtime: list["Runtime"] = []
"""The worker process's runtime, reused by all its runs. Creating one costs more than a step."""


def start_worker(num_started: Any) -> None:
    """Bind this process to one core: graders start one process per available core."""
    with num_started.get_lock():
        number, num_started.value = num_started.value, num_started.value + 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})

    from aropd_mcore.mcore import runtime

    _runtime.append(runtime.start())


def make(out: Path, method: str, seed: int, common: Sequence[str]) -> str:
    """Train, evaluate at each temperature, and write result.json. Returns a line to print."""
    from aropd_mcore.trainer.loop import train

    started = time.monotonic()
    config = load_config(CONFIG, run_overrides(out, method, seed, common))
    folder = config.output_dir
    train(config, _runtime[0])
    trained = time.monotonic()
    result = {
        "method": method,
        "seed": seed,
        **{name: answers(out, folder, name, seed) for name in DECODINGS},
        "training": means(read_metrics(folder / "metrics.jsonl")[-NUM_LAST_STEPS:]),
        "seconds": {"train": trained - started, "evaluate": time.monotonic() - trained},
        "config": config.model_dump(mode="json"),
    }
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    shares = [f"{name} {means(result[name])['right']:.1%}" for name in DECODINGS]
    return f"{method}, seed {seed}: {', '.join(shares)}; {time.monotonic() - started:.0f} s"


def answers(out: Path, folder: Path, decoding: str, seed: int) -> list[dict[str, Any]]:
    """Answer and grade the held-out problems. Returns `measure_samples` of the answers."""
    from aropd_mcore.evaluation.run import build_evaluation, grade
    from aropd_mcore.evaluation.tasks import Task
    from aropd_mcore.rollout.generate import generate

    evaluation = build_evaluation(
        folder,
        [Task("heldout", out / "data/heldout.jsonl")],
        folder / f"eval-{decoding}",
        allow_code_execution=False,
        rollout={"temperature": DECODINGS[decoding], "max_response_tokens": 64, "batch_size": 300},
        parallel={},
        seed=seed,
    )
    if not evaluation.is_sampled:
        generate(evaluation.spec, _runtime[0])
    grade(evaluation)
    return measure_samples(folder / f"eval-{decoding}", out)["heldout"]


def measure_samples(evaluation: Path, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the measurements of each graded sample of held-out problems, by task."""
    tokenizer = load_tokenizer(out / "base")
    rows = [json.loads(line) for line in (out / "data/heldout.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (evaluation / "samples.jsonl").read_text().splitlines()]
    measurements: dict[str, list[dict[str, Any]]] = {}
    for number, sample in enumerate(samples):
        row = rows[number % len(rows)]
        num_operations = len(row["reasoning"].split())
        measurements.setdefault(sample["task"], []).append(
            {
                "num_operations": num_operations,
                "right": sample["verdict"] == "right",
                "length": sample["length"],
                # In both styles a step contains its letter.
                "skips": not set(LETTERS[:num_operations]) <= set(sample["text"]),
                "premature": is_premature(tokenizer, sample["response_ids"], row["answer"]),
            }
        )
    return measurements


def means(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the means of the keys that are numbers in all lines."""
    names = set.intersection(*(set(line) for line in lines))
    return {
        name: sum(line[name] for line in lines) / len(lines)
        for name in sorted(names)
        if not name.startswith("seconds") and all(line[name] is not None for line in lines)
    }


if __name__ == "__main__":
    main()
