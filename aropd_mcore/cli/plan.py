"""`aropd plan`."""

import argparse

from aropd_mcore.cli.config_arguments import add_config_arguments, load
from aropd_mcore.cli.sampling_arguments import positive

_DESCRIPTION = """\
Estimate memory and step time of a run from its config, without starting it. Prints the number of
parameters, memory by part and phase, time by part, and the pipeline bubble. States whether the run
fits the GPUs, and which settings would make it fit.
"""
_EXAMPLES = """\
examples:
  %(prog)s run.yaml --nodes 4
  %(prog)s run.yaml --gpus 64 --memory 141 parallel.tensor=4
  %(prog)s run.yaml --gpus 64 --sweep
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_config_arguments(parser, example="parallel.tensor=4")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--nodes", type=positive, default=1, metavar="N", help="number of nodes (default: 1)"
    )
    size.add_argument(
        "--gpus", type=positive, metavar="N", help="number of GPUs, in place of --nodes"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=positive,
        default=8,
        metavar="N",
        help="number of GPUs per node (default: %(default)s)",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=80.0,
        metavar="GB",
        help="memory per GPU in GB (default: %(default)s)",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="list all layouts that fit, in place of one estimate"
    )
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
