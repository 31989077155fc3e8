"""`aropd serve`."""

import argparse

from aropd_mcore.cli.config_arguments import add_config_arguments, load

_DESCRIPTION = """\
Start the vLLM server that the run would start itself, in the foreground. The run finds it under
rollout.vllm.urls. The server asks for the key in $VLLM_API_KEY.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    add_config_arguments(parser, example="rollout.vllm.port=8000")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from aropd_mcore.rollout.vllm_process import serve

    serve(load(args))
