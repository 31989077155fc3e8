"""A folder is complete or absent after kills, interrupts, full disks and concurrent writers."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aropd_mcore import locks
from aropd_mcore.cli import main
from aropd_mcore.convert import folders
from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.folders import copy_companions, new_folder
from tests.conftest import REPO
from tests.convert.big_models import write_llama


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Create `hf`, a model of 250 MB that takes a moment to write, and `mcore`, imported."""
    folder = tmp_path_factory.mktemp("big")
    write_llama(folder / "hf", hidden_size=1024, intermediate_size=4096, num_hidden_layers=7)
    assert main(["convert", "import", str(folder / "hf"), str(folder / "mcore")]) == 0
    yield folder
    shutil.rmtree(folder)


COMMANDS = {"import": "hf", "export": "mcore"}


def stop_in_flight(command: str, big: Path, target: Path, part: float) -> subprocess.Popen:
    """Start a conversion in a new process, and stop it when `part` of its bytes are written."""
    source = big / COMMANDS[command]

    def prepare() -> None:
        os.nice(19)  # keep the process slower than the loop below
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored if tests run in the background

    process = subprocess.Popen(
        [sys.executable, "-m", "aropd_mcore.cli", "convert", command, str(source), str(target)],
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=prepare,
    )
    partial = target.with_name(f".{target.name}.partial")
    total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    while process.poll() is None:
        sizes = [path.stat().st_size for path in partial.rglob("*")]
        if sizes and sum(sizes) >= part * total:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            break
        time.sleep(0.001)
    assert process.poll() is None and not target.exists(), "the conversion ended before the stop"
    return process


@pytest.mark.rest
@pytest.mark.parametrize(
    ("command", "part", "kill"),
    [
        ("import", 0, signal.SIGKILL),
        ("import", 0.6, signal.SIGKILL),
        ("export", 0.3, signal.SIGKILL),
        ("import", 0.3, signal.SIGINT),
        ("export", 0.6, signal.SIGINT),
        ("export", 0.3, None),
    ],
)
def test_a_stopped_conversion_leaves_no_incomplete_target(
    command, part, kill, big, tmp_path, convert, refused
):
    target, source = tmp_path / "out", big / COMMANDS[command]
    process = stop_in_flight(command, big, target, part)
    try:
        refused(command, source, target, because="out: another process is writing this folder")
        if kill is not None:
            process.send_signal(kill)
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    if kill is signal.SIGKILL:
        assert process.returncode == -kill
        assert names_in(tmp_path) == {".out.partial"}
    elif kill is signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in error
        assert error.endswith("aropd: interrupted\n")
        assert names_in(tmp_path) == set()
    if kill is not None:
        convert(command, source, target)
    else:
        assert process.returncode == 0
    assert names_in(tmp_path) == {"out"}
    convert("verify", big / "hf", target)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_reported_and_leaves_no_files(command, originals, tmp_path, refused):
    """A limit on file sizes replaces the full disk: writing fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        target = tmp_path / "out"
        refused(
            command, originals / COMMANDS[command], target, because=f"File too large: '{target}"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(folder: Path, text: str) -> None:
    """Create a folder that counts as a checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(text)


def content(folder: Path) -> str:
    return (folder / "model.safetensors").read_text()


def test_a_kill_between_the_renames_of_a_replacement_keeps_the_old_folder(tmp_path: Path):
    target = tmp_path / "out"
    fill(tmp_path / ".out.replaced", "old")
    fill(tmp_path / ".out.partial", "complete, but not renamed")
    with pytest.raises(CheckpointError, match="out: exists already"), new_folder(target):
        pass
    assert names_in(tmp_path) == {"out"} and content(target) == "old"
    with new_folder(target, overwrite=True) as folder:
        fill(folder, "new")
        assert content(target) == "old"
    assert names_in(tmp_path) == {"out"} and content(target) == "new"


def test_a_kill_after_the_renames_of_a_replacement_keeps_the_new_folder(tmp_path: Path):
    fill(tmp_path / ".out.replaced", "old")
    fill(tmp_path / "out", "new")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert names_in(tmp_path) == {"out"} and content(tmp_path / "out") == "new"


def test_folders_of_another_writer_are_left_unchanged(tmp_path: Path):
    fill(tmp_path / ".out.replaced", "old")
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.replaced/model.safetensors").open():
        descriptor = os.open(tmp_path / ".out.partial", os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process"), new_folder(tmp_path / "out"):
            pass
        os.close(descriptor)
    assert names_in(tmp_path) == {".out.replaced", ".out.partial"}


def test_a_lock_on_a_folder_that_another_writer_has_renamed_is_refused(tmp_path: Path, monkeypatch):
    """The other writer ends between the opening of the temporary folder and its lock."""
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        fill(tmp_path / ".out.partial", "theirs")
        (tmp_path / ".out.partial").rename(tmp_path / "out")
        flock(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with pytest.raises(CheckpointError, match="another process"), new_folder(tmp_path / "out"):
        pass
    assert names_in(tmp_path) == {"out"} and content(tmp_path / "out") == "theirs"


def test_a_replacement_that_cannot_be_renamed_restores_the_old_folder(tmp_path, monkeypatch):
    target, rename = tmp_path / "out", Path.rename
    fill(target, "old")

    def fail_second(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OSError, match=r"Input/output error: .*out"):  # noqa: SIM117
        with new_folder(target, overwrite=True) as folder:
            fill(folder, "new")
    assert names_in(tmp_path) == {"out"} and content(target) == "old"


def test_a_target_that_appears_during_writing_is_not_replaced(tmp_path: Path):
    target = tmp_path / "out"
    with pytest.raises(CheckpointError, match="exists already"), new_folder(target) as folder:
        fill(folder, "ours")
        fill(target, "theirs")
    assert names_in(tmp_path) == {"out"} and content(target) == "theirs"


def test_overwriting_a_link_replaces_its_folder(tmp_path: Path):
    fill(tmp_path / "linked", "old")
    (tmp_path / "link").symlink_to("linked")
    with new_folder(tmp_path / "link", overwrite=True) as folder:
        fill(folder, "new")
    assert names_in(tmp_path) == {"linked", "link"}
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "linked") == "new"


def test_space_of_a_killed_call_counts_as_free(tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.07 GB"):  # noqa: SIM117
        with new_folder(tmp_path / "out", num_bytes=10**6):
            pass
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial" / "left").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 70 * 2**20)
    with new_folder(tmp_path / "out", num_bytes=10**6) as folder:
        fill(folder, "new")
    assert names_in(tmp_path) == {"out"} and names_in(tmp_path / "out") == {"model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_copy_companions_copies_no_weights(dtype, tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    taken = {
        *("tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model", "LICENSE"),
        *("vocab.tiktoken", "NOTICE.md", "generation_config.json"),
        "additional_chat_templates/tools.jinja",
    }
    left = {
        *("README.md", "pytorch_model.bin", "modeling_own.py", "model.safetensors"),
        *("tensors.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    }
    for name in taken | left:
        (source / name).write_text(name)
    config = {"torch_dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    copy_companions(source, target, dtype)
    copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert copied == taken | {"config.json"}
    assert all((target / name).read_text() == name for name in taken)
    written = json.loads((target / "config.json").read_text())
    assert written == config | ({"torch_dtype": "bfloat16"} if dtype else {})
