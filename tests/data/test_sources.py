"""Records of zstd files, of saved data sets and of data sets of the hub."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import zstandard

from aropd_mcore.config import ConfigError, hub_name
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.prepare import prepare
from aropd_mcore.data.records import DataError, content_hash, read_records
from tests.conftest import REPO

ROWS = [
    {"question": f"{n} + 1?", "reasoning": f"{n} and one. " * 9, "answer": str(n + 1), "extra": n}
    for n in range(2500)  # More than one batch of any reader.
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def questions(path):
    return [row.question for row in RowDataset.load([path])]


EXPECTED = [row["question"] for row in ROWS]


def without(monkeypatch, package):
    """Make the import of a package fail."""
    real_import = builtins.__import__

    def failing_import(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", failing_import)


def pack(data, **settings):
    return zstandard.ZstdCompressor(**settings).compress(data)


def test_zstd_file_of_one_or_several_frames_has_the_lines_of_the_file(tmp_path):
    path = tmp_path / "rows.jsonl.zst"
    middle = len(LINES) // 2  # Within a line.
    frames = pack(LINES[:middle]) + pack(b"") + pack(LINES[middle:], level=19)
    # As `zstd --long=28` writes it: the library refuses such a window unless it is permitted.
    settings = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    long = stream.compress(LINES) + stream.flush()
    for packed in (pack(LINES), frames, pack(LINES.rstrip(b"\n")), pack(LINES + b"\n \n"), long):
        path.write_bytes(packed)
        assert questions(path) == EXPECTED
    assert RowDataset.load([path])[1].origin == f"{path}:2"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pack(LINES)[:-9], "not a readable zstd file; found the file ends within a frame"),
        (pack(LINES) + pack(LINES)[:9], "not a readable zstd file; found the file ends within"),
        (pack(LINES)[:99] + b"\xff" * 40, "not a readable zstd file; found "),
        (LINES, "not a readable zstd file; found "),
        (pack(LINES) + b"junk", "not a readable zstd file; found "),
        (pack(pack(LINES)), "expected JSONL: one JSON object per line; found zstd data"),
        (b"", "expected at least one usable row; found no rows"),
    ],
)
def test_damaged_zstd_file_is_refused_in_one_line(tmp_path, data, message):
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(data)
    with pytest.raises(DataError) as raised:
        RowDataset.load([path], on_bad_row="skip")
    assert str(raised.value).startswith(f"{path}: {message}")
    assert "\n" not in str(raised.value)


def test_unnamed_zstd_data_and_missing_packages_state_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(pack(LINES))
    with pytest.raises(DataError, match=r"found zstd data; name the file \*\.zst"):
        RowDataset.load([path])
    path = path.rename(tmp_path / "rows.jsonl.zst")
    with pytest.raises(ValueError, match=r"found \.zst, expected a JSONL file"):
        prepare([path], path)
    saved = save(tmp_path / "saved", ROWS[:1])
    without(monkeypatch, "zstandard")
    with pytest.raises(DataError, match=r"needs zstandard: pip install 'aropd-mcore\[zstd\]'"):
        RowDataset.load([path])
    without(monkeypatch, "datasets")
    for source in (saved, Path("hf://openai/gsm8k")):
        with pytest.raises(DataError, match=r"needs datasets: .* 'aropd-mcore\[datasets\]'"):
            RowDataset.load([source])


def save(folder, rows, **settings):
    datasets.Dataset.from_list(rows).save_to_disk(folder, **settings)
    return folder


def test_saved_data_set_of_several_shards_has_the_rows_in_order(tmp_path):
    folder = save(tmp_path / "saved", ROWS, num_shards=3)
    assert len(list(folder.glob("*.arrow"))) == 3
    assert questions(folder) == EXPECTED
    assert RowDataset.load([folder])[1500].origin == f"{folder}:1501"
    records = [record for _, record in read_records(folder)]
    assert records == ROWS
    ((_, record), *_) = read_records(folder, ["question", "system"])
    assert record == dict.fromkeys(ROWS[0]) | {"question": "0 + 1?"}
    assert prepare([folder], tmp_path / "rows.jsonl").kept == {"rows": len(ROWS)}
    assert questions(tmp_path / "rows.jsonl") == EXPECTED
    assert content_hash(folder) == content_hash(save(tmp_path / "copy", ROWS))
    assert content_hash(folder) != content_hash(save(tmp_path / "fewer", ROWS[1:]))


def test_saved_data_set_keeps_the_order_of_a_shuffled_or_filtered_one(tmp_path):
    shuffled = datasets.Dataset.from_list(ROWS).shuffle(seed=3).select(range(40))
    shuffled.save_to_disk(tmp_path / "shuffled")
    assert questions(tmp_path / "shuffled") == shuffled["question"][:]


def test_saved_data_set_without_rows_keys_names_its_columns(tmp_path):
    folder = save(tmp_path / "saved", [{"Question": "q", "Answer": "7"}])
    with pytest.raises(
        DataError, match=r"saved:1: key 'question' is missing .*; found keys Question, Answer"
    ):
        RowDataset.load([folder])


def test_saved_data_set_without_rows_is_empty(tmp_path):
    folder = save(tmp_path / "saved", [])
    assert list(read_records(folder)) == []
    with pytest.raises(ValueError, match="no rows"):
        RowDataset.load([folder])


def test_saved_data_set_of_several_splits_is_refused_with_their_folders(tmp_path):
    splits = datasets.Dataset.from_list(ROWS).train_test_split(test_size=10, seed=1)
    splits.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError) as raised:
        RowDataset.load([tmp_path / "saved"])
    assert str(raised.value) == (
        f"{tmp_path}/saved: expected one split: name its folder; found splits {tmp_path}/saved/"
        f"test, {tmp_path}/saved/train"
    )
    assert questions(tmp_path / "saved/test") == splits["test"]["question"][:]


def cut_off(num_bytes):
    def damage(folder):
        path = sorted(folder.glob("*.arrow"))[1]
        path.write_bytes(path.read_bytes()[:-num_bytes])

    return damage


DAMAGES = {
    "cut off in a batch": cut_off(1000),
    "cut off in the last bytes": cut_off(9),
    "no shard": lambda folder: sorted(folder.glob("*.arrow"))[1].unlink(),
    "broken state": lambda folder: (folder / "state.json").write_text("{"),
    "no info": lambda folder: (folder / "dataset_info.json").unlink(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_saved_data_set_is_refused_in_one_line(tmp_path, name):
    folder = save(tmp_path / "saved", ROWS, num_shards=3)
    DAMAGES[name](folder)
    with pytest.raises(DataError) as raised:
        RowDataset.load([folder], on_bad_row="skip")
    assert str(raised.value).startswith(f"{folder}: not a readable saved data set; found ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "repository", "revision", "subset", "split"),
    [
        ("hf://openai/gsm8k", "openai/gsm8k", None, None, "train"),
        ("hf://openai/gsm8k/test", "openai/gsm8k", None, None, "test"),
        ("hf://openai/gsm8k/main/test", "openai/gsm8k", None, "main", "test"),
        ("hf://openai/gsm8k@abc/main/test", "openai/gsm8k", "abc", "main", "test"),
        ("hf://openai/gsm8k@abc", "openai/gsm8k", "abc", None, "train"),
    ],
)
def test_hub_name_has_the_parts_of_the_path(text, repository, revision, subset, split):
    assert hub_name(Path(text)) == (repository, revision, subset, split)


def test_hub_name_of_another_form_is_refused_and_of_a_file_is_none():
    assert hub_name(Path("/data/hf:/rows.jsonl")) is None
    for text in ("hf://gsm8k", "hf://a/b/c/d/e", "hf://a/b@", "hf://a@x/b"):
        with pytest.raises(ConfigError, match=r"expected hf://NAMESPACE/NAME\[@REVISION\]"):
            hub_name(Path(text))


def test_hub_that_cannot_be_reached_is_reported(tmp_path):
    """HF_HUB_OFFLINE makes the real library report an unreachable hub without its retries."""
    program = (
        "from pathlib import Path\nfrom aropd_mcore.data.dataset import RowDataset\n"
        "RowDataset.load([Path('hf://openai/gsm8k/main/test')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr.splitlines()[-1].startswith(
        "aropd_mcore.data.records.DataError: hf://openai/gsm8k/main/test: the hub cannot be "
        "reached, and the cache does not have the data set: "
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stand-in for the hub: the real load_dataset on a local JSONL file. Returns its calls."""
    calls, real = [], datasets.load_dataset
    path = tmp_path / "train.jsonl"
    path.write_bytes(LINES)

    def load_dataset(repository, subset, *, split, revision):
        calls.append((repository, subset, split, revision))
        files = {"train": str(path)}
        return real("json", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_data_set_of_the_hub_gives_the_rows_of_its_split(hub):
    path = Path("hf://openai/gsm8k@abc/main/train")
    rows = RowDataset.load([path])
    assert [row.question for row in rows] == EXPECTED
    assert rows[2].origin == "hf://openai/gsm8k@abc/main/train:3"
    assert rows.sources[0].name == "hf://openai/gsm8k@abc/main/train"
    assert hub == [("openai/gsm8k", "main", "train", "abc")]


def test_unknown_split_of_the_hub_is_refused_with_the_known_ones(hub):
    with pytest.raises(DataError) as raised:
        RowDataset.load([Path("hf://openai/gsm8k/dev")])
    assert str(raised.value).startswith(
        "hf://openai/gsm8k/dev: the data set cannot be loaded; found Unknown split"
    )
    assert "train" in str(raised.value) and "\n" not in str(raised.value)
