"""What the trainer asks of whoever samples."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from aropd_mcore.config import SamplingConfig
from aropd_mcore.types import Rollout


class RolloutEngine(Protocol):
    """Samples responses from the student's current weights."""

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
        """
        ...

    def sync(self, weight_version: int) -> None:
        """Sample from the student's weights as they are now: those of this many training steps."""
        ...


def rollout_seed(seed: int, position: int, sample: int) -> int:
    """The seed of one response, in [0, 2^63): a pure function, so that a resumed run repeats it.

    Args:
        seed: the run's.
        position: of the prompt, counted over the whole run.
        sample: of the prompt's responses.
    """
    key = f"{seed}/{position}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
