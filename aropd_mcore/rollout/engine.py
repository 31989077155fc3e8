"""What the trainer asks of whoever samples."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from aropd_mcore.config import SamplingConfig
from aropd_mcore.types import Rollout


class RolloutFailed(RuntimeError):
    """Nobody is left who could sample, or what they sample cannot be trusted; the message says why.

    Raised on every rank alike, by `generate`, and before anything of the run has changed.
    """


class RolloutEngine(Protocol):
    """Samples responses from the student's current weights."""

    weight_version: int
    """Of the weights that sample: the number of training steps behind their last update."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[Rollout]:
        """One response for each prompt, in the order of the prompts.

        Several responses to a prompt are several entries with different seeds (`rollout_seed`).

        Args:
            prompts: token ids, each at least one.
            seeds: one a prompt, in [0, 2^63); with the same weights, prompt and sampling the same
                seed gives the same response, whatever else is in the call.
            sampling: how, and how long.
        Raises:
            ValueError: a prompt cannot be continued, or seeds and prompts differ in number.
            RolloutFailed: no response can be had, for now or for good.
        """
        ...

    def sync(self, weight_version: int) -> None:
        """Sample from the student's weights as they are now: those of this many training steps.

        Called before the first `generate`, and after every update. What goes wrong is raised by the
        next `generate`: the step that led here is whole.
        """
        ...

    def close(self) -> None:
        """End what the engine has started."""
        ...


def never() -> bool:
    """What an engine asks where nothing can stop it."""
    return False


def check_prompts(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    *,
    vocab_size: int,
    max_sequence_length: int,
) -> None:
    """Raise ValueError where `generate` cannot continue a prompt."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one a prompt")
    room = max_sequence_length - sampling.max_response_tokens
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; it needs at least one token")
        if len(prompt) > room:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, and with max_response_tokens "
                f"{sampling.max_response_tokens} exceeds the model's "
                f"{max_sequence_length} positions; shorten one of the two"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt {index} has token ids from {min(prompt)} to {max(prompt)}, but the "
                f"model's vocabulary has {vocab_size}; is the tokenizer the model's?"
            )


def rollout_seed(seed: int, position: int, sample: int) -> int:
    """The seed of one response, in [0, 2^63): a pure function, so that a resumed run repeats it.

    Args:
        seed: the run's.
        position: of the prompt, counted over the whole run.
        sample: of the prompt's responses.
    """
    key = f"{seed}/{position}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
