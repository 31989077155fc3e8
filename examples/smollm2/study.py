"""Train and evaluate each method on each seed.

    python examples/smollm2/study.py base                    # data, warm start, base by view
    python examples/smollm2/study.py grid --jobs 2           # learning rates, on validation.jsonl
    python examples/smollm2/study.py runs --jobs 2 --lr 1e-5 # every method on every seed
    python examples/smollm2/study.py diagnoses --jobs 2      # the finished runs of seed 0

Each command makes what is missing: rerun an interrupted command to resume. A finished run has a
result.json. Each seed has its own training rows and held-out problems, and determines their order
and the sampling. All runs of a seed share the base model. A diagnosis is of responses to the seed's
held-out problems.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from methods import ABLATIONS, BASE, GRID, LOSSES, MAIN, METHODS, RATES

from aropd_mcore.config_file import dump_config, load_config
from aropd_mcore.data.answer_match import is_premature
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.templates import fill
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.views import View, ViewBuilder
from aropd_mcore.evaluation.figures import read_metrics

T = TypeVar("T")
HERE = Path(__file__).parent
CONFIG = HERE / "aropd.yaml"
DECODINGS = {"greedy": (0.0, 1), "sampled": (1.0, 2)}
"""Temperature and number of responses per problem."""
NUM_LAST_STEPS = 8
"""Number of last steps over which a result averages training metrics."""
DIAGNOSED_SEED = 0
"""Seed whose runs keep their checkpoints, of 2 GB each, until they are diagnosed."""
NUM_DIAGNOSED = 200
"""Largest number of problems in a diagnosis, with one response each."""
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    # The kernels of AVX2 on every CPU, so that other machines make the same base.
    "MKL_CBWR": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["base", "grid", "runs", "diagnoses"])
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*MAIN, *ABLATIONS])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates of `grid`"
    )
    parser.add_argument(
        "--lr", type=float, default=1e-5, help="learning rate of `runs` (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of runs at a time, one per core (default: 1)"
    )
    args = parser.parse_args(argv)
    if args.what == "base":
        make_base(args.out, args.model, args.seeds)
        return
    if not (args.out / "base").exists():
        raise ValueError(f"{args.out / 'base'}: no such folder; run `study.py base` first")
    if args.what == "grid":
        todo = [
            Run(args.out, f"grid/{method}-{rate:g}", method, 0, rate)
            for rate in args.rates
            for method in GRID
        ]
    else:
        todo = [  # ordered by seed: each finished seed is a complete comparison
            Run(args.out, f"{method}/seed-{seed}", method, seed, args.lr)
            for seed in args.seeds
            for method in args.methods
        ]
    if args.what == "diagnoses":
        # Groups of methods have other learning rates, so the settings are not compared here.
        finished = [run for run in todo if run.seed == DIAGNOSED_SEED and run.result.exists()]
        over_cores(Run.diagnose, [run for run in finished if not run.is_diagnosed], args.jobs)
        return
    over_cores(Run.make, [run for run in todo if not run.is_done], args.jobs)


class Run:
    """A method with a seed and a learning rate, and the folder of its result."""

    def __init__(self, out: Path, name: str, method: str, seed: int, lr: float):
        self.out, self.name, self.method, self.seed, self.lr = out, name, method, seed, lr
        self.folder = out / name
        self.result = self.folder / "result.json"
        self.is_grid = name.startswith("grid/")
        heldout = out / f"data/seed-{seed}/heldout.jsonl"
        self.problems = out / "data/validation.jsonl" if self.is_grid else heldout

    @property
    def overrides(self) -> list[str]:
        return [
            f"output_dir={self.folder}",
            f"model.path={self.out / 'base'}",
            f"data.train=[{self.out / f'data/seed-{self.seed}/train.jsonl'}]",
            f"training.seed={self.seed}",
            f"optimizer.lr={self.lr}",
            *METHODS[self.method],
        ]

    @property
    def is_done(self) -> bool:
        """Whether the run has a result.

        Raises:
            ValueError: the result belongs to a run with other settings.
        """
        path = self.result
        if not path.exists():
            return False
        settings = load_config(CONFIG, self.overrides).model_dump(mode="json")
        if json.loads(path.read_text())["config"] != settings:
            raise ValueError(f"{path}: result of a run with other settings; remove it to run again")
        return True

    @property
    def model(self) -> Path:
        return self.out / "base" if self.method == BASE else self.folder

    def train(self, core: int) -> None:
        words, log = ["train", CONFIG, *self.overrides], self.folder / "train.log"
        if self.method in LOSSES:
            python(HERE / "other_losses.py", self.method, *words, core=core, log=log)
        else:
            aropd(*words, core=core, log=log)

    def answers(self, decoding: str, core: int) -> list[dict[str, Any]]:
        return answers(self.model, self.folder, decoding, {"run": self.problems}, core)["run"]

    def make(self, core: int) -> str:
        """Train, answer the problems, write result.json, and return a line to print."""
        started = time.monotonic()
        training = {}
        if self.method != BASE:
            self.train(core)
            training = means(read_metrics(self.folder / "metrics.jsonl")[-NUM_LAST_STEPS:])
        trained = time.monotonic()
        result = {
            "method": self.method,
            "seed": self.seed,
            "lr": self.lr,
            **{name: self.answers(name, core) for name in DECODINGS},
            "training": training,
            "seconds": {"train": trained - started, "evaluate": time.monotonic() - trained},
            "base": file_hash(self.out / "base/model.safetensors"),
            "config": load_config(CONFIG, self.overrides).model_dump(mode="json"),
        }
        self.result.write_text(json.dumps(result) + "\n")
        if self.is_grid or self.seed != DIAGNOSED_SEED:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        shares = [f"{name} {means(result[name])['right']:.1%}" for name in DECODINGS]
        return f"{self.name}: {', '.join(shares)}; {time.monotonic() - started:.0f} s"

    @property
    def is_diagnosed(self) -> bool:
        return (self.folder / "diagnosis.json").exists()

    def diagnose(self, core: int) -> str:
        """Diagnose the run's model, write diagnosis.json, and return a line to print."""
        config = CONFIG if self.method == BASE else self.folder / "config.yaml"
        result = diagnosis(self.model, config, self.problems, self.folder, core)
        (self.folder / "diagnosis.json").write_text(json.dumps(result) + "\n")
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return f"{self.name}: diagnosed"


def over_cores(make: Callable[[T, int], str], items: Iterable[T], jobs: int) -> None:
    """Call make(item, core) for each item, `jobs` at a time, one per core. Prints the results."""
    todo = list(items)
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[:jobs]:
        cores.put(core)

    def call(item: T) -> str:
        core = cores.get()
        try:
            return make(item, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for number, done in enumerate(as_completed([pool.submit(call, it) for it in todo]), 1):
                print(f"[{number}/{len(todo)}] {done.result()}", flush=True)
        except BaseException:  # a call failed: cancel the calls that have not started
            pool.shutdown(cancel_futures=True)
            raise


def make_base(out: Path, model: Path, seeds: Sequence[int]) -> None:
    """Make the data, the base model, and its answers to the validation problems under each view."""
    core = min(os.sched_getaffinity(0))
    if not (out / "data").exists():
        words = [HERE / "problems.py", out / "data", "--seeds", *seeds]
        python(*words, core=core, log=out / "problems.log")
    if not (out / "base").exists():
        aropd(
            "train", HERE / "warm.yaml", f"output_dir={out / 'warm'}", f"model.path={model}",
            f"data.train=[{out / 'data/warm.jsonl'}]", core=core, log=out / "warm.log",
        )  # fmt: skip
        aropd("convert", "export", out / "warm", out / "base", core=core, log=out / "export.log")
    tasks = write_views(out, model)
    for name, path in {"untouched": model, "base": out / "base"}.items():
        for decoding in DECODINGS:
            samples_by_view = answers(path, out / "views" / name, decoding, tasks, core)
            (out / "views" / name / f"{decoding}.json").write_text(
                json.dumps(samples_by_view) + "\n"
            )
            for view, samples in samples_by_view.items():
                print(f"{name}, {decoding}, {view}: {means(samples)}", flush=True)
    for name, partial_view in ANCHORS.items():
        folder = out / "views" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        settings = load_config(CONFIG, [f"views.partial_view={partial_view}"])
        config.write_text(dump_config(settings))
        result = diagnosis(out / "base", config, out / "data/validation.jsonl", folder, core)
        (folder / "diagnosis.json").write_text(json.dumps(result) + "\n")
        print(f"{name}: {result['metrics']}", flush=True)


ANCHORS = {
    "anchor_without_answer": "prefix_without_answer",
    "anchor_with_answer": "prefix_with_answer",
}
"""views.partial_view by diagnosis of the base model."""

VIEWS: dict[str, tuple[View, str]] = {
    "none": ("student", "prefix_without_answer"),
    "partial": ("partial", "prefix_without_answer"),
    "partial_with_answer": ("partial", "prefix_with_answer"),
    "full": ("full", "prefix_without_answer"),
}
"""View and views.partial_view, by the name of a file of validation problems."""


def write_views(out: Path, model: Path) -> dict[str, Path]:
    """Write the validation problems under each view. Returns the files by name of the view."""
    settings, tokenizer = load_config(CONFIG).views, load_tokenizer(model)
    rows = RowDataset.load([out / "data/validation.jsonl"])[:]
    tasks = {}
    for name, (view, partial_view) in VIEWS.items():
        builder = ViewBuilder(tokenizer, settings.model_copy(update={"partial_view": partial_view}))
        tasks[name] = path = out / "data" / f"validation-{name}.jsonl"
        with path.open("w") as file:
            for row in rows:
                trace = builder.prompt(row, view).trace
                question = row.question
                if trace:
                    question = fill(settings.teacher_template, question=question, trace=trace)
                line = {"id": row.id, "question": question, "answer": row.answer}
                file.write(json.dumps(line) + "\n")
    return tasks


def answers(
    model: Path, out: Path, decoding: str, tasks: Mapping[str, Path], core: int
) -> dict[str, list[dict[str, Any]]]:
    """Answer the problems of each task. Returns the measurements of each response, by task."""
    folder = out / f"eval-{decoding}"
    temperature, num_samples = DECODINGS[decoding]
    if not (folder / "summary.json").exists():
        aropd(
            "eval", "--model", model, "--config", CONFIG, "--dtype", "fp32", "--out", folder,
            *(f"--task={name}:math={path}" for name, path in tasks.items()),
            "--temperature", temperature, "--samples", num_samples, "--batch-size", 100,
            "--max-response-tokens", load_config(CONFIG).rollout.max_response_tokens,
            core=core, log=out / f"eval-{decoding}.log",
        )  # fmt: skip
    rows = {
        (name, row["id"]): row
        for name, path in tasks.items()
        for row in map(json.loads, path.read_text().splitlines())
    }
    tokenizer = load_tokenizer(model if (model / "tokenizer.json").exists() else model / "hf")
    measurements: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        row = rows[sample["task"], sample["id"]]
        kind, num_steps, _ = row["id"].split("-")
        steps = sample["text"].split("The answer is")[0].strip().splitlines()
        measurements[sample["task"]].append(
            {
                "id": row["id"],
                "kind": kind,
                "num_steps": int(num_steps),
                "right": sample["verdict"] == "right",
                "length": sample["length"],
                "cut": sample["finish_reason"] == "length",
                "skips": len(steps) < int(num_steps) + 1,
                "premature": is_premature(tokenizer, sample["response_ids"], row["answer"]),
            }
        )
    return measurements


def diagnosis(model: Path, config: Path, problems: Path, out: Path, core: int) -> dict[str, Any]:
    """Diagnose the model on the problems. Returns the parts that a result keeps."""
    aropd(
        "diagnose", "--model", model, "--config", config, "--dtype", "fp32",
        "--data", problems, "--rows", NUM_DIAGNOSED, "--batch-size", 100, "--out", out / "diagnose",
        core=core, log=out / "diagnose.log",
    )  # fmt: skip
    (file,) = (out / "diagnose").glob("*.json")  # the name of a run's diagnosis has its step
    result = json.loads(file.read_text())
    return {name: result[name] for name in ("metrics", "tenths", "response_ends", "predictors")}


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def means(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means of the keys that are numbers in all lines."""
    names = [
        name
        for name in lines[0]
        if all(isinstance(line.get(name), (int, float)) for line in lines)
        and not name.startswith("seconds")
    ]
    return {name: round(sum(line[name] for line in lines) / len(lines), 6) for name in names}


def aropd(*arguments: object, core: int, log: Path) -> None:
    """Run an `aropd` command on one core, with its output in `log`."""
    python("-m", "aropd_mcore.cli", *arguments, core=core, log=log)


def python(*arguments: object, core: int, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *map(str, arguments)]
    with log.open("w") as file:
        done = subprocess.run(
            ["taskset", "-c", str(core), *words],
            env=ENVIRONMENT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        sys.exit(f"study.py: error: {' '.join(words)} failed; its output is in {log}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"study.py: error: {error}")
