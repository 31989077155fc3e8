"""Builders of rollout engines, for training and for `aropd generate`."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from aropd_mcore.config import ConfigError, RolloutConfig
from aropd_mcore.convert.import_export import export_hf
from aropd_mcore.convert.source import HFSource, Source
from aropd_mcore.mcore.cached_attention import KVCache
from aropd_mcore.mcore.model import StageModel, build_model
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weights import load_weights
from aropd_mcore.rollout.engine import RolloutEngine, never
from aropd_mcore.rollout.generation_spec import GenerationSpec
from aropd_mcore.rollout.native import NativeEngine
from aropd_mcore.rollout.vllm import VllmEngine
from aropd_mcore.rollout.vllm_process import Serving

PROBE_TOKENS = 128
"""Largest number of tokens of a probe, which shows that an engine has the current weights."""


def build_engine(
    serving: Serving,
    model: StageModel,
    runtime: Runtime,
    *,
    eos_token_ids: Sequence[int],
    probe_ids: Sequence[int],
    cache: KVCache | None = None,
    should_stop: Callable[[], bool] = never,
) -> RolloutEngine:
    """Build the engine that serving.rollout.engine names. Call `update_weights` next.

    Args:
        serving: settings of the engine and of the servers that it starts.
        model: this rank's shard, without DDP around it.
        eos_token_ids: any of them ends a response.
        probe_ids: see VllmEngine.
        cache: see NativeEngine.
        should_stop: polled while responses are sampled. If it returns True, `result` returns early,
            and the caller must discard the result.
    Raises:
        ConfigError: the engine cannot run on this machine.
    """
    rollout = serving.rollout
    match rollout.engine:
        case "native":
            return build_native(
                rollout,
                model,
                runtime,
                eos_token_ids=eos_token_ids,
                cache=cache,
                should_stop=should_stop,
            )
        case "vllm":
            return VllmEngine(
                model,
                runtime,
                serving,
                eos_token_ids=eos_token_ids,
                probe_ids=probe_ids,
                should_stop=should_stop,
            )


def build_native(
    rollout: RolloutConfig,
    model: StageModel,
    runtime: Runtime,
    *,
    eos_token_ids: Sequence[int],
    cache: KVCache | None = None,
    should_stop: Callable[[], bool] = never,
) -> NativeEngine:
    """Build the native engine with the batch and cache sizes of the settings; see NativeEngine."""
    return NativeEngine(
        model,
        runtime,
        eos_token_ids=eos_token_ids,
        batch_size=rollout.batch_size,
        kv_cache_tokens=rollout.kv_cache_tokens,
        cuda_graphs=rollout.cuda_graphs,
        cache=cache,
        should_stop=should_stop,
    )


def load_generation_model(
    spec: GenerationSpec, runtime: Runtime, source: Source | None = None
) -> StageModel:
    """Build this rank's shard of the job's model and load its weights.

    Args:
        source: checkpoint of the same architecture to load instead of spec.source.

    Collectives: those of the model's construction; every rank must call it.
    """
    model = build_model(spec.source.hf_folder, runtime, dtype=runtime.dtype(spec.dtype))
    load_weights(model, source or spec.source, runtime)
    return model


@contextmanager
def generation_engine(
    spec: GenerationSpec,
    runtime: Runtime,
    model: StageModel,
    *,
    eos_token_ids: Sequence[int],
    probe_ids: Sequence[int],
    longest_prompt: int,
    scratch: Path,
) -> Iterator[RolloutEngine]:
    """Build the job's engine with the weights of its checkpoint, and close it at the end.

    Args:
        model: result of `load_generation_model`.
        probe_ids: see VllmEngine.
        longest_prompt: number of prompt tokens that vLLM servers make room for.
        scratch: folder for the servers' logs and, while they run, their weights.
    Raises:
        ValueError, OSError: the checkpoint or the engine's settings cannot be used.
    Collectives: those of `update_weights`; every rank must call it.
    """
    weights = _weights_folder(spec, scratch)
    engine = build_engine(
        _serving(spec, model, weights, longest_prompt, scratch),
        model,
        runtime,
        eos_token_ids=eos_token_ids,
        probe_ids=probe_ids,
    )
    try:
        engine.update_weights(spec.weight_version or 0)
        yield engine
    finally:
        engine.close()
        if runtime.rank == 0:
            shutil.rmtree(weights, ignore_errors=True)


def _weights_folder(spec: GenerationSpec, scratch: Path) -> Path:
    """Return the folder of the servers' weights. Jobs that share a weights_dir get one each."""
    if spec.rollout.vllm.weights_dir is None:
        return scratch / "weights"
    name = hashlib.sha256(str(spec.output.resolve()).encode()).hexdigest()[:16]
    return spec.rollout.vllm.weights_dir / f"generate-{name}"


def _serving(
    spec: GenerationSpec, model: StageModel, weights: Path, longest_prompt: int, scratch: Path
) -> Serving:
    """Return the settings of the servers, which start with a whole HF folder of any weights."""
    path, vllm = spec.source.hf_folder, spec.rollout.vllm
    if spec.rollout.is_colocated:
        raise ConfigError(
            "rollout.vllm.placement colocated: expected separate, since only training shares its "
            "GPUs with servers; set it, and rollout.vllm.devices to the servers' GPUs"
        )
    starts_servers = spec.rollout.engine == "vllm" and not vllm.urls
    if starts_servers and not isinstance(spec.source, HFSource):
        path = weights / "hf"
        export = partial(
            export_hf, spec.source, path, dtype=model.config.params_dtype, overwrite=True
        )
        run_on_rank0(export, takes_long=True)
    servers = vllm.model_copy(update={"weights_dir": weights})
    rollout = spec.rollout.model_copy(update={"vllm": servers})
    max_tokens = longest_prompt + rollout.max_response_tokens
    return Serving(rollout, path, spec.dtype, max_tokens, scratch)
