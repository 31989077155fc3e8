"""Privileged on-policy distillation (AR-OPD, arXiv:2606.10385) on Megatron-Core.

    import aropd_mcore as aropd

    config = aropd.load_config("run.yaml", ["optimizer.lr=1e-5"])
    result = aropd.train(config)
    aropd.generate("runs/mine", prompts=["What is 2 + 3?"])

Importing the package imports neither torch nor Megatron; the functions do when they are called.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aropd_mcore.api import (
        CommandFailed,
        EvalSummary,
        Response,
        RunResult,
        diagnose,
        evaluate,
        generate,
        train,
    )
    from aropd_mcore.config import Config
    from aropd_mcore.config_file import load_config

__version__ = "0.2.0"
__all__ = [
    "CommandFailed",
    "Config",
    "EvalSummary",
    "Response",
    "RunResult",
    "diagnose",
    "evaluate",
    "generate",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    modules = {"Config": "config", "load_config": "config_file"}
    return getattr(importlib.import_module(f"{__name__}.{modules.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
