"""Process groups and gloo connections of one rank, before and after Megatron's groups lost gloo.

    python tools/benchmarks/groups.py                # the table of docs/benchmarks.md; no GPU

Nothing is connected: torch's fake backend stands in for NCCL and gloo, and each request for a group
is counted. gloo connects every rank of a group with every other one, so a group of n ranks costs a
rank n - 1 sockets. NCCL connects at a group's first collective, and is not counted.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from aropd_mcore.mcore.groups import GROUP_BACKENDS, JOB_BACKENDS, create_groups, parallel_state


class Layout(NamedTuple):
    """A job's number of ranks and the sizes of its layout."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    def __str__(self) -> str:
        names = {"tensor": "TP", "pipeline": "PP", "context": "CP", "expert": "EP"}
        sizes = [f"{short} {getattr(self, name)}" for name, short in names.items()]
        return ", ".join(text for text in sizes if not text.endswith(" 1"))


LAYOUTS = (
    Layout(8, tensor=4),
    Layout(64, tensor=8, pipeline=4),
    Layout(256, tensor=2),
    Layout(256, tensor=4, context=4),
    Layout(256, tensor=4, pipeline=2, expert=64),
)


@dataclass
class Counts:
    """Groups that the job creates, counted on rank 0."""

    num_created: int = 0
    """Number of groups of the whole job. Every rank takes part in the creation of each."""
    backends: list[tuple[str, int]] = field(default_factory=list)
    """Backends and number of ranks of each group of rank 0, the job's own group first."""

    @property
    def gloo_groups(self) -> list[int]:
        """Numbers of ranks of rank 0's groups that have gloo."""
        return [size for backend, size in self.backends if "gloo" in backend and size > 1]

    @property
    def num_sockets(self) -> int:
        """Number of sockets that rank 0's gloo groups hold open."""
        return sum(size - 1 for size in self.gloo_groups)


def count_groups(world_size: int, create: Callable[[], Any]) -> Counts:
    """Count the groups that `create` creates in a job on GPUs.

    Args:
        create: creates Megatron's groups. The job's own group exists.
    """
    job_backend = JOB_BACKENDS["cuda"]
    counts = Counts(1, [(job_backend, world_size)])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with _counted(counts, job_backend):
            create()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return counts


@contextmanager
def _counted(counts: Counts, job_backend: str) -> Iterator[None]:
    usual = dist.new_group

    def new_group(ranks: Any = None, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
        counts.num_created += 1
        if 0 in members:
            counts.backends.append((backend or job_backend, len(members)))
        return usual(members, *args, backend="fake", **kwargs)

    dist.new_group = new_group
    try:
        yield
    finally:
        dist.new_group = usual


def as_megatron_does(layout: Layout) -> Counts:
    """Count the groups of Megatron's defaults, whose groups inherit the job's backends."""
    return count_groups(
        layout.world_size,
        lambda: parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=True,
        ),
    )


def as_runs_do(layout: Layout) -> Counts:
    """Count the groups that `runtime.start` creates on GPUs."""
    sizes = layout._asdict()
    return count_groups(
        sizes.pop("world_size"), lambda: create_groups(backend=GROUP_BACKENDS["cuda"], **sizes)
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("| ranks | layout | groups of the job | groups of a rank | with gloo | gloo sockets |")
    print("|---|---|---|---|---|---|")
    for layout in LAYOUTS:
        before, after = as_megatron_does(layout), as_runs_do(layout)
        cells = [
            (before.num_created, after.num_created),
            (len(before.backends), len(after.backends)),
            (len(before.gloo_groups), len(after.gloo_groups)),
            (before.num_sockets, after.num_sockets),
        ]
        texts = [f"{old} → {new}" for old, new in cells]
        print(f"| {layout.world_size} | {layout} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
