"""Which engine samples where the model that trains samples itself."""

from collections.abc import Callable, Sequence

from aropd_mcore.config import RolloutConfig
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.rollout.engine import never
from aropd_mcore.rollout.megatron import MegatronEngine
from aropd_mcore.rollout.native import NativeEngine


def model_engine(
    rollout: RolloutConfig,
    model: StageModel,
    runtime: Runtime,
    *,
    eos_token_ids: Sequence[int],
    should_stop: Callable[[], bool] = never,
) -> NativeEngine | MegatronEngine:
    """The engine over `model`: rollout.engine native or megatron."""
    assert rollout.model_samples
    engine = MegatronEngine if rollout.engine == "megatron" else NativeEngine
    return engine(
        model,
        runtime,
        eos_token_ids=eos_token_ids,
        batch_size=rollout.batch_size,
        kv_cache_tokens=rollout.kv_cache_tokens,
        should_stop=should_stop,
    )
