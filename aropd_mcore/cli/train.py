"""`aropd train`."""

import argparse
import faulthandler
import json
import os
import sys
from typing import TYPE_CHECKING

import psutil

from aropd_mcore.cli.config_arguments import (
    add_config_arguments,
    config_words,
    load,
    print_comments,
    print_preset,
)
from aropd_mcore.cli.ranks import (
    LocalRanks,
    add_num_processes_argument,
    local_ranks,
    visible_gpus,
)
from aropd_mcore.config import Config, ConfigError
from aropd_mcore.config_file import dump_config
from aropd_mcore.local_launch import PASSED_ON, SAVED
from aropd_mcore.locks import RunLock
from aropd_mcore.trainer.stop import StoppedEarly, Stops, job_deadline

if TYPE_CHECKING:
    from aropd_mcore.plan.layout import Layout

_DESCRIPTION = """\
Start a run, or resume it from its newest checkpoint. Under torchrun this process is one rank of the
job. Otherwise it starts one process per GPU. docs/checkpoints.md lists the exit codes.
"""
_EXAMPLES = """\
examples:
  %(prog)s run.yaml --dry-run
  %(prog)s run.yaml optimizer.lr=1e-5 output_dir=runs/lower
  %(prog)s run.yaml --preset reference --stop-before 3h55m
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_config_arguments(parser, example="optimizer.lr=1e-5")
    add_num_processes_argument(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, data, weights and output_dir, and print the plan; start nothing",
    )
    parser.add_argument(
        "--stop-before",
        metavar="TIME",
        help="save and exit with code 75 before the job has run for TIME, such as 3h55m (sets "
        "limits.stop_before)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from aropd_mcore.trainer.preflight import preflight

    if args.stop_before is not None:
        args.overrides.append(f"limits.stop_before={json.dumps(args.stop_before)}")
    config = load(args)
    ranks = local_ranks(args, config.parallel, config.rollout)
    layout = _plan(config, ranks)
    if args.dry_run:
        _print_plan(config, layout)
        if ranks.gpus is not None:
            print(f"# the ranks use GPUs {', '.join(ranks.gpus)}; vLLM servers use the others")
        print_preset(args, config)
        print_comments(preflight(config))
        return 0
    if ranks.is_this_process:
        return _train_here(config)
    # Rank 0 takes the lock. A check here refuses the run before its ranks take GPU memory that the
    # run in output_dir may need.
    RunLock(config.output_dir).close()
    return ranks.start(["train", *config_words(args)])


def _plan(config: Config, ranks: LocalRanks) -> "Layout":
    """Plan the job. If vLLM's GPUs leave too few, the error suggests another split of the GPUs."""
    from aropd_mcore.plan.gpu_share import suggest_share
    from aropd_mcore.plan.layout import plan

    try:
        return plan(config, int(os.environ.get("WORLD_SIZE", ranks.count)))
    except ConfigError as error:
        suggestion = suggest_share(config, visible_gpus()) if ranks.gpus is not None else None
        if suggestion is None:
            raise
        raise ConfigError(
            f"{error}. rollout.vllm.devices leaves {len(ranks.gpus or ())} GPUs to training. "
            f"{suggestion}"
        ) from error


def _train_here(config: Config) -> int:
    """Train in this process, which is one rank of the job or the whole job."""
    faulthandler.enable(2)  # NCCL aborts the process on timeouts: print the stack on stderr
    started = psutil.Process().create_time()
    stops = Stops(started=started, deadline=job_deadline(config.limits, started=started))
    with stops.listening(*PASSED_ON):
        from aropd_mcore.mcore import runtime
        from aropd_mcore.trainer.build import start_runtime
        from aropd_mcore.trainer.loop import TrainingStopped, train
        from aropd_mcore.trainer.watchdog import Watchdog

        here, code = start_runtime(config), 0
        with Watchdog(config.output_dir, stops, minutes=config.limits.watchdog_minutes):
            try:
                train(config, here, stops)
            except (TrainingStopped, StoppedEarly) as stopped:  # raised on all ranks
                code = SAVED if isinstance(stopped, StoppedEarly) else 3
                if here.rank == 0:
                    print(f"aropd: stopped: {stopped}", file=sys.stderr)
        if code in (0, SAVED):
            runtime.stop()
        return code


def _print_plan(config: Config, layout: "Layout") -> None:
    from aropd_mcore.plan.layout import describe

    training = config.training
    microbatches = f"{layout.microbatches_per_step} microbatches of {training.micro_batch_size}"
    if training.packing:
        microbatches = f"microbatches of up to {config.packed_tokens} tokens per view"
    print(dump_config(config))
    print(
        f"# {layout.world_size} processes: {describe(config.parallel, layout.data)}; "
        f"{layout.num_parameters:,} parameters\n"
        f"# per step: {config.prompts_per_step} prompts, {training.global_batch_size} responses, "
        f"{microbatches} on each data-parallel rank"
    )
