"""Targets that cannot be written or must not be replaced: errors of one line, and no changes."""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from aropd_mcore.cli import main
from aropd_mcore.convert import folders
from aropd_mcore.convert.hf_io import INDEX
from tests.convert.big_models import write_llama
from tests.convert.conftest import everything_in
from tests.convert.damage import NORM, edit_tensors


def test_an_import_larger_than_the_disk_is_refused(tmp_path, refused):
    """The model's sparse files are twice as long as the free space."""
    free = shutil.disk_usage(tmp_path).free
    sizes = {"hidden_size": 2**13, "intermediate_size": 2**20, "sparse": True}
    layers = 1 + 2 * free // (3 * 2**34)
    total = write_llama(tmp_path / "hf", num_hidden_layers=layers, max_shard_bytes=2**40, **sizes)
    assert total > 2 * free
    because = f"out: needs {(total + 2**26) / 1e9:.2f} GB, but {tmp_path} has "
    refused("import", tmp_path / "hf", tmp_path / "out", because=because)


def test_an_export_larger_than_the_disk_is_refused(mcore, tmp_path, refused, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**26)  # the reserve that must stay free
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage)
    refused("export", mcore, tmp_path / "out", because="out: needs 0.07 GB, but ")


def without_rights(*arguments: Any) -> tuple[int, str]:
    """Run `aropd convert` in a process that is not root. Returns its exit status and stderr."""
    with tempfile.TemporaryFile("w+") as stderr:
        process = os.fork()
        if process == 0:
            status = 99
            try:
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                sys.stderr = stderr
                status = main(["convert", *map(str, arguments)])
                stderr.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        stderr.seek(0)
        return status, stderr.read()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("locked", "because"),
    [
        (".", "out: cannot be created: Permission denied"),
        ("hf/model.safetensors", "hf/model.safetensors: cannot be read: Permission denied"),
    ],
)
def test_files_and_folders_without_permission_are_refused(
    locked: str, because: str, originals: Path
):
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are accessible by its user only
        folder = Path(name)
        shutil.copytree(originals / "hf", folder / "hf")
        for path in (folder, folder / "hf", *(folder / "hf").iterdir()):
            path.chmod(0o755)
        (folder / locked).chmod(0o555 if locked == "." else 0)
        before = everything_in(folder)
        result = without_rights("import", folder / "hf", folder / "out")
        assert result == (2, f"aropd: error: {folder}/{because}\n")
        assert everything_in(folder) == before
        folder.chmod(0o755)


def test_a_target_below_a_file_is_refused(hf, tmp_path, refused):
    (tmp_path / "file").touch()
    because = "file/out: cannot be created: Not a directory"
    refused("import", hf, tmp_path / "file" / "out", because=because)


def test_an_existing_target_is_replaced_on_request_only(hf, mcore, tmp_path, refused, convert):
    target = tmp_path / "back"
    convert("export", mcore, target, "--max-shard-size", "100KB")
    refused("export", mcore, target, because="back: exists already; choose another folder, or")
    assert (target / INDEX).exists()
    convert("export", mcore, target, "--overwrite")
    assert not (target / INDEX).exists()
    edit_tensors(lambda tensors: tensors.update({NORM: tensors[NORM] + 1}))(hf)
    convert("import", hf, mcore, "--overwrite")
    assert main(["convert", "verify", str(target), str(mcore)]) == 1
    convert("verify", hf, mcore)
    (tmp_path / "empty").mkdir()
    convert("import", hf, tmp_path / "empty", "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "mcore", "back", "empty"}


@pytest.mark.parametrize(
    "files", [("notes.txt",), ("config.json", "main.py"), ("config.yaml", "hf/config.json")]
)
def test_only_checkpoints_are_replaced(files, hf, tmp_path, refused):
    """Folders of notes, projects with a config.json and training runs are not replaced."""
    for file in files:
        (tmp_path / "out" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / file).touch()
    because = "out: is not a checkpoint, so --overwrite does not replace it"
    refused("import", hf, tmp_path / "out", "--overwrite", because=because)
    file = tmp_path / "out" / files[0]
    refused("import", hf, file, "--overwrite", because="is not a checkpoint")


@pytest.mark.parametrize("place", [".", "..", "../link", "../HF/../hf"])
def test_a_target_that_contains_the_input_is_refused(place, hf, mcore, tmp_path, refused):
    (tmp_path / "link").symlink_to(hf)
    (tmp_path / "HF").mkdir()
    refused("import", hf, hf / place, "--overwrite", because=f": contains the input {hf};")
    for part in ("hf", "iter_0000000"):
        refused("export", mcore, mcore / part, "--overwrite", because=": contains the input ")
