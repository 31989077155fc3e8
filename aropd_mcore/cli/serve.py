"""`aropd serve`."""

import argparse

from aropd_mcore.cli.config_arguments import add_config_arguments, load

_DESCRIPTION = """\
Start the vLLM server that the run would start itself, in the foreground. Put the server's address
into the run's rollout.vllm.urls. Requests to the server need the key in $VLLM_API_KEY.
"""
_EXAMPLES = """\
examples:
  VLLM_API_KEY=... %(prog)s run.yaml rollout.vllm.port=8000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add_config_arguments(parser, example="rollout.vllm.port=8000")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from aropd_mcore.rollout.vllm_process import serve

    serve(load(args))
