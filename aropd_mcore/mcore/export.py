"""A training checkpoint to an HF folder."""

import json
from pathlib import Path
from typing import Literal

import torch

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.mcore import checkpoint
from aropd_mcore.mcore.model import build_model
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.teacher import PREFIX
from aropd_mcore.mcore.weights import export_hf


def export_run(
    run: Path, out: Path, runtime: Runtime, *, weights: Literal["student", "teacher"] = "student"
) -> Path:
    """Write the student or the teacher of a run as an HF folder that transformers loads.

    Args:
        run: a run's output_dir (its newest checkpoint is taken), or one iter_NNNNNNN folder in it.
        out: must not exist.
        runtime: any layout, whatever layout trained the run.
    Returns:
        The checkpoint that was exported.
    Raises:
        CheckpointError: there is no checkpoint, it has no such weights, or `out` exists.
    Collectives: those of dist_checkpointing.load and export_hf.
    """
    path = run if run.name.startswith("iter_") else checkpoint.newest(run / "checkpoints")
    if path is None:
        raise CheckpointError(f"{run}: no checkpoint under {run / 'checkpoints'}")
    hf = path.resolve().parent.parent / "hf"
    if not (hf / "config.json").is_file():
        raise CheckpointError(f"{hf / 'config.json'}: missing; a run writes it when it starts")
    config = json.loads((hf / "config.json").read_text())
    trained_in = getattr(torch, config.get("dtype") or config["torch_dtype"])  # transformers 5, 4
    # A teacher's moving average may be kept in fp32.
    model = build_model(hf, runtime, dtype=torch.float32 if weights == "teacher" else trained_in)
    checkpoint.load_weights(path, model, prefix=PREFIX if weights == "teacher" else "")
    export_hf(model, hf, out, runtime, dtype=trained_in)
    return path
