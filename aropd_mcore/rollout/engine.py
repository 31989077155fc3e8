"""The protocol that every rollout engine implements."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from aropd_mcore.config import SamplingConfig
from aropd_mcore.types import Rollout

Progress = Callable[[int, int], None]
"""Called with the number of responses that are done, and of those that were submitted."""


class RolloutFailed(RuntimeError):
    """No response can be had, or responses cannot be trusted; the message states why.

    Raised on every rank alike, by `Pending.result`, and before anything of the run has changed.
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
                f"{len(self.prompts)} prompts but {len(self.seeds)} seeds; give one a prompt"
            )
        limit = self.sampling.max_response_tokens
        for index, prompt in enumerate(self.prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty; it needs at least one token")
            if len(prompt) > max_sequence_length - limit:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens, and with max_response_tokens "
                    f"{limit} exceeds the model's {max_sequence_length} positions; shorten one of "
                    "the two"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                raise ValueError(
                    f"prompt {index} has token ids from {min(prompt)} to {max(prompt)}, but the "
                    f"model's vocabulary has {vocab_size}; is the tokenizer the model's?"
                )


def ignore(num_done: int, num_all: int) -> None:
    """A Progress that does nothing."""


class Pending(Protocol):
    """A submitted batch."""

    def result(self, *, on_progress: Progress = ignore) -> list[Rollout]:
        """Wait for the responses, one per prompt in the order of the prompts. Call it once.

        Args:
            on_progress: called on rank 0, and on other ranks where they sample too, by any thread.
        Raises:
            ValueError: see PromptBatch.check.
            RolloutFailed: no response can be had, for now or permanently.
        Collectives: the engine's; every rank that submitted the batch must call it, and ranks must
            ask for the results of several batches in the same order.
        """
        ...


class RolloutEngine(Protocol):
    """Samples responses from the student's weights."""

    weight_version: int
    """Version of the weights that sample: the number of training steps behind their last update."""

    def submit(self, batch: PromptBatch) -> Pending:
        """Hand over a batch, and possibly return before anything is sampled.

        The responses are sampled from the weights of now, unless these weights never reached the
        engine: then `result` tries again with those of its time, or raises why not. Several batches
        may be pending where the engine runs beside training (RolloutConfig.model_samples is false).

        Collectives: the engine's; every rank must call it, and may have prompts of its own.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Sample from the student's weights as they are now: those after `version` training steps.

        Called before the first `submit`, and after every update. It waits for batches that older
        weights sample. An error is raised by the next `Pending.result`: the step that led to these
        weights is complete.
        """
        ...

    def close(self) -> None:
        """End what the engine has started."""
        ...


def never() -> bool:
    """The `should_stop` of an engine that nothing can stop."""
    return False


def rollout_seed(seed: int, position: int, sample: int) -> int:
    """The seed of one response, in [0, 2^63): a pure function, so that a resumed run repeats it.

    Args:
        seed: the run's.
        position: of the prompt, counted over the whole run.
        sample: of the prompt's responses.
    """
    key = f"{seed}/{position}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
