"""Megatron's own dynamic inference engine over the training model.

Its context holds keys and values in pages of PAGE_TOKENS tokens: a request takes the pages that
its tokens fill, so that the same memory serves more rows at a time than the native engine's rows of
full length. Where pages run out Megatron pauses requests or drops their pages and computes them
again. Attention is flash-attn's, over the pages.

Megatron's are the schedule, the pages, the forward and the exchange between stages. Ours are the
output head and what follows it: Megatron draws every token from one generator, knows one EOS, and
samples the columns that pad the vocabulary too (text_generation_controller.py,
_dynamic_step_sample_logits). Three of its methods are replaced, which megatron-core 0.16.1, 0.17,
0.18 and 0.19 have under the same names. Its constructors changed with 0.17: `_engine` is the one
place that knows.

Shape letters: N tokens of a forward, B rows, H hidden, V vocabulary.
"""

import faulthandler
import math
import signal
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.inference import utils as inference_utils
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import attention
from torch import Tensor

from aropd_mcore.config import ConfigError
from aropd_mcore.mcore.decode import next_token_logits
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime

try:
    from megatron.core.inference.config import InferenceConfig  # type: ignore[import-not-found]
except ImportError:  # megatron-core 0.16.1
    InferenceConfig = None

# inference/data_parallel_inference_coordinator.py:33 has them print a stack, before whoever listens
# is asked. To a run they mean to save and leave in order.
for number in (signal.SIGTERM, signal.SIGINT):
    faulthandler.unregister(number)

PAGE_TOKENS = 256
"""Tokens of a page; flash-attn 2 takes multiples of 256."""
_MOST_TOKENS = 16384
"""Of a forward, prompts and all, unless a single prompt has more."""

Draw = Callable[[list[int], Tensor | None], tuple[Tensor, Set[int]]]
"""Called on every rank of the replica, with the prompts whose next tokens are wanted, by their
indices, and the logits [B, V] fp32 on the rank that samples, None elsewhere. Returns the tokens,
int64 [B], the same on every rank, and the indices of the prompts that end with them."""


def check_dynamic() -> None:
    """Refuse Megatron's engine where it cannot run: on this machine, with what is installed.

    Raises:
        ConfigError: what is missing: a GPU, or flash-attn.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "rollout.engine megatron needs a GPU, and torch sees none on this machine; "
            "rollout.engine native runs anywhere"
        )
    # transformer/attention.py asserts as much in every forward, and calls rearrange of einops.
    has_flash = attention.flash_attn_with_kvcache is not None
    has_flash = has_flash and attention.is_fa_min_version("2.7.3")
    newer = any(getattr(attention, name, False) for name in ("HAVE_FA3", "HAVE_FA4"))
    if not (has_flash or newer) or attention.rearrange is None:
        raise ConfigError(
            "rollout.engine megatron needs flash-attn 2.7.3 or newer and einops, which are not "
            "both installed; pip install einops and flash-attn --no-build-isolation, or take "
            "rollout.engine native"
        )


def decode_dynamically(
    model: StageModel,
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    draw: Draw,
    *,
    max_response_tokens: int,
    batch_size: int,
    num_pages: int,
) -> None:
    """Continue every prompt, token by token, until `draw` says that it ends.

    In between the model is in evaluation mode; afterwards it is as it was before. The cache,
    2 x (num_pages + 1) x PAGE_TOKENS x KV heads x D numbers a layer, lives as long as the call.

    Args:
        model: this rank's shard, one chunk; neither context- nor expert-parallel.
        max_response_tokens: `draw` ends each prompt with this many at the latest.
        batch_size: prompts in the engine at a time.
        num_pages: of keys and values; enough for the longest prompt with its response.
    Collectives: the model's own over tp_group; hidden states stage to stage over pp_group; a gather
        of [B, V / tp] over the last stage's tp_group; what `draw` runs.
    """
    was_training = model.training
    model.eval()
    engine: Any = None
    waiting = list(enumerate(prompts))[::-1]
    settings: dict[str, Any] = {"num_tokens_to_generate": max_response_tokens, "termination_id": -1}
    try:
        engine = _engine(
            _Head(model, runtime, draw),
            max_sequence_length=max(map(len, prompts)) + max_response_tokens,
            max_requests=batch_size + -batch_size % math.lcm(4, runtime.tp_size),
            num_pages=num_pages,
        )
        while waiting or engine.has_unfinished_requests():
            while waiting and len(engine.requests) < batch_size:
                index, prompt = waiting.pop()
                engine.add_request(index, list(prompt), SamplingParams(**settings))
            engine.step_modern()
    finally:
        if engine is not None:
            # Engine and context refer to each other: what is left of them waits for the garbage
            # collector, and the cache must not.
            engine.context.memory_buffer = None
        if hasattr(inference_utils, "InferenceMode"):  # from 0.18 on; the engine has set it
            inference_utils.InferenceMode.unset_active()  # type: ignore[attr-defined]
        model.train(was_training)


@dataclass(frozen=True)
class _Head:
    """What follows the layers."""

    model: StageModel
    runtime: Runtime
    draw: Draw

    def logits(self, hidden_N1H: Tensor | None, context: Any) -> Tensor | None:
        """Of the token after each running request, as next_token_logits.

        Args:
            hidden_N1H: final hidden states of the last stage, under sequence parallelism this
                tensor rank's part of them.
            context: Megatron's, which knows where each request's last token stands.
        """
        hidden_BH = None
        if self.runtime.is_last_stage:
            assert hidden_N1H is not None
            whole_N1H: Tensor = hidden_N1H
            if self.runtime.sequence_parallel:
                whole_N1H = gather_from_sequence_parallel_region(hidden_N1H)
            hidden_BH = context.last_token_logits(whole_N1H.transpose(0, 1))  # of any [1, N, x]
        return next_token_logits(self.model, self.runtime, hidden_BH)


class _Forward(GPTInferenceWrapper):
    """Megatron's, out of inference mode: what it keeps between forwards, rotary tables and the
    buffers of sequence parallelism, would be of no use to training."""

    def _forward(self, inference_input: dict[str, Any]) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return super()._forward(inference_input)


class _Controller(TextGenerationController):
    """Megatron's, with the project's head and sampling in place of its own."""

    def __init__(self, wrapped: _Forward, head: _Head):
        super().__init__(wrapped, _NoTokenizer())
        self._head = head
        self._logits_BV: Tensor | None = None
        self._ended: Set[int] = set()

    def _dynamic_step_forward_logits(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        wrapped: Any = self.inference_wrapped_model
        hidden_N1H = wrapped.run_one_forward_step(
            {"tokens": input_ids, "position_ids": position_ids, "attention_mask": None}
        )
        self._logits_BV = self._head.logits(hidden_N1H, wrapped.inference_context)

    def _dynamic_step_sample_logits(self, logits: Any = None) -> None:
        context: Any = self.inference_wrapped_model.inference_context
        running = context.request_ids[context.paused_request_count : context.total_request_count]
        self._sampled_tokens_cuda, self._ended = self._head.draw(running.tolist(), self._logits_BV)

    def ended(self, running: list[int]) -> Set[int]:
        """Requests that have got their last token; Megatron asks for them in the same step."""
        return self._ended & set(running)


class _NoTokenizer:
    """Ids in, ids out; Megatron makes text of what has ended."""

    def detokenize(self, _ids: list[int]) -> str:
        return ""


def _engine(head: _Head, *, max_sequence_length: int, max_requests: int, num_pages: int) -> Any:
    """The engine, built as the installed Megatron wants it: the one place that knows versions."""
    model, (chunk,) = head.model, head.model
    config: Any = model.config
    numbers_a_token = 2 * len(model.layers) * config.num_query_groups * config.kv_channels
    numbers = numbers_a_token // head.runtime.tp_size * PAGE_TOKENS * (num_pages + 1)
    settings: dict[str, Any] = {
        "block_size_tokens": PAGE_TOKENS,
        "buffer_size_gb": numbers * config.params_dtype.itemsize / 2**30,  # exact: by a power of 2
        "max_requests": max_requests,
        "max_tokens": max(_MOST_TOKENS, max_sequence_length, max_requests),
        "max_sequence_length": max_sequence_length,
    }
    if InferenceConfig is not None:  # from 0.17 on
        context = DynamicInferenceContext(config, InferenceConfig(**settings))
        controller = _Controller(_Forward(chunk, context), head)
        engine = DynamicInferenceEngine(controller, context)
    else:
        context = DynamicInferenceContext(
            params_dtype=config.params_dtype,
            num_layers=len(model.layers),
            kv_channels=config.kv_channels,
            num_attention_heads=config.num_query_groups,
            **settings,
        )
        from megatron.core.inference.model_inference_wrappers import inference_wrapper_config

        wrapper_config = inference_wrapper_config.InferenceWrapperConfig(
            hidden_size=config.hidden_size,
            params_dtype=config.params_dtype,
            inference_batch_times_seqlen_threshold=-1,  # a forward is never split
            padded_vocab_size=model.vocab_size,
        )
        controller = _Controller(_Forward(chunk, wrapper_config, context), head)
        engine = DynamicInferenceEngine(
            controller, context, random_seed=0, enable_chunked_prefill=False
        )
    controller.set_stop_word_finished_ids_callback(controller.ended)
    return engine
