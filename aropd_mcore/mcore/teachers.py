"""The teachers of a run by name, each of which scores the microbatches of its rows."""

from collections.abc import Mapping, Sequence

from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.types import Microbatch, TeacherOutput


class Teachers:
    """One teacher, with the empty name, or several teachers by name."""

    def __init__(self, by_name: Mapping[str, Teacher]):
        """
        Args:
            by_name: teachers by Microbatch.teacher, in the same order on every rank. Two names may
                have one teacher.
        """
        self._by_name = dict(by_name)

    def __getitem__(self, name: str) -> Teacher:
        return self._by_name[name]

    @property
    def single(self) -> Teacher | None:
        """The teacher without a name. None if teachers have names: their weights never change and
        are in no checkpoint."""
        return self._by_name.get("")

    def score(self, microbatches: Sequence[Microbatch]) -> list[TeacherOutput | None]:
        """Compute the hidden states of the privileged views, one teacher after another.

        Teachers with weights on the host are on the device one at a time.

        Args:
            microbatches: those of this data-parallel rank. Every rank has the same number of
                microbatches of each teacher.
        Returns:
            For each microbatch, the result of its teacher; see Teacher.score.
        Collectives: those of Teacher.score, for each teacher with a microbatch, in the same order
            on every rank.
        """
        outputs: dict[int, TeacherOutput | None] = {}
        for name, teacher in self._by_name.items():
            indices = [i for i, m in enumerate(microbatches) if m.teacher == name]
            if indices:
                results = teacher.score([microbatches[i] for i in indices])
                outputs |= dict(zip(indices, results, strict=True))
        return [outputs[i] for i in range(len(microbatches))]

    def follow(self) -> None:
        """Update the teachers after an optimizer step; see Teacher.follow."""
        for teacher in self._by_name.values():
            teacher.follow()
