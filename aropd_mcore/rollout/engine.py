"""The protocol that every rollout engine implements."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from aropd_mcore.config import SamplingConfig
from aropd_mcore.types import Rollout

Progress = Callable[[int, int], None]
"""Callback that gets the number of finished and of submitted responses."""


class RolloutFailed(RuntimeError):
    """The engine cannot produce trustworthy responses; the message states why.

    `Pending.result` raises it on every rank, before the step has changed anything.
    """


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to sample responses for: one response per entry.

    Several responses to a prompt are several entries with different seeds (`rollout_seed`).
    """

    prompts: Sequence[Sequence[int]]
    """Token ids, at least one per prompt."""
    seeds: Sequence[int]
    """One per prompt, in [0, 2^63). With the same weights, prompt and sampling the same seed gives
    the same response, whatever else is in the batch."""
    sampling: SamplingConfig
    """Temperature, cuts and length limit."""

    def check(self, *, vocab_size: int, max_sequence_length: int) -> None:
        """Check that a model can continue every prompt.

        Raises:
            ValueError: seeds and prompts differ in number; a prompt is empty, has a token id that
                the model lacks, or leaves no room for a response.
        """
        if len(self.seeds) != len(self.prompts):
            raise ValueError(
                f"found {len(self.prompts)} prompts and {len(self.seeds)} seeds; expected one seed "
                "per prompt"
            )
        limit = self.sampling.max_response_tokens
        for index, prompt in enumerate(self.prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty; expected at least one token")
            if len(prompt) > max_sequence_length - limit:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens: with max_response_tokens {limit} it "
                    f"exceeds the model's {max_sequence_length} positions; shorten the prompt or "
                    "lower max_response_tokens"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                raise ValueError(
                    f"prompt {index} has token ids from {min(prompt)} to {max(prompt)}, but the "
                    f"model's vocabulary has {vocab_size}; check that the tokenizer belongs to the "
                    "model"
                )


def ignore(num_done: int, num_all: int) -> None:
    """A Progress that does nothing."""


class Pending(Protocol):
    """A submitted batch."""

    def result(self, *, on_progress: Progress = ignore) -> list[Rollout]:
        """Wait for the responses, one per prompt in the order of the prompts. Call it once.

        Args:
            on_progress: called on every rank that samples, rank 0 included, from any thread.
        Raises:
            ValueError: see PromptBatch.check.
            RolloutFailed: the engine cannot produce responses, for now or permanently.
        Collectives: the engine's; every rank that submitted the batch must call it. If
            several batches are pending, all ranks must take their results in the same order.
        """
        ...


class RolloutEngine(Protocol):
    """Samples responses from the student's weights."""

    weight_version: int
    """Version of the weights that sample: the number of training steps before their last update."""

    def submit(self, batch: PromptBatch) -> Pending:
        """Hand over a batch. The call may return before anything is sampled.

        The responses are sampled from the current weights. If these weights never reached the
        engine, `result` retries with the weights that are current then, or raises the reason.
        Several batches may be pending if the engine runs beside training
        (RolloutConfig.model_samples is false).

        Collectives: the engine's; every rank must call it, and ranks may have different prompts.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Sample from the student's current weights, those after `version` training steps.

        Called before the first `submit` and after every update. It waits for pending batches, which
        older weights sample. The next `Pending.result` raises an error of this call, because the
        step that produced these weights is complete.
        """
        ...

    def close(self) -> None:
        """Stop every process and thread that the engine has started."""
        ...


def never() -> bool:
    """A `should_stop` that never stops."""
    return False


def rollout_seed(seed: int, position: int, sample: int) -> int:
    """Return the seed of one response, in [0, 2^63).

    A pure function, so that a resumed run draws the same responses.

    Args:
        seed: seed of the run.
        position: position of the prompt, counted over the whole run.
        sample: number of the response among those to the prompt.
    """
    key = f"{seed}/{position}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
