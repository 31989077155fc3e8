"""Failed saves and damaged checkpoints: messages, remaining checkpoints, and resumed runs.

The tests use real gloo ranks and real file systems: a small tmpfs that fills up, and a read-only
one. All ranks must fail together. Otherwise some would wait in a collective.
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
def complete_run(path) -> Path:
    """The output_dir of a run of four steps, with a checkpoint after each."""
    out = path.parent / "complete"
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}"])
    assert saved_steps(out) == [1, 2, 3, 4]
    return out


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """Function that mounts a tmpfs of num_bytes bytes. All are unmounted at the end."""
    mounted: list[Path] = []

    def mount(num_bytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the permission to mount a tmpfs: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


# --- failed saves ---


def test_save_that_fails_keeps_the_last_checkpoint(path, complete_run, small_disk, tmp_path):
    size = sum(file.stat().st_size for file in newest(complete_run / "checkpoints").iterdir())
    index = (newest(complete_run / "checkpoints") / ".metadata").stat().st_size
    # Space for no file, for a part of the tensors, and for all tensors but not for their index.
    free_bytes = [0, size // 2, size - index]
    disk = small_disk(4 * size)
    messages = run_ranks(fail_to_save, 2, path, disk, tmp_path / "gone", free_bytes)
    assert messages[0] == messages[1], "expected the same messages on all ranks"
    full, others = messages[0][: len(free_bytes)], messages[0][len(free_bytes) :]
    for message in full:
        # torch's message does not always name the full disk. So the free space is stated.
        assert "MiB are free there" in message
        assert str(disk) in message
    deleted_during_save, deleted_before_save, killed, denied = others
    assert "No such file" in deleted_during_save
    assert "is missing; was it deleted, or its disk unmounted?" in deleted_before_save
    assert "rank 1: the writing process died" in killed
    assert "cannot be written to: Permission denied" in denied


def fail_to_save(path: Path, disk: Path, gone: Path, free_bytes: list[int]) -> list[str]:
    """Run on a rank: make saves fail in several ways. Returns their error messages."""
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
    for num_bytes in free_bytes:
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

    def delay(_: int) -> None:
        """Delay the writing process until training has done its next step."""
        import time

        time.sleep(0.5)

    with patch.object(writer.os, "nice", delay):
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
    """Write a file that leaves num_bytes free bytes on a disk."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    filler.write_bytes(bytes(max(0, free - num_bytes)))


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_on_failure_full_disk_stops_or_continues(path, complete_run, small_disk, asynchronous):
    size = sum(file.stat().st_size for file in newest(complete_run / "checkpoints").iterdir())
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
    """Return stdout of a run that stops, and the reason."""
    from aropd_mcore.trainer.loop import TrainingStopped

    with redirect_stdout(io.StringIO()) as printed, pytest.raises(TrainingStopped) as stopped:
        train_on_ranks(path, overrides)
    return printed.getvalue(), str(stopped.value)


def test_train_read_only_output_dir_is_refused_at_start(path, small_disk):
    disk = small_disk(MIB)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    messages = run_ranks(train_with_error, 2, path, [f"output_dir={disk / 'out'}"])
    folder = disk / "out" / "checkpoints"
    assert messages == [f"{folder}: cannot be written to: Read-only file system"] * 2


def train_with_error(path: Path, overrides: list[str]) -> str:
    with pytest.raises(ValueError) as failed:
        train_on_ranks(path, overrides)
    return str(failed.value)


# --- damaged checkpoints ---


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


def copy_damaged(run: Path, folder: Path, *steps: int, damage: str) -> Path:
    """Copy a run's last two checkpoints, and damage one file in those of `steps`."""
    for step in (3, 4):
        shutil.copytree(run / f"checkpoints/iter_{step:07d}", folder / f"iter_{step:07d}")
    name, apply, _ = DAMAGE[damage]
    for step in steps:
        apply(folder / f"iter_{step:07d}" / name)
    return folder


def test_find_damaged_checkpoint_is_set_aside_and_the_previous_used(path, complete_run, tmp_path):
    folders = [
        copy_damaged(complete_run, tmp_path / str(number), 4, damage=damage)
        for number, damage in enumerate(DAMAGE)
    ]
    for folder, (name, _, problem) in zip(folders, DAMAGE.values(), strict=True):
        # The exporter moves nothing. It skips a checkpoint only if the manifest is not valid.
        if name == "manifest.json":
            assert find_iteration(folder) == folder / "iter_0000003"
        elif "bytes" in problem or "No such" in problem:
            with pytest.raises(CheckpointError, match=f"iter_0000004/{name}: .*{problem}"):
                find_iteration(folder)

    nothing = tmp_path / "nothing"
    (nothing / ".iter_0000001.1234.partial").mkdir(parents=True)  # the first save did not finish
    lost = copy_damaged(complete_run, tmp_path / "lost", 3, 4, damage="tensors cut")
    aside = tmp_path / "aside"
    shutil.copytree(lost / "iter_0000004", aside / "iter_0000004.corrupt")
    results, others = run_ranks(find_all, 2, [*folders, nothing, lost, aside])
    assert results == others
    for folder, (name, _, problem), result in zip(folders, DAMAGE.values(), results, strict=False):
        checkpoint, notes = result
        assert checkpoint == folder / "iter_0000003"
        assert len(notes) == 1 and notes[0].startswith(f"{folder / 'iter_0000004' / name}: ")
        assert problem in notes[0] and notes[0].endswith("; renamed to iter_0000004.corrupt")
        assert sorted(p.name for p in folder.glob("iter_*")) == [
            "iter_0000003",
            "iter_0000004.corrupt",
        ]
        assert (folder / "latest_checkpointed_iteration.txt").read_text() == "3"
    *_, nothing_result, lost_result, aside_result = results
    assert nothing_result == (None, [])
    assert lost_result.startswith(f"{lost}: none of the 2 checkpoints is intact")
    assert lost_result.count("__0_0.distcp: has ") == 2
    assert len(iterations(lost)) == 2, "expected no change where no checkpoint is complete"
    assert aside_result.startswith(f"{aside}: none of the 1 checkpoints is intact")


def find_all(folders: list[Path]) -> list:
    from aropd_mcore.mcore.checkpoint.directory import find

    results = []
    for folder in folders:
        try:
            results.append(find(folder))
        except CheckpointError as error:
            results.append(str(error))
    return results


def test_resume_before_a_damaged_checkpoint_gives_the_same_weights(path, complete_run, tmp_path):
    out = tmp_path / "out"
    copy_damaged(complete_run, out / "checkpoints", 4, damage="tensors flipped")
    shutil.copy(complete_run / "metrics.jsonl", out)
    printed = run_ranks(train_and_show, 2, path, [f"output_dir={out}"])[0]
    assert "resuming at step 3" in printed and "renamed to iter_0000004.corrupt" in printed
    assert repeatable(read_lines(out)) == repeatable(read_lines(complete_run))
    last = "checkpoints/iter_0000004"
    files, expected = (read_manifest(run / last)["files"] for run in (out, complete_run))
    tensors = [name for name in files if name.endswith(".distcp")]
    assert tensors and all(files[name] == expected[name] for name in tensors)


def train_and_show(path: Path, overrides: list[str]) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        train_on_ranks(path, overrides)
    return printed.getvalue()
