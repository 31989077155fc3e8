"""Saves that fail, and checkpoints that are damaged: what a run says, keeps and goes on from.

On real gloo ranks and real disks: a small tmpfs that fills up, one that is read-only. Every rank
has to end alike, or the others would wait for it in a collective.
"""

import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.manifest import iterations, newest, problems, read_manifest
from aropd_mcore.convert.source import find_iteration
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run
from tests.support.training import read_lines, repeatable, saved_steps, train_on_ranks

pytestmark = pytest.mark.rest

MIB = 2**20


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("faults"), checkpoint={"save_every_steps": 1, "keep_last": 4}
    )


@pytest.fixture(scope="module")
def whole(path) -> Path:
    """A run of four steps, each of which has a checkpoint."""
    out = path.parent / "whole"
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}"])
    assert saved_steps(out) == [1, 2, 3, 4]
    return out


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mounts a tmpfs of so many bytes; they are unmounted at the end."""
    mounted: list[Path] = []

    def mount(num_bytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk needs the right to mount one: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


# --- saves that fail ---


def test_a_save_that_fails_leaves_the_last_checkpoint(path, whole, small_disk, tmp_path):
    size = sum(file.stat().st_size for file in newest(whole / "checkpoints").iterdir())
    index = (newest(whole / "checkpoints") / ".metadata").stat().st_size
    # For none of the files; for a part of the tensors; for all of them, and not for their index.
    room = [0, size // 2, size - index]
    disk = small_disk(4 * size)
    messages = run_ranks(fail_to_save, 2, path, disk, tmp_path / "gone", room)
    assert messages[0] == messages[1], "every rank ends alike"
    full, others = messages[0][: len(room)], messages[0][len(room) :]
    for message in full:
        # What torch says of a full disk is not always that, so it is said how much there is.
        assert "MiB are free there" in message
        assert str(disk) in message
    during, after, killed, denied = others
    assert "No such file" in during
    assert "is missing; was it deleted, or its disk unmounted?" in after
    assert "rank 1: the writing process died" in killed
    assert "cannot be written to: Permission denied" in denied


def fail_to_save(path: Path, disk: Path, gone: Path, room: list[int]) -> list[str]:
    """On a rank: what each save says that cannot be written."""
    import os

    import torch.distributed as dist

    from aropd_mcore.config_file import load_config
    from aropd_mcore.mcore.checkpoint import directory, writer
    from aropd_mcore.mcore.checkpoint.directory import SaveFailed
    from aropd_mcore.mcore.checkpoint.state import Saving
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = load_config(path)
    rt = start_runtime(config)
    run = build_run(config, rt)
    messages = []

    def begin(folder: Path, step: int) -> Saving:
        return Saving(folder, step, run.student, run.teacher, {"step": step}, rt)

    @contextmanager
    def failing() -> Iterator[None]:
        with pytest.raises((SaveFailed, CheckpointError)) as failed:
            yield
        messages.append(str(failed.value))
        dist.barrier()

    begin(disk, 1).commit()
    for num_bytes in room:
        if rt.rank == 0:
            fill(disk, num_bytes)
        dist.barrier()
        with failing():
            begin(disk, 2).commit()
        assert [p.name for p in iterations(disk)] == ["iter_0000001"]
        assert not list(disk.glob(".iter*")) and problems(disk / "iter_0000001") == []
        dist.barrier()
    (disk / "filler").unlink(missing_ok=True)
    begin(disk, 2).commit()
    assert newest(disk) == disk / "iter_0000002"

    def late(_: int) -> None:
        """In the writing process: training is done with the next step by now."""
        import time

        time.sleep(0.5)

    with patch.object(writer.os, "nice", late):
        directory.prepare(gone)
        saving = begin(gone, 1)
        dist.barrier()
        shutil.rmtree(gone, ignore_errors=True)
        with failing():
            saving.commit()
        with failing():
            begin(gone, 2)
        directory.prepare(gone)
        saving = begin(gone, 3)
        if rt.rank == 1:
            saving._writing._queue.async_calls[0].async_caller.process.kill()
        with failing():
            saving.commit()
        begin(gone, 3).commit()
        assert problems(newest(gone) or gone) == []

    os.seteuid(65534)
    try:
        with failing():
            directory.prepare(gone)
    finally:
        os.seteuid(0)
    return messages


def fill(disk: Path, num_bytes: int) -> None:
    """Leave so many bytes on a disk."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    filler.write_bytes(bytes(max(0, free - num_bytes)))


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_stops_the_run_or_not_by_setting(path, whole, small_disk, asynchronous):
    size = sum(file.stat().st_size for file in newest(whole / "checkpoints").iterdir())
    common = ["checkpoint.keep_last=1", f"checkpoint.asynchronous={asynchronous}"]
    for on_failure, num_steps in (("stop", 3 if asynchronous == "true" else 2), ("continue", 4)):
        out = small_disk(2 * size - MIB) / "out"
        overrides = [f"output_dir={out}", f"checkpoint.on_failure={on_failure}", *common]
        (printed, message), (_, other) = run_ranks(train_until_stopped, 2, path, overrides)
        assert message == other
        assert message.startswith(f"could not save: {out / 'checkpoints' / 'iter_000000'}")
        assert f"The last checkpoint is {out / 'checkpoints' / 'iter_0000001'}" in message
        # A save in the background fails while the next step trains.
        assert len(read_lines(out)) in (num_steps, num_steps + 1)
        assert saved_steps(out) == [1]
        assert ("could not save, training continues:" in printed) == (on_failure == "continue")


def train_until_stopped(path: Path, overrides: list[str]) -> tuple[str, str]:
    """What the run prints, and why it stops."""
    from aropd_mcore.trainer.loop import TrainingStopped

    with redirect_stdout(io.StringIO()) as printed, pytest.raises(TrainingStopped) as stopped:
        train_on_ranks(path, overrides)
    return printed.getvalue(), str(stopped.value)


def test_a_folder_that_is_read_only_is_said_at_once(path, small_disk):
    disk = small_disk(MIB)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    messages = run_ranks(train_in_vain, 2, path, [f"output_dir={disk / 'out'}"])
    folder = disk / "out" / "checkpoints"
    assert messages == [f"{folder}: cannot be written to: Read-only file system"] * 2


def train_in_vain(path: Path, overrides: list[str]) -> str:
    with pytest.raises(ValueError) as failed:
        train_on_ranks(path, overrides)
    return str(failed.value)


# --- checkpoints that are damaged ---


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "tensors flipped": ("__0_0.distcp", flip, "has checksum "),
    "another rank's tensors flipped": ("__1_0.distcp", flip, "has checksum "),
    "tensors cut": ("__0_0.distcp", cut, " bytes, expected "),
    "tensors missing": ("__1_0.distcp", Path.unlink, "No such file"),
    "index flipped": (".metadata", flip, "has checksum "),
    "format flipped": ("metadata.json", flip, "has checksum "),
    "manifest flipped": ("manifest.json", flip, "not a valid manifest"),
    "manifest cut": ("manifest.json", cut, "not a valid manifest"),
    "manifest missing": ("manifest.json", Path.unlink, "is missing, so the checkpoint is"),
}


def damaged(whole: Path, folder: Path, *steps: int, what: str) -> Path:
    """A copy of a run's last two checkpoints, with damage to a file of some of them."""
    for step in (3, 4):
        shutil.copytree(whole / f"checkpoints/iter_{step:07d}", folder / f"iter_{step:07d}")
    name, damage, _ = DAMAGE[what]
    for step in steps:
        damage(folder / f"iter_{step:07d}" / name)
    return folder


def test_the_checkpoint_before_a_damaged_one_is_used(path, whole, tmp_path):
    folders = [
        damaged(whole, tmp_path / str(number), 4, what=what) for number, what in enumerate(DAMAGE)
    ]
    for folder, (name, _, problem) in zip(folders, DAMAGE.values(), strict=True):
        # The exporter changes nothing: it takes another only where there is no whole manifest.
        if name == "manifest.json":
            assert find_iteration(folder) == folder / "iter_0000003"
        elif "bytes" in problem or "No such" in problem:
            with pytest.raises(CheckpointError, match=f"iter_0000004/{name}: .*{problem}"):
                find_iteration(folder)

    nothing = tmp_path / "nothing"
    (nothing / ".iter_0000001.1234.partial").mkdir(parents=True)  # the first save was never done
    lost = damaged(whole, tmp_path / "lost", 3, 4, what="tensors cut")
    aside = tmp_path / "aside"
    shutil.copytree(lost / "iter_0000004", aside / "iter_0000004.corrupt")
    found = run_ranks(find_all, 2, [*folders, nothing, lost, aside])
    assert found[0] == found[1]
    for folder, (name, _, problem), result in zip(folders, DAMAGE.values(), found[0], strict=False):
        taken, notes = result
        assert taken == folder / "iter_0000003"
        assert len(notes) == 1 and notes[0].startswith(f"{folder / 'iter_0000004' / name}: ")
        assert problem in notes[0] and notes[0].endswith("; renamed to iter_0000004.corrupt")
        assert sorted(p.name for p in folder.glob("iter_*")) == [
            "iter_0000003",
            "iter_0000004.corrupt",
        ]
        assert (folder / "latest_checkpointed_iteration.txt").read_text() == "3"
    *_, of_nothing, of_lost, of_aside = found[0]
    assert of_nothing == (None, [])
    assert of_lost.startswith(f"{lost}: none of the 2 checkpoints is intact")
    assert of_lost.count("__0_0.distcp: has ") == 2
    assert len(iterations(lost)) == 2, "what cannot be replaced is left where it is"
    assert of_aside.startswith(f"{aside}: none of the 1 checkpoints is intact")


def find_all(folders: list[Path]) -> list:
    from aropd_mcore.mcore.checkpoint.directory import find

    results = []
    for folder in folders:
        try:
            results.append(find(folder))
        except CheckpointError as error:
            results.append(str(error))
    return results


def test_a_run_goes_on_from_before_the_damage_and_ends_the_same(path, whole, tmp_path):
    out = tmp_path / "out"
    damaged(whole, out / "checkpoints", 4, what="tensors flipped")
    shutil.copy(whole / "metrics.jsonl", out)
    printed = run_ranks(train_and_show, 2, path, [f"output_dir={out}"])[0]
    assert "resuming at step 3" in printed and "renamed to iter_0000004.corrupt" in printed
    assert repeatable(read_lines(out)) == repeatable(read_lines(whole))
    last = "checkpoints/iter_0000004"
    files, expected = (read_manifest(run / last)["files"] for run in (out, whole))
    tensors = [name for name in files if name.endswith(".distcp")]
    assert tensors and all(files[name] == expected[name] for name in tensors)


def train_and_show(path: Path, overrides: list[str]) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        train_on_ranks(path, overrides)
    return printed.getvalue()
