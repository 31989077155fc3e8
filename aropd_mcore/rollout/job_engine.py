"""Who samples for `aropd generate`: the model itself, or vLLM servers with its weights."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from aropd_mcore.convert.convert import export_hf
from aropd_mcore.convert.source import MegatronSource, Source
from aropd_mcore.mcore.model import StageModel, build_model
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weights import load_weights
from aropd_mcore.rollout.engine import RolloutEngine
from aropd_mcore.rollout.job import Job
from aropd_mcore.rollout.model_engine import model_engine
from aropd_mcore.rollout.on_first import on_first_rank
from aropd_mcore.rollout.vllm import VllmEngine
from aropd_mcore.rollout.vllm_process import Serving


def load_model(job: Job, runtime: Runtime, source: Source | None = None) -> StageModel:
    """This rank's shard of the job's model, or of another checkpoint of the same architecture.

    Collectives: those of the model's construction; every rank must call it.
    """
    model = build_model(job.source.hf_folder, runtime, dtype=runtime.dtype(job.dtype))
    load_weights(model, source or job.source, runtime)
    return model


@contextmanager
def engine_of(
    job: Job,
    runtime: Runtime,
    model: StageModel,
    *,
    eos_token_ids: Sequence[int],
    probe_ids: Sequence[int],
    longest_prompt: int,
    scratch: Path,
) -> Iterator[RolloutEngine]:
    """The job's engine, with the weights of its checkpoint; what it starts ends with the block.

    Args:
        model: of `load_model`.
        probe_ids: see VllmEngine.
        longest_prompt: tokens that vLLM servers make room for, before the response.
        scratch: folder for the servers' logs and, while they run, their weights.
    Raises:
        ValueError, OSError: what is wrong with the checkpoint or the engine's settings.
    Collectives: those of `sync`; every rank must call it.
    """
    if job.rollout.engine == "vllm":
        weights = _weights_folder(job, scratch)
        serving = _serving(job, model, weights, longest_prompt, scratch)
        engine = VllmEngine(
            model, runtime, serving, eos_token_ids=eos_token_ids, probe_ids=probe_ids
        )
    else:
        weights = None
        engine = model_engine(job.rollout, model, runtime, eos_token_ids=eos_token_ids)
    try:
        engine.sync(job.weight_version or 0)
        yield engine
    finally:
        engine.close()
        if weights is not None and runtime.rank == 0:
            shutil.rmtree(weights, ignore_errors=True)


def _weights_folder(job: Job, scratch: Path) -> Path:
    """This job's alone, also among those that others have below the same weights_dir."""
    if job.rollout.vllm.weights_dir is None:
        return scratch / "weights"
    name = hashlib.sha256(str(job.output.resolve()).encode()).hexdigest()[:16]
    return job.rollout.vllm.weights_dir / f"generate-{name}"


def _serving(
    job: Job, model: StageModel, weights: Path, longest_prompt: int, scratch: Path
) -> Serving:
    """What servers are started with: a whole HF folder, from which new weights take over."""
    path, vllm = job.source.hf_folder, job.rollout.vllm
    if isinstance(job.source, MegatronSource) and not vllm.urls:
        path = weights / "hf"
        dtype = model.config.params_dtype
        on_first_rank(partial(export_hf, job.source, path, dtype=dtype, overwrite=True))
    servers = vllm.model_copy(update={"weights_dir": weights})
    rollout = job.rollout.model_copy(update={"vllm": servers})
    return Serving(rollout, path, job.dtype, longest_prompt, scratch)
