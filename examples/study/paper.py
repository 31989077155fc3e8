"""The paper's own setting: Qwen2.5-7B-Instruct, 10,000 rows, nine runs, seven benchmarks, on Slurm.

    python examples/study/paper.py train --rows rows.jsonl --model models/Qwen2.5-7B-Instruct \
        --dry-run -- --partition=gpu --account=me
    python examples/study/paper.py evaluate --benchmarks benchmarks --dry-run -- --partition=gpu

Without --dry-run the same commands submit: `train` a job of 8 H100 for each method of methods.MAIN,
`evaluate`, when they are done, one for each of their models and one for the base. With --dry-run
every config and layout is checked and every command printed; that needs neither GPUs nor weights.
What stands behind `--` goes to sbatch.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from methods import MAIN

from aropd_mcore.config_file import load_config
from aropd_mcore.evaluate.tasks import parse_task
from aropd_mcore.trainer.launch import check_inputs, launch_of

CONFIG = Path("examples/clusters/qwen2.5-7b-8xh100.yaml")
"""The reference settings of METHOD section 6 are the defaults; this adds the layout. Its model is a
config.json alone, enough for --dry-run."""
BENCHMARKS = {
    "math500:math": "math500.jsonl",
    "amc23:math": "amc23.jsonl",
    "humaneval:humaneval": "HumanEvalPlus.jsonl.gz",
    "mbpp:mbpp": "MbppPlus.jsonl",
    "gpqa:gpqa": "gpqa_diamond.jsonl",
    "medqa:choices": "medqa_test.jsonl",
    "medmcqa:medmcqa": "medmcqa_validation.jsonl",
}
"""NAME:FORMAT of `aropd eval` -> file. README.md says how far we know which seven the paper has."""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    own, for_sbatch = words, []
    if "--" in words:
        own, for_sbatch = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--methods", nargs="+", choices=list(MAIN), default=list(MAIN))
    shared.add_argument("--model", type=Path, default=load_config(CONFIG).model.path)
    shared.add_argument("--out", type=Path, default=Path("runs/paper"))
    shared.add_argument("--dry-run", action="store_true")
    commands = parser.add_subparsers(required=True, dest="command")
    train = commands.add_parser("train", parents=[shared])
    train.add_argument("--rows", type=Path, required=True, help="10,000 of them, for the paper")
    evaluate = commands.add_parser("evaluate", parents=[shared])
    evaluate.add_argument("--benchmarks", type=Path, required=True, help="folder of the files")
    args = parser.parse_args(own)
    if args.command == "train":
        return train_all(args, for_sbatch)
    return evaluate_all(args, for_sbatch)


def train_all(args: argparse.Namespace, for_sbatch: list[str]) -> int:
    """Check all runs, then submit them."""
    launches = []
    for method in args.methods:
        overrides = [
            f"output_dir={args.out / method}",
            f"model.path={args.model}",
            f"data.train=[{args.rows}]",
            *MAIN[method],
        ]
        config = load_config(CONFIG, overrides)
        if not args.dry_run and not launches:  # all runs read the same model and rows
            check_inputs(config)
        launch = launch_of(
            config,
            [str(CONFIG), *overrides],
            num_nodes=1,
            num_vllm_nodes=0,
            gpus_per_node=8,
            sbatch_options=for_sbatch,
        )
        launches.append(launch)
    for launch in launches:
        print(launch, flush=True)
        if not args.dry_run and launch.submit():
            return 1
    return 0


def evaluate_all(args: argparse.Namespace, for_sbatch: list[str]) -> int:
    """A job of one node for each model; it goes on where it stopped if it is submitted again."""
    tasks = [f"{name}={args.benchmarks / file}" for name, file in BENCHMARKS.items()]
    for task in tasks:
        path = parse_task(task).path
        if not args.dry_run and not path.is_file():
            raise SystemExit(f"{path}: no such file")
    models = {"base": args.model} | {method: args.out / method for method in args.methods}
    for name, model in models.items():
        command = [
            "aropd", "eval", "--model", model, "--out", args.out / "eval" / name,
            *(word for task in tasks for word in ("--task", task)),
            "--max-response-tokens", 1024, "--batch-size", 64, "--allow-code-execution",
        ]  # fmt: skip
        job = [
            "sbatch", f"--job-name=eval-{name}", "--nodes=1", "--gpus-per-node=8", "--exclusive",
            *for_sbatch, f"--wrap={shlex.join(map(str, command))}",
        ]  # fmt: skip
        print(shlex.join(job), flush=True)
        if not args.dry_run and subprocess.run(job).returncode:
            return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:  # of the user's making, and says so in a line
        sys.exit(f"paper.py: error: {error}")
