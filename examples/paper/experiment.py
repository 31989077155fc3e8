"""Run the experiment of the authors' release: three domains, six methods, one model per pair.

    python examples/paper/experiment.py prepare math NuminaMath-CoT/data/train-*.parquet
    python examples/paper/experiment.py mmlu mmlu/all/test-00000-of-00001.parquet --benchmarks DIR
    python examples/paper/experiment.py train --dry-run -- --partition=gpu --account=me
    python examples/paper/experiment.py evaluate --benchmarks DIR --dry-run -- --partition=gpu
    python examples/paper/experiment.py configs

    prepare   write the rows of a domain
    mmlu      write the benchmark MMLU-medical
    configs   write the files in configs/
    train     submit one Slurm job of two nodes per domain and method
    evaluate  submit one Slurm job of one node per trained model, and one per domain for the base
              model

`train` checks every config before the first job is submitted. With --dry-run, `train` and
`evaluate` only print the jobs, which needs neither GPUs nor weights. Arguments after `--` are
passed to sbatch. All paths are relative to the repository's root.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from textwrap import indent

from aropd_mcore.cli.sampling_arguments import positive
from aropd_mcore.config_file import load_config
from aropd_mcore.data.prepare import prepare, write_atomically
from aropd_mcore.data.records import DataError, read_records
from aropd_mcore.evaluation.tasks import parse_task
from aropd_mcore.trainer.slurm_launch import build_launch, check_inputs

CONFIGS = Path("examples/paper/configs")
RUNS = Path("runs/paper")
NUM_NODES, GPUS_PER_NODE = 2, 8
GLOBAL_BATCH_SIZE = 256

# The structure of the release's prompts. The wording is this project's.
THINK = "between <reasoning> and </reasoning>"
TEACHER = (
    "{question}\n\nAs an example, this is a complete response:\n\n{trace}\n\n"
    "Now respond in your own words. Write out your own reasoning too."
)


@dataclass(frozen=True)
class Domain:
    """A domain's data, prompts and benchmarks."""

    data_format: str
    """Argument of `aropd prepare --format`."""
    num_rows: int
    system_prompt: str
    teacher_template: str
    max_prompt_tokens: int
    max_response_tokens: int
    benchmarks: dict[str, str]
    """File name by NAME:FORMAT, as in `aropd eval --task`."""
    eval_tokens: int
    """Largest number of tokens of a response in evaluation."""
    eval_options: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        return self.num_rows // GLOBAL_BATCH_SIZE


DOMAINS = {
    "math": Domain(
        data_format="numina",
        num_rows=100_000,
        system_prompt=f"Solve the mathematics problem. Write your working {THINK}. Then write "
        "only the final number or expression between <answer> and </answer>.",
        teacher_template=TEACHER,
        max_prompt_tokens=2048,
        max_response_tokens=4096,
        benchmarks={"math500:math": "math500.jsonl", "amc23:math": "amc23.jsonl"},
        eval_tokens=1024,
    ),
    "code": Domain(
        data_format="code",
        num_rows=100_000,
        system_prompt=f"Write the program that the task asks for. Outline your approach {THINK}, "
        "with the cases that need care. Then write the complete program, in one code block, "
        "between <answer> and </answer>. Write nothing else.",
        teacher_template=TEACHER,
        max_prompt_tokens=2048,
        max_response_tokens=4096,
        benchmarks={
            "humaneval_plus:humaneval": "humanevalplus.jsonl",
            "mbpp_plus:mbpp": "mbppplus.parquet",
        },
        eval_tokens=1024,
        eval_options=("--allow-code-execution", "--code-asserts", "5"),
    ),
    "medical": Domain(
        data_format="medmcqa",
        num_rows=50_000,
        system_prompt=f"Answer the multiple-choice question on medicine. Explain {THINK} which "
        "facts decide it. Then write only the letter of the right choice between <answer> and "
        "</answer>.",
        teacher_template=TEACHER,
        max_prompt_tokens=2048,
        max_response_tokens=4096,
        benchmarks={
            "mmlu_medical:choices": "mmlu_medical.jsonl",
            "medqa:choices": "medqa_usmle_4_options.jsonl",
            "medmcqa:medmcqa": "medmcqa_validation.parquet",
        },
        eval_tokens=512,
    ),
}

METHODS = {
    "sft": "name: sft\nsft_prompt_loss: true\nreduction: token_mean\n",
    "full_opd": "name: aropd\nresidual_scale: 1.0\nresidual_clip: null\n",
    "partial_opd": "name: aropd\nresidual_scale: 0.0\nresidual_clip: 5.0\n",
    **{
        f"aropd_{scale}": f"name: aropd\nresidual_scale: {scale}\nresidual_clip: 5.0\n"
        for scale in (0.6, 0.8, 1.2)
    },
}
"""Settings that differ between the methods of a domain, except the warm-up of sft."""
DISTILLED = "divergence: kl_target_student\nreduction: sequence_mean_all\nskip_response_tokens: 3\n"

MMLU_MEDICAL = (
    *("anatomy", "clinical_knowledge", "college_biology", "college_medicine"),
    *("medical_genetics", "professional_medicine"),
)
"""The subjects of MMLU-medical, a part of MMLU with 1,089 questions."""

YAML = Template("""\
# Written by `python examples/paper/experiment.py configs`: change the table there.

output_dir: $runs/$name-$method

model:
  path: models/Qwen2.5-7B-Instruct
  dtype: bf16

data:
  train: [$runs/rows/$name.jsonl] # $num_rows rows: $num_steps steps

views:
  system_prompt: |-
$system_prompt
  student_template: "{question}"
  teacher_template: |-
$teacher_template
  trace_template: |-
    <reasoning>
    {reasoning}
    </reasoning>
    <answer>
    {answer}
    </answer>
  partial_view: prefix_with_answer
  partial_ratio: 0.5
  partial_cut: reference
  max_prompt_tokens: $max_prompt_tokens
  on_long_prompt: cut_chat

rollout:
  engine: native
  rollouts_per_prompt: 1
  max_response_tokens: $max_response_tokens
  temperature: 1.0
  top_p: 1.0
  batch_size: 64 # all responses of a replica in one step

objective:
$objective
teacher:
  kind: ema
  ema_rate: 0.01
  fp32_master: false # the average itself is bf16

optimizer: # AdamW
  lr: 2e-5
  beta1: 0.9
  beta2: 0.999
  weight_decay: 0.0
  schedule: cosine
  min_lr: 0.0
  warmup_ratio: $warmup_ratio
  clip_grad: 1.0

training:
  num_epochs: 1
  global_batch_size: $global_batch_size
  max_tokens_per_microbatch: 12288 # two prompts and responses of full length
  seed: 42

parallel: # 4 data-parallel ranks on 2 nodes of 8 x H100
  tensor: 4
  sequence: true

checkpoint:
  save_every_steps: 50
""")


def config_text(name: str, method: str) -> str:
    """Return the YAML of a domain and a method."""
    domain, is_sft = DOMAINS[name], method == "sft"
    objective = METHODS[method] + ("" if is_sft else DISTILLED)
    # The release's SFT has 10 warm-up steps. The half step prevents rounding down to 9.
    warmup = f"{10.5 / domain.num_steps:.4f} # 10 steps" if is_sft else "0.1"
    return YAML.substitute(
        runs=RUNS,
        name=name,
        method=method,
        num_rows=f"{domain.num_rows:,}",
        num_steps=domain.num_steps,
        system_prompt=_block(domain.system_prompt),
        teacher_template=_block(domain.teacher_template),
        max_prompt_tokens=domain.max_prompt_tokens,
        max_response_tokens=domain.max_response_tokens,
        objective=indent(objective, "  "),
        warmup_ratio=warmup,
        global_batch_size=GLOBAL_BATCH_SIZE,
    )


def _block(text: str) -> str:
    return indent(text, "    ", lambda line: bool(line.strip()))


def config_path(name: str, method: str) -> Path:
    return CONFIGS / name / f"{method}.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    own, for_sbatch = words, []
    if "--" in words:
        own, for_sbatch = words[: words.index("--")], words[words.index("--") + 1 :]
    args = _parser().parse_args(own)
    match args.command:
        case "configs":
            for name in DOMAINS:
                for method in METHODS:
                    config_path(name, method).parent.mkdir(parents=True, exist_ok=True)
                    config_path(name, method).write_text(config_text(name, method))
        case "prepare":
            domain, rows = DOMAINS[args.domain], RUNS / "rows" / f"{args.domain}.jsonl"
            size = args.rows or domain.num_rows
            print(prepare(args.files, rows, format=domain.data_format, num_rows=size))
        case "mmlu":
            path = args.benchmarks / DOMAINS["medical"].benchmarks["mmlu_medical:choices"]
            write_atomically(path, mmlu_medical(args.file))
            print(path)
        case "train":
            return train_all(args, for_sbatch)
        case "evaluate":
            return evaluate_all(args, for_sbatch)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = argparse.ArgumentParser(add_help=False)
    jobs.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    jobs.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    jobs.add_argument(
        "--model",
        type=Path,
        default=Path("models/Qwen2.5-7B-Instruct"),
        help="HF folder; with --dry-run its config.json is sufficient (default: %(default)s)",
    )
    jobs.add_argument("--dry-run", action="store_true", help="print the jobs; submit nothing")
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("configs", help="write the files in configs/")
    rows = commands.add_parser("prepare", help="write a domain's rows")
    rows.add_argument("domain", choices=list(DOMAINS))
    rows.add_argument("files", nargs="+", type=Path, help="files of the data set, as on the Hub")
    rows.add_argument(
        "--rows", type=positive, help="number of rows to write (default: the release's number)"
    )
    mmlu = commands.add_parser("mmlu", help="write the benchmark MMLU-medical")
    mmlu.add_argument("file", type=Path, help="test split of cais/mmlu, configuration `all`")
    commands.add_parser("train", parents=[jobs], help="submit the training runs")
    evaluate = commands.add_parser("evaluate", parents=[jobs], help="submit the evaluations")
    for command in (mmlu, evaluate):
        command.add_argument(
            "--benchmarks", type=Path, required=True, help="folder of the benchmarks"
        )
    return parser


def mmlu_medical(path: Path) -> Iterator[str]:
    """Yield the records of the subjects MMLU_MEDICAL as JSONL lines.

    Raises:
        DataError: a record cannot be read, or a subject has no questions.
    """
    missing = set(MMLU_MEDICAL)
    for _, record in read_records(path):
        if isinstance(record, DataError):
            raise record
        if record.get("subject") in MMLU_MEDICAL:
            missing.discard(record["subject"])
            yield json.dumps(record) + "\n"
    if missing:
        raise DataError(str(path), f"no questions of the subjects {', '.join(sorted(missing))}")


def train_all(args: argparse.Namespace, for_sbatch: list[str]) -> int:
    """Check all runs, then submit them."""
    launches = []
    for name in args.domains:
        for method in args.methods:
            arguments = [str(config_path(name, method)), f"model.path={args.model}"]
            config = load_config(Path(arguments[0]), arguments[1:])
            if (
                not args.dry_run and method == args.methods[0]
            ):  # all runs of a domain read the same rows
                check_inputs(config)
            launch = build_launch(
                config,
                arguments,
                num_nodes=NUM_NODES,
                num_vllm_nodes=0,
                gpus_per_node=GPUS_PER_NODE,
                sbatch_options=for_sbatch,
            )
            launches.append(launch)
    for launch in launches:
        print(launch, flush=True)
        if not args.dry_run and launch.submit():
            return 1
    return 0


def evaluate_all(args: argparse.Namespace, for_sbatch: list[str]) -> int:
    """Submit one job of one node per model. A job that is submitted again resumes."""
    if not args.dry_run and shutil.which("sbatch") is None:
        raise SystemExit("sbatch is not on PATH: run this on a login node, or add --dry-run")
    for name in args.domains:
        domain = DOMAINS[name]
        tasks = [f"{task}={args.benchmarks / file}" for task, file in domain.benchmarks.items()]
        for task in tasks:
            path = parse_task(task).path
            if not args.dry_run and not path.is_file():
                raise SystemExit(f"{path}: no such file; README.md lists the benchmarks' files")
        models = {"base": args.model} | {m: RUNS / f"{name}-{m}" for m in args.methods}
        for method, model in models.items():
            # The config has the views, which are the same for all methods of a domain.
            config = config_path(name, "sft")
            command = [
                "aropd", "eval", "--model", model, "--config", config,
                "--out", RUNS / "eval" / f"{name}-{method}",
                *(word for task in tasks for word in ("--task", task)),
                "--max-response-tokens", domain.eval_tokens, "--batch-size", 64,
                *domain.eval_options,
            ]  # fmt: skip
            job = [
                "sbatch", f"--job-name=eval-{name}-{method}", "--nodes=1",
                f"--gpus-per-node={GPUS_PER_NODE}", "--exclusive", *for_sbatch,
                f"--wrap={shlex.join(map(str, command))}",
            ]  # fmt: skip
            print(shlex.join(job), flush=True)
            if not args.dry_run and subprocess.run(job).returncode:
                return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"experiment.py: error: {error}")
