"""A resumed run trains on the responses that it sampled before the interruption."""

import shutil
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run
from tests.support.training import (
    assert_same_in_any_layout,
    read_lines,
    repeatable,
    saved_steps,
    train_on_ranks,
)

pytestmark = pytest.mark.rest


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("kept"),
        checkpoint={"save_every_steps": 2, "save_rollouts": True, "asynchronous": False},
    )


@pytest.fixture(scope="module")
def expected(path) -> list[dict]:
    """Metrics of four uninterrupted steps."""
    out = path.parent / "unbroken"
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}", "checkpoint.save_rollouts=false"])
    return read_lines(out)


class Interrupted(Exception):
    """Stands for a kill."""


def train_and_count(path: Path, overrides: list[str], end_in: int | None) -> list[int]:
    """Train until the training of step `end_in` begins; return the steps that were sampled."""
    from aropd_mcore.rollout.native import NativeEngine
    from aropd_mcore.trainer import step as step_module

    sampled: list[int] = []
    submit, form_batch = NativeEngine.submit, step_module.form_batch
    trained = 0

    def counted(self, *args):
        sampled.append(self.weight_version)
        return submit(self, *args)

    def form_or_end(*args):
        nonlocal trained
        if trained == end_in:
            raise Interrupted
        trained += 1
        return form_batch(*args)

    with (
        patch.object(NativeEngine, "submit", counted),
        patch.object(step_module, "form_batch", form_or_end),
        suppress(Interrupted),
    ):
        train_on_ranks(path, overrides)
    return sampled


def files(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "rollouts").iterdir())


def test_cached_responses_are_not_sampled_again(path, expected):
    out = path.parent / "again"
    here = [f"output_dir={out}"]
    assert run_ranks(train_and_count, 2, path, here, 1) == [[0, 1]] * 2
    assert saved_steps(out) == [] and len(read_lines(out)) == 1
    assert files(out) == [
        f"step_{step:07d}.rank_{rank:04d}.json" for step in (0, 1) for rank in (0, 1)
    ]
    # Steps 0 and 1 train on the cached responses. Step 3 is sampled before the interruption.
    assert run_ranks(train_and_count, 2, path, here, 3) == [[2, 3]] * 2
    assert saved_steps(out) == [2]
    # The checkpoint has released steps 0 and 1. Another layout reads the responses of 2 and 3.
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    other = path.parent / "other-layout"
    shutil.copytree(out, other)
    assert run_ranks(train_and_count, 4, path, [f"output_dir={other}", *layout], None) == [[]] * 4
    assert_same_in_any_layout(read_lines(other), expected)
    assert run_ranks(train_and_count, 2, path, here, None) == [[]] * 2
    assert repeatable(read_lines(out)) == repeatable(expected)
    assert files(out) == [] and saved_steps(out) == [2, 4]


def test_damaged_or_foreign_responses_are_sampled_again(path, expected):
    out = path.parent / "damaged"
    here = [f"output_dir={out}"]
    run_ranks(train_and_count, 2, path, here, 1)
    one, other = out / "rollouts" / files(out)[1], out / "rollouts" / files(out)[2]
    one.write_text(one.read_text().replace("1", "2", 50))
    other.unlink()
    # If one rank's responses are missing, all ranks sample again.
    assert run_ranks(train_and_count, 2, path, here, 1) == [[0, 1]] * 2
    colder = [*here, "rollout.temperature=0.5"]
    assert run_ranks(train_and_count, 2, path, colder, 1) == [[0, 1]] * 2
    assert run_ranks(train_and_count, 2, path, here, None) == [[0, 1, 2, 3]] * 2
    assert repeatable(read_lines(out)) == repeatable(expected)
