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
Check the config, its layout, data, weights and tokenizer here, then submit slurm/train.sbatch with
it, or slurm/serve_and_train.sbatch with --vllm-nodes. Relative paths are those of the working
directory, in the job too. Words after `--` go to sbatch as they are. The head of slurm/common.sh
lists the environment variables that the scripts read.
"""
_EXAMPLES = """\
examples:
  %(prog)s run.yaml --nodes 4 --dry-run
  %(prog)s run.yaml --nodes 4 -- --partition=gpu --time=2-0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_config_arguments(parser, example="optimizer.lr=1e-5")
    parser.add_argument("--nodes", type=positive, default=1, help="(default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--vllm-nodes", type=int, default=0, help="number of the nodes that serve (default: 0)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command and the script, submit nothing"
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
