"""`aropd launch`."""

import argparse
import sys

from aropd_mcore.cli.config_arguments import (
    add_config_arguments,
    config_words,
    load,
    print_comments,
    print_preset,
)
from aropd_mcore.cli.sampling_arguments import positive

_DESCRIPTION = """\
Submit a run to Slurm. The config, layout, data, weights and tokenizer are checked first, on this
machine. The job script is slurm/train.sbatch, or slurm/serve_and_train.sbatch with --vllm-nodes. In
the job, relative paths are relative to the current working directory. Arguments after `--` are
passed to sbatch unchanged. The head of slurm/common.sh lists the environment variables of the job
scripts.
"""
_EXAMPLES = """\
examples:
  %(prog)s run.yaml --nodes 4 --dry-run
  %(prog)s run.yaml --nodes 4 -- --partition=gpu --time=2-0
  %(prog)s run.yaml --nodes 6 --vllm-nodes 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_config_arguments(parser, example="optimizer.lr=1e-5")
    parser.add_argument(
        "--nodes", type=positive, default=1, metavar="N", help="number of nodes (default: 1)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=8,
        metavar="N",
        help="number of GPUs per node (default: %(default)s)",
    )
    parser.add_argument(
        "--vllm-nodes",
        type=int,
        default=0,
        metavar="N",
        help="number of nodes, among --nodes, that run vLLM servers (default: 0)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the sbatch command and the script; submit nothing",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from aropd_mcore.plan.layout import describe
    from aropd_mcore.trainer.slurm_launch import build_launch, check_inputs

    config = load(args)
    launch = build_launch(
        config,
        config_words(args),
        num_nodes=args.nodes,
        num_vllm_nodes=args.vllm_nodes,
        gpus_per_node=args.gpus_per_node,
        sbatch_options=args.sbatch_options,
    )
    layout, notes = launch.layout, check_inputs(config)
    print(f"# {layout.world_size} ranks: {describe(config.parallel, layout.data)}")
    print_preset(args, config)
    print_comments(notes)
    print(launch)
    if args.dry_run:
        print(f"# {launch.script}:\n{launch.script.read_text()}")
        return 0
    sys.stdout.flush()
    return launch.submit()
