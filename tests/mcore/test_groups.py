"""Process groups of large jobs, counted, and exchanges that must not use Megatron's groups.

On GPUs, Megatron's groups have NCCL only. Here torch's fake backend, which transfers nothing, takes
its place: an exchange over one of Megatron's groups would give wrong values.
"""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from tests.conftest import REPO
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run

MAX_SOCKETS = 300
"""Upper bound of the gloo sockets of a rank. Many systems permit 1024 open files."""


@pytest.fixture(scope="module")
def counter():
    path = REPO / "tools" / "benchmarks" / "groups.py"
    spec = importlib.util.spec_from_file_location("groups_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    "pipeline, tensor, expert, context", [(2, 4, 64, 1), (1, 2, 1, 1), (1, 4, 1, 4)]
)
def test_groups_of_256_gpus_have_few_sockets(counter, pipeline, tensor, expert, context):
    layout = counter.Layout(256, tensor, pipeline, context, expert)
    assert counter.as_megatron_does(layout).num_sockets > 1024, "the counter sees gloo's groups"
    counts = counter.as_runs_do(layout)
    assert 255 <= counts.num_sockets < MAX_SOCKETS
    of_job, *others = counts.backends
    assert of_job == ("cpu:gloo,cuda:nccl", 256)
    assert [size for backend, size in others if backend != "nccl"] == [4] * (context > 1)


def test_second_layout_adds_no_sockets(counter):
    from aropd_mcore.mcore.groups import NO_GROUPS, create_groups, using_groups

    layout = counter.Layout(256, tensor=4, pipeline=2, context=2)

    def create() -> None:
        create_groups(backend="nccl", tensor=4, pipeline=2, context=2)
        with using_groups(NO_GROUPS):
            create_groups(backend="nccl", tensor=8, expert=4)

    both, one = counter.count_groups(256, create), counter.as_runs_do(layout)
    assert both.num_sockets == one.num_sockets
    assert one.num_created < both.num_created


def test_exchanges_of_objects_do_not_use_megatrons_groups():
    run_ranks(exchange_beside_fake_groups, 4)


def exchange_beside_fake_groups() -> None:
    import torch.testing._internal.distributed.fake_pg  # noqa: F401, registers the backend

    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.groups import GROUP_BACKENDS
    from aropd_mcore.mcore.rank0 import run_on_rank0

    with patch.dict(GROUP_BACKENDS, cpu="fake"):
        for tensor, pipeline, context in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1)):
            here = runtime.start(tensor=tensor, pipeline=pipeline, context=context)
            assert dist.get_backend(here.dp_group) == "fake"
            for size in (0, 1, 5):
                # The second data-parallel rank has more items than the first.
                local = [(here.dp_rank, i) for i in range(size + here.dp_rank)]
                expected = [(rank, i) for rank in range(here.dp_size) for i in range(size + rank)]
                assert here.concatenate_over_data(local) == expected
            assert here.gather(here.rank) == [0, 1, 2, 3]
            assert here.max_over_job(here.rank) == 3
            assert run_on_rank0(dist.get_rank) == 0
            shares = [None] * here.cp_size
            if context > 1:
                dist.all_gather_object(shares, here.cp_rank, group=here.cp_objects_group)
                assert shares == [0, 1]
            runtime.stop()


def test_training_sends_objects_only_over_groups_with_gloo(tmp_path):
    """Packing, validation, samples, rollouts with context parallelism, saves and a resume."""
    path = write_run(
        tmp_path,
        training={"packing": True, "max_tokens_per_microbatch": 600, "num_steps": 2},
        parallel={"context": 2},
        logging={"samples": 2},
    )
    assert run_ranks(train_with_watched_objects, 4, path, timeout=600) == [[], [], [], []]


def train_with_watched_objects(path: Path) -> list[str]:
    """Train, and return the package's exchanges of objects over a group without gloo on GPUs."""
    from aropd_mcore.mcore.groups import GROUP_BACKENDS
    from aropd_mcore.mcore.runtime import Runtime
    from aropd_mcore.trainer import build
    from tests.support.training import train_on_ranks

    allowed: list[dist.ProcessGroup] = []
    found: list[str] = []

    def watched(name: str) -> Any:
        usual = getattr(dist, name)

        def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]
            is_own = caller.startswith("aropd_mcore.")
            if is_own and group not in (None, dist.group.WORLD, *allowed):
                found.append(f"{caller}: {name}")
            return usual(*args, group=group, **kwargs)

        return call

    usual_start = build.start_runtime

    def start(config) -> Runtime:
        here = usual_start(config)
        allowed.append(here.cp_objects_group)
        return here

    names = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")
    with (
        # Megatron's groups and cp_objects_group are then different, as on GPUs.
        patch.dict(GROUP_BACKENDS, cpu="cpu:gloo"),
        patch.multiple("torch.distributed", **{name: watched(name) for name in names}),
        patch.object(build, "start_runtime", start),
    ):
        train_on_ranks(path, [])
    return found


def test_collectives_before_the_first_step_do_not_grow_with_the_job(tmp_path):
    counts = []
    for num_ranks, parallel in ((2, {"tensor": 2}), (4, {"tensor": 2}), (4, {"pipeline": 2})):
        folder = tmp_path / str(len(counts))
        folder.mkdir()
        counts += run_ranks(collectives_of_a_start, num_ranks, write_run(folder, parallel=parallel))
    assert counts == [counts[0]] * 10
    # Broadcasts of objects and gathers of objects are two collectives each: sizes, then bytes.
    assert 5 <= sum(counts[0].values()) <= 15, counts[0]


def collectives_of_a_start(path: Path) -> Counter[str]:
    """Start a run, and return the number of collectives before its first step, by operator."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from aropd_mcore.trainer import loop
    from tests.support.training import train_on_ranks

    counts = Counter[str]()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[func.__name__] += func.namespace == "c10d"
            return func(*args, **(kwargs or {}))

    class AtFirstStep(Exception):
        pass

    with (
        patch.object(loop, "train_step", side_effect=AtFirstStep),
        pytest.raises(AtFirstStep),
        Counting(),
    ):
        train_on_ranks(path, [])
    return +counts
