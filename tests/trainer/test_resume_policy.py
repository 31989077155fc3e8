"""Changes of settings between a checkpoint and a resumed run: kinds and messages."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.config_file import load_config
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.trainer.resume_policy import (
    CONTENTS_ONLY,
    FREE,
    REFUSED,
    check_changes,
    describe_run,
)
from aropd_mcore.types import Row
from tests.support.tiny_runs import write_model, write_run


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("changes"))


def describe(path: Path, *overrides: str, **identity: str) -> dict:
    config = load_config(path, list(overrides))
    identity = {"chat_template": "a", "tokenizer": "b", **identity}
    return describe_run(config, RowDataset.load(config.data.train), identity)


def test_value_that_a_checkpoint_has_under_an_earlier_name_is_no_change(path):
    saved, current = describe(path), describe(path)
    saved["config"]["views"]["partial_cut"] = "word_end"
    assert check_changes(saved, current, []) == []
    saved["config"]["views"]["partial_cut"] = "lines"
    assert "views.partial_cut" in check_changes(saved, current, [])[0]


def test_free_changes_keep_the_hash_and_are_noted(path):
    moved = path.parent / "elsewhere.jsonl"
    moved.write_bytes((path.parent / "rows.jsonl").read_bytes())
    saved = describe(path)
    current = describe(
        path,
        "parallel.tensor=2",
        "checkpoint.keep_last=7",
        "training.micro_batch_size=4",
        "rollout.vllm.servers=3",
        f"data.train=[{moved}]",
    )
    assert current["config_hash"] == saved["config_hash"]
    (line,) = check_changes(saved, current, [])
    assert line.startswith(
        "settings changed, same run up to rounding: checkpoint.keep_last 2 -> 7, parallel."
    )
    assert check_changes(saved, describe(path), []) == []
    saved["config"]["parallel"]["overlap_param_gather"] = False  # of an earlier version
    assert check_changes(saved, describe(path), []) == []


def test_effective_changes_are_noted(path):
    saved, current = describe(path), describe(path, "optimizer.lr=0.5", "teacher.ema_rate=0.2")
    assert check_changes(saved, current, []) == [
        "settings changed, effective from this step: optimizer.lr 0.001 -> 0.5, "
        "teacher.ema_rate 0.1 -> 0.2"
    ]
    assert current["config_hash"] != saved["config_hash"]
    # The rows are the same, the prompts differ.
    current = describe(path, "views.on_long_prompt=cut_chat")
    (line,) = check_changes(saved, current, [])
    assert line.startswith("settings changed, effective from this step: views.on_long_prompt ")
    assert current["config_hash"] != saved["config_hash"], (
        "otherwise saved rollouts would be reused"
    )


def test_refused_changes_name_the_setting_that_permits_them(path):
    rows = path.parent / "fewer.jsonl"
    rows.write_text("".join((path.parent / "rows.jsonl").read_text().splitlines(True)[1:]))
    wider = write_model(path.parent / "wider", intermediate_size=128)
    saved = describe(path)
    current = describe(
        path, "training.seed=5", f"data.train=[{rows}]", f"model.path={wider}", "optimizer.lr=0.5"
    )
    with pytest.raises(ConfigError) as refused:
        check_changes(saved, current, ["model.path"])
    message = str(refused.value)
    assert "\n  training.seed 1234 -> 5 (the order of the rows changes" in message
    assert "\n  data.train " in message and "model.path" not in message
    assert "'checkpoint.allow_changes=[training.seed,data.train]'" in message
    (line,) = check_changes(saved, current, ["training.seed", "data.train", "model.path"])
    for key in ("training.seed", "data.train", "model.path", "optimizer.lr"):
        assert f"{key} " in line
    with pytest.raises(
        ConfigError, match=r"found 'optimizer.lr', expected settings that may not change"
    ):
        check_changes(saved, current, ["optimizer.lr"])


def test_other_weight_of_a_source_is_refused_and_weight_1_equals_none(path):
    rows = path.parent / "rows.jsonl"
    saved = describe(path)
    assert (
        check_changes(saved, describe(path, f"data.train=[{{path: {rows}, weight: 1}}]"), []) == []
    )
    weighted = describe(path, f"data.train=[{{path: {rows}, weight: 2}}]")
    assert weighted["config_hash"] != saved["config_hash"]
    with pytest.raises(ConfigError, match=r"data.train .*the rows or their weights differ"):
        check_changes(saved, weighted, [])
    current = describe(path, "views.partial_ratio=[0.25, 0.5]")
    (line,) = check_changes(saved, current, [])
    assert line.endswith("effective from this step: views.partial_ratio 0.5 -> [0.25, 0.5]")


@pytest.mark.parametrize("name", ["chat_template", "tokenizer"])
def test_other_template_or_tokenizer_is_refused_unless_allowed(path, name):
    saved, current = describe(path), describe(path, **{name: "other"})
    assert current["config_hash"] != saved["config_hash"], (
        "otherwise saved rollouts would be reused"
    )
    with pytest.raises(ConfigError, match=f"model.{name} .*\\n.*allow_changes=.model.{name}."):
        check_changes(saved, current, [])
    (line,) = check_changes(saved, current, [f"model.{name}"])
    assert line.startswith(f"settings changed, effective from this step: model.{name} ")


def test_checkpoint_without_recorded_contents_resumes_with_a_note(path):
    saved, current = describe(path), describe(path)
    for key in CONTENTS_ONLY:
        saved["contents"].pop(key, None)  # a run without adapter has no fingerprint of its base
    (note,) = check_changes(saved, current, [])
    assert "does not record model.chat_template, model.tokenizer" in note


def test_fingerprint_of_rows_without_history_equals_that_of_older_versions():
    row = Row("1 + 1?", "one and one", "2", origin="rows.jsonl:1")
    assert RowDataset([row]).fingerprint() == "d7027dc79484e6fb"
    longer = replace(row, history=(("user", "hello"), ("assistant", "hi")))
    assert RowDataset([longer]).fingerprint() != RowDataset([row]).fingerprint()


def test_every_listed_setting_exists():
    for key in (*FREE, *REFUSED.keys() - set(CONTENTS_ONLY)):
        model = Config
        for name in key.split("."):
            assert name in model.model_fields, key
            annotation = model.model_fields[name].annotation
            model = (get_args(annotation) or [annotation])[0]  # a section may be null
