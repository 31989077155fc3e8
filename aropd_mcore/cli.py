"""The `aropd` command: parse, call, print."""

import argparse
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from aropd_mcore import __version__, lifetime
from aropd_mcore.config import Config, ParallelConfig
from aropd_mcore.config_file import PRESETS, dump_config, load_config, preset_changes
from aropd_mcore.convert.commands import add_commands
from aropd_mcore.evaluation import arguments as eval_arguments
from aropd_mcore.evaluation import diagnose_arguments
from aropd_mcore.local_launch import PASSED_ON, SAVED, start_ranks
from aropd_mcore.locks import RunLock
from aropd_mcore.rollout.arguments import add_arguments, job_of_arguments, positive
from aropd_mcore.trainer.stop import StoppedEarly, Stops, deadline_of

if TYPE_CHECKING:
    from aropd_mcore.evaluation.run import Evaluation
    from aropd_mcore.mcore.runtime import Runtime
    from aropd_mcore.plan.layout import Layout


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; an error that the user can mend is printed without a traceback.

    Args:
        argv: None: this process is the command, and as a rank it ends with its launcher.
    """
    if argv is None:
        lifetime.end_with_launcher()
    args = _parse(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        # Every rank says its own: what only one of them met, nobody else would.
        rank = int(os.environ.get("RANK", "0"))
        print(f"aropd: error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aropd: interrupted", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    own, for_sbatch = argv, []
    if argv[:1] == ["launch"] and "--" in argv:
        own, for_sbatch = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args, rest = parser.parse_known_args(own)
    args.argv, args.sbatch_options = argv, for_sbatch
    if args.run in (_train, _plan, _serve, _launch):
        # argparse takes the overrides before the first option, and hands back those behind it.
        late = [text for text in rest if "=" in text and not text.startswith("-")]
        args.overrides += late
        rest = [text for text in rest if text not in late]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aropd", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="make rows from published data formats")
    prepare.add_argument("inputs", nargs="+", type=Path, help="JSONL or Parquet files")
    prepare.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    prepare.add_argument(
        "--format",
        default="auto",
        help="of the inputs, such as numina or code (default: by the keys of each record)",
    )
    prepare.add_argument(
        "--rows",
        type=positive,
        metavar="N",
        help="write N rows, drawn at random from the usable ones (default: all of them)",
    )
    prepare.add_argument("--seed", type=int, default=1234, help="of --rows (default: %(default)s)")
    prepare.set_defaults(run=_prepare)

    show = commands.add_parser("show-views", help="print the three views of a row")
    show.add_argument("data", type=Path, help="JSONL or Parquet file of rows")
    show.add_argument("--row", type=int, default=0, help="counted from 0 (default: %(default)s)")
    source = show.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="YAML file of a run: its tokenizer and views")
    source.add_argument("--model", type=Path, help="HF folder: its tokenizer, default views")
    _add_preset(show)
    show.set_defaults(run=_show_views)

    train = commands.add_parser(
        "train",
        help="train, or go on with a run",
        description="Train a run, or go on with it from its newest checkpoint. Under torchrun "
        "this process is one rank of the job; otherwise it starts the processes itself.",
    )
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument("overrides", nargs="*", help="such as optimizer.lr=1e-5")
    _add_preset(train)
    _add_num_processes(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, data, weights and output_dir, print the plan, start nothing",
    )
    train.add_argument(
        "--stop-before",
        metavar="TIME",
        help="save and exit with 75 before the job is this old, such as 3h55m (limits.stop_before)",
    )
    train.set_defaults(run=_train)

    plan = commands.add_parser(
        "plan",
        help="memory and time of a run, before it is launched",
        description="From the config alone: parameters, memory by part and phase, time by part, "
        "pipeline bubble, whether it fits, and what would make it fit.",
    )
    plan.add_argument("config", type=Path, help="YAML file")
    plan.add_argument("overrides", nargs="*", help="such as parallel.tensor=4")
    _add_preset(plan)
    size = plan.add_mutually_exclusive_group()
    size.add_argument("--nodes", type=positive, default=1, help="(default: %(default)s)")
    size.add_argument("--gpus", type=positive, help="in place of --nodes")
    plan.add_argument("--gpus-per-node", type=positive, default=8, help="(default: %(default)s)")
    plan.add_argument("--memory", type=float, default=80.0, help="GB a GPU (default: %(default)s)")
    plan.add_argument("--sweep", action="store_true", help="the layouts that fit, fastest first")
    plan.set_defaults(run=_plan)

    launch = commands.add_parser(
        "launch",
        help="submit a run to Slurm",
        description="Check the config, its layout, data, weights and tokenizer here, then submit "
        "slurm/train.sbatch with it, or slurm/serve_and_train.sbatch with --vllm-nodes. Relative "
        "paths are those of the working directory, in the job too. What follows `--` goes to "
        "sbatch as it is: aropd launch run.yaml --nodes 4 -- --partition=gpu --time=2-0. The head "
        "of "
        "slurm/common.sh lists what the environment may say.",
    )
    launch.add_argument("config", type=Path, help="YAML file")
    launch.add_argument("overrides", nargs="*", help="such as optimizer.lr=1e-5")
    _add_preset(launch)
    launch.add_argument("--nodes", type=positive, default=1, help="(default: %(default)s)")
    launch.add_argument("--gpus-per-node", type=int, default=8, help="(default: %(default)s)")
    launch.add_argument(
        "--vllm-nodes", type=int, default=0, help="of the nodes, those that serve (default: 0)"
    )
    launch.add_argument(
        "--dry-run", action="store_true", help="print the command and the script, submit nothing"
    )
    launch.set_defaults(run=_launch)

    serve = commands.add_parser(
        "serve",
        help="start a vLLM server for a run by hand",
        description="The server that the run would start itself, in the foreground; the run finds "
        "it under rollout.vllm.urls. It asks for the key in $VLLM_API_KEY.",
    )
    serve.add_argument("config", type=Path, help="YAML file")
    serve.add_argument("overrides", nargs="*", help="such as rollout.vllm.port=8000")
    _add_preset(serve)
    serve.set_defaults(run=_serve)

    generate = commands.add_parser("generate", help="responses of any checkpoint, as JSONL")
    add_arguments(generate)
    _add_num_processes(generate)
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser("eval", help="accuracy of any checkpoint on local benchmarks")
    eval_arguments.add_arguments(evaluate)
    _add_num_processes(evaluate)
    evaluate.set_defaults(run=_eval)

    diagnose = commands.add_parser("diagnose", help="what the teacher's two views say of responses")
    diagnose_arguments.add_arguments(diagnose)
    _add_num_processes(diagnose)
    diagnose.set_defaults(run=_diagnose)

    report = commands.add_parser("report", help="runs, as one HTML page to look around in")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    report.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE")
    report.set_defaults(run=_report)

    convert = commands.add_parser("convert", help="checkpoints from and to HF folders")
    add_commands(convert.add_subparsers(required=True, metavar="COMMAND"))
    return parser


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"settings of a method, over the YAML file and under overrides: {', '.join(PRESETS)}; "
        "aropd_mcore/presets/NAME.yaml states what each reproduces",
    )


def _load_config(args: argparse.Namespace) -> Config:
    return load_config(args.config, args.overrides, preset=args.preset)


def _run_arguments(args: argparse.Namespace) -> list[str]:
    """Arguments with which another process loads the same configuration."""
    preset = ["--preset", args.preset] if args.preset else []
    return [str(args.config), *preset, *args.overrides]


def _print_preset(args: argparse.Namespace, config: Config) -> None:
    if args.preset:
        changes = preset_changes(args.config, args.preset, config)
        _print_found(f"preset {args.preset}: {line}" for line in changes or ["changes nothing"])


def _add_num_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        help="processes to start (default: one a GPU; without GPUs one model replica's)",
    )


def _prepare(args: argparse.Namespace) -> None:
    from aropd_mcore.data.prepare import prepare

    print(prepare(args.inputs, args.output, format=args.format, num_rows=args.rows, seed=args.seed))


def _show_views(args: argparse.Namespace) -> None:
    from rich.console import Console

    from aropd_mcore.config import ViewsConfig
    from aropd_mcore.data.dataset import RowDataset
    from aropd_mcore.data.show import render_views
    from aropd_mcore.data.tokenizer import load_tokenizer
    from aropd_mcore.data.views import ViewBuilder

    if args.preset and not args.config:
        raise ValueError("--preset changes the views of a run: give --config in place of --model")
    config = load_config(args.config, preset=args.preset) if args.config else None
    views = config.views if config else ViewsConfig()
    rows = RowDataset.load([args.data])
    if not 0 <= args.row < len(rows):
        raise ValueError(f"{args.data}: has rows 0 to {len(rows) - 1}, found --row {args.row}")
    builder = ViewBuilder(load_tokenizer(config.model.path if config else args.model), views)
    Console().print(render_views(builder, rows[args.row]))


def _plan(args: argparse.Namespace) -> None:
    from rich.console import Console

    from aropd_mcore.plan.fit import build_generation_spec
    from aropd_mcore.plan.render import render_plan, render_sweep

    job = build_generation_spec(
        _load_config(args),
        args.gpus or args.nodes * args.gpus_per_node,
        gpus_per_node=args.gpus_per_node,
        memory_bytes=args.memory * 1e9,
    )
    Console(soft_wrap=True).print(render_sweep(job) if args.sweep else render_plan(job))


def _train(args: argparse.Namespace) -> int:
    from aropd_mcore.plan.layout import plan
    from aropd_mcore.trainer.preflight import preflight

    if args.stop_before is not None:
        args.overrides.append(f"limits.stop_before={json.dumps(args.stop_before)}")
    config = _load_config(args)
    num_local = args.nproc_per_node or _default_num_processes(config.parallel)
    layout = plan(config, int(os.environ.get("WORLD_SIZE", num_local)))
    if args.dry_run:
        _print_plan(config, layout)
        _print_preset(args, config)
        _print_found(preflight(config))
        return 0
    if "RANK" in os.environ or num_local == 1:
        return _train_here(config)
    # Rank 0 takes the lock. A check here refuses the run before its ranks take GPU memory that the
    # run in output_dir may need.
    RunLock(config.output_dir).close()
    return start_ranks(num_local, ["train", *_run_arguments(args)])


def _train_here(config: Config) -> int:
    """As one rank of the job, or all of it."""
    faulthandler.enable(2)  # NCCL's own time-outs and crashes abort: say where, on stderr
    started = psutil.Process().create_time()
    stops = Stops(started=started, deadline=deadline_of(config.limits, started=started))
    with stops.listening(*PASSED_ON):
        code = _train_until(config, stops)
    if "RANK" in os.environ:
        for number in PASSED_ON:  # torchrun ends whoever is still here when the first has left
            signal.signal(number, signal.SIG_IGN)
    return code


def _train_until(config: Config, stops: Stops) -> int:
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.loop import TrainingStopped, train
    from aropd_mcore.trainer.watchdog import Watchdog

    here, code = start_runtime(config), 0
    with Watchdog(config.output_dir, stops, minutes=config.limits.watchdog_minutes):
        try:
            train(config, here, stops)
        except (TrainingStopped, StoppedEarly) as stopped:  # on every rank alike
            code = SAVED if isinstance(stopped, StoppedEarly) else 3
            if here.rank == 0:
                print(f"aropd: stopped: {stopped}", file=sys.stderr)
    if code in (0, SAVED):
        runtime.stop(leave_job=True)
    return code


def _launch(args: argparse.Namespace) -> int:
    from aropd_mcore.plan.layout import describe
    from aropd_mcore.trainer.slurm_launch import build_launch, check_inputs

    config = _load_config(args)
    launch = build_launch(
        config,
        _run_arguments(args),
        num_nodes=args.nodes,
        num_vllm_nodes=args.vllm_nodes,
        gpus_per_node=args.gpus_per_node,
        sbatch_options=args.sbatch_options,
    )
    layout, found = launch.layout, check_inputs(config)
    print(f"# {layout.world_size} ranks: {describe(config.parallel, layout.data)}")
    _print_preset(args, config)
    _print_found(found)
    print(launch)
    if args.dry_run:
        print(f"# {launch.script}:\n{launch.script.read_text()}")
        return 0
    sys.stdout.flush()
    return launch.submit()


def _serve(args: argparse.Namespace) -> None:
    from aropd_mcore.rollout.vllm_process import serve

    serve(_load_config(args))


def _print_plan(config: Config, layout: "Layout") -> None:
    from aropd_mcore.plan.layout import describe

    training = config.training
    microbatches = f"{layout.microbatches_per_step} microbatches of {training.micro_batch_size}"
    if training.packing:
        microbatches = f"microbatches of up to {training.max_tokens_per_microbatch} tokens a view"
    print(dump_config(config))
    print(
        f"# {layout.world_size} processes: {describe(config.parallel, layout.data)}; "
        f"{layout.num_parameters:,} parameters\n"
        f"# a step: {config.prompts_per_step} prompts, {training.global_batch_size} responses, "
        f"{microbatches} on each data-parallel rank"
    )


def _print_found(found: Iterable[str]) -> None:
    """Print what a check found, as comments below the YAML or the command that it belongs to."""
    print("".join(f"# {line}\n" for text in found for line in text.splitlines()), end="")


def _generate(args: argparse.Namespace) -> int:
    job = job_of_arguments(args)
    return _as_ranks(args, job, lambda: _generate_here(job))


def _as_ranks(args: argparse.Namespace, job: "Job", work: Callable[[], int]) -> int:
    """This process's part of a job that samples, or start the processes of it."""
    from aropd_mcore.plan.layout import replica_size

    num_local = args.nproc_per_node or _default_num_processes(job.parallel)
    num_all = int(os.environ.get("WORLD_SIZE", num_local))
    if num_all % replica_size(job.parallel):
        raise ValueError(
            f"{num_all} processes cannot share the model in that layout; expected a multiple of "
            f"{replica_size(job.parallel)}"
        )
    if "RANK" in os.environ or num_local == 1:
        return work()
    return start_ranks(num_local, args.argv)


def _generate_here(job: "Job") -> int:
    from aropd_mcore.rollout.generate import generate

    stopped = _sampling_here(job, lambda here: generate(job, here))
    if not stopped and int(os.environ.get("RANK", "0")) == 0:
        print(f"{job.prompts} -> {job.output}")
    return stopped


def _sampling_here(job: "Job", work: "Callable[[Runtime], None]") -> int:
    """This rank's part of work that samples; 3 where nobody is left who could."""
    from aropd_mcore.mcore import runtime
    from aropd_mcore.rollout.engine import RolloutFailed
    from aropd_mcore.rollout.generate import start_runtime

    here = start_runtime(job)
    try:
        work(here)
    except RolloutFailed as failed:
        if here.rank == 0:
            print(f"aropd: stopped: {failed}\nThe same command goes on.", file=sys.stderr)
        return 3
    runtime.stop(leave_job=True)
    return 0


def _diagnose(args: argparse.Namespace) -> int:
    request = diagnose_arguments.diagnosis_of_arguments(args)
    return _as_ranks(args, request.job, lambda: _diagnose_here(request))


def _diagnose_here(request: "Diagnosis") -> int:
    from aropd_mcore.evaluation.diagnose.score import diagnose

    stopped = _sampling_here(request.job, lambda here: diagnose(request, here))
    if not stopped and int(os.environ.get("RANK", "0")) == 0:
        print(f"{request.job.prompts} -> {request.job.output}")
    return stopped


def _report(args: argparse.Namespace) -> None:
    from aropd_mcore.evaluation.report import write_report

    print(write_report(args.runs, args.out))


def _eval(args: argparse.Namespace) -> int:
    evaluation = eval_arguments.evaluation_of_arguments(args)
    if evaluation.is_sampled:
        return _grade_here(evaluation)
    return _as_ranks(
        args, evaluation.job, lambda: _generate_here(evaluation.job) or _grade_here(evaluation)
    )


def _grade_here(evaluation: "Evaluation") -> int:
    from rich.console import Console

    from aropd_mcore.evaluation.run import grade
    from aropd_mcore.evaluation.summary import tables

    if int(os.environ.get("RANK", "0")) == 0:
        if evaluation.not_isolated:
            print(
                f"aropd: the sandbox for code has no namespaces here ({evaluation.not_isolated}): "
                "the model's code can reach the network, and files that are not its own",
                file=sys.stderr,
            )
        Console(soft_wrap=True).print(*tables(grade(evaluation)), sep="\n")
    return 0


def _default_num_processes(parallel: ParallelConfig) -> int:
    import torch

    from aropd_mcore.plan.layout import replica_size

    return torch.cuda.device_count() if torch.cuda.is_available() else replica_size(parallel)


if __name__ == "__main__":
    sys.exit(main())
