"""Order in which the pipeline stages decode groups of rows, each stage another group at a time.

A token passes all stages before the next one of the same row can begin. With one group of rows, all
stages but one would wait.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """A pass of a group of rows through one of the stage's chunks of layers."""

    token: int
    """Number of the token since the beginning, the same for all rows."""
    group: int
    chunk: int
    """Index of the chunk. It is 0 without a virtual pipeline."""


@dataclass(frozen=True)
class Turn:
    """Work of a stage in a period of time in which every stage can do as much."""

    work: Pass | None
    """None: the stage waits."""
    ended: Pass | None
    """Pass of the last stage's last chunk in this turn. All stages learn its tokens."""


def turns(
    stage: int, num_stages: int, num_chunks: int, *, num_tokens: int, num_groups: int
) -> Iterator[Turn]:
    """Yield the turns of a stage.

    A group begins a token every num_stages x num_chunks turns, one turn after the group before it.
    A stage that works in one turn passes its hidden states on to the next stage's next turn.

    Args:
        num_groups: 1 to num_stages.
    """
    period = num_stages * num_chunks

    def passes(started: int) -> Pass | None:
        """Return the pass of the turn that is `started` turns after the stage's first one."""
        token, place = divmod(started, period)
        chunk, group = divmod(place, num_stages)
        return Pass(token, group, chunk) if 0 <= token < num_tokens and group < num_groups else None

    for turn in range(num_tokens * period + num_groups - 1):
        ended = passes(turn - num_stages + 1)
        if ended and ended.chunk < num_chunks - 1:
            ended = None
        yield Turn(passes(turn - stage), ended)
