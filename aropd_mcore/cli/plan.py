"""`aropd plan`."""

import argparse

from aropd_mcore.cli.config_arguments import add_config_arguments, load
from aropd_mcore.cli.sampling_arguments import positive

_DESCRIPTION = """\
Estimate a run from its config alone: parameters, memory by part and phase, time by part, pipeline
bubble, whether it fits, and what would make it fit.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    add_config_arguments(parser, example="parallel.tensor=4")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--nodes", type=positive, default=1, help="(default: %(default)s)")
    size.add_argument("--gpus", type=positive, help="in place of --nodes")
    parser.add_argument("--gpus-per-node", type=positive, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--memory", type=float, default=80.0, help="GB per GPU (default: %(default)s)"
    )
    parser.add_argument("--sweep", action="store_true", help="list the layouts that fit")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from aropd_mcore.plan.fit import build_planned_run
    from aropd_mcore.plan.render import render_plan, render_sweep

    run = build_planned_run(
        load(args),
        args.gpus or args.nodes * args.gpus_per_node,
        gpus_per_node=args.gpus_per_node,
        memory_bytes=args.memory * 1e9,
    )
    Console(soft_wrap=True).print(render_sweep(run) if args.sweep else render_plan(run))
