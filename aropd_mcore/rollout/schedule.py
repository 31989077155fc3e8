"""Assignment of a batch's responses to rows that are decoded together."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Fill:
    """Responses that begin at the same time, and where the keys of their prompts come from."""

    started: dict[int, int] = field(default_factory=dict)
    """Response of each row that begins one."""
    prefills: dict[int, int] = field(default_factory=dict)
    """Rows whose prompt passes the model, with their responses. The last token of a prompt is part
    of the first decode step, so prompts of one token are not listed."""
    copies: dict[int, int] = field(default_factory=dict)
    """Rows that copy their prompt's keys after these prefills, with the row to copy from."""


class Schedule:
    """Rows and their responses, on the host, with continuous batching.

    A waiting response replaces each finished one. Once none waits, the number of rows shrinks to
    the next power of two. A prompt passes the model again only if no row still has its keys.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], num_rows: int, limit: int):
        """
        Args:
            prompts: one per response. Equal prompts share their keys.
            limit: largest number of tokens of a response.
        """
        first: dict[tuple[int, ...], int] = {}
        self._lengths = [len(prompt) for prompt in prompts]
        self._prompt_of = [first.setdefault(tuple(p), i) for i, p in enumerate(prompts)]
        # Longest first, so that rows decoded together have similar lengths.
        self._waiting = sorted(
            range(len(prompts)), key=lambda r: (-self._lengths[r], self._prompt_of[r])
        )
        self._limit = limit
        self._held: list[int | None] = [None] * num_rows
        """Prompt whose keys each row has, also after its response has ended."""
        self._running: dict[int, int] = {}
        """Response of each row that has one."""
        self._counts: dict[int, int] = {}
        """Number of its tokens, by row."""

    @property
    def num_rows(self) -> int:
        return len(self._held)

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_missing(self) -> int:
        """Largest number of tokens that a running response still can get; 0 if none runs."""
        return self._limit - min(self._counts.values(), default=self._limit)

    @property
    def num_keys(self) -> int:
        """Largest number of tokens of a row, including the next token of the model's input."""
        lengths = [self._lengths[r] + self._counts[row] for row, r in self._running.items()]
        return max(lengths, default=1)

    def fill(self) -> Fill:
        """Give waiting responses to the free rows."""
        fill = Fill()
        owners = {self._held[row]: row for row in self._running}
        free = [row for row in range(self.num_rows) if row not in self._running]
        started, self._waiting = self._waiting[: len(free)], self._waiting[len(free) :]
        for response in started:
            prompt = self._prompt_of[response]
            row = next((row for row in free if self._held[row] == prompt), free[0])
            free.remove(row)
            if self._held[row] != prompt and self._lengths[response] > 1:
                if prompt in owners:
                    fill.copies[row] = owners[prompt]
                else:
                    fill.prefills[row] = response
            owners.setdefault(prompt, row)
            self._held[row], self._running[row], self._counts[row] = prompt, response, 0
            fill.started[row] = response
        return fill

    def finish(self, counts: Sequence[int], is_done: Sequence[bool]) -> dict[int, int]:
        """Take note of new tokens; return the responses that have ended, by row.

        Args:
            counts: number of tokens of each row's response.
            is_done: whether each row's response has ended.
        """
        self._counts = {row: counts[row] for row in self._running}
        ended = {row: response for row, response in self._running.items() if is_done[row]}
        for row in ended:
            del self._running[row], self._counts[row]
        return ended

    def stop(self) -> None:
        """Drop the responses that wait."""
        self._waiting = []

    def shrink(self) -> dict[int, int]:
        """Reduce the number of rows, if no response waits; return the new row of each moved one."""
        num_rows = 1 << max(len(self._running) - 1, 0).bit_length()
        if self._waiting or num_rows >= self.num_rows:
            return {}
        free = iter([row for row in range(num_rows) if row not in self._running])
        moves = {row: next(free) for row in sorted(self._running) if row >= num_rows}
        for source, target in moves.items():
            self._held[target] = self._held[source]
            self._running[target] = self._running.pop(source)
            self._counts[target] = self._counts.pop(source)
        del self._held[num_rows:]
        return moves
