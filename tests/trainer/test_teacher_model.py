"""A teacher that is another model: identity with a frozen one, checkpoints, resume, bad input.

Whole steps with teachers of other sizes and families are cases of test_step.py.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aropd_mcore.config import ConfigError
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.import_export import import_hf
from aropd_mcore.convert.manifest import newest, read_manifest
from aropd_mcore.convert.mapping import EMBEDDING, HEAD
from aropd_mcore.convert.source import HFSource, open_source, with_vocabulary
from aropd_mcore.plan.layout import plan
from aropd_mcore.trainer.preflight import preflight
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_run
from tests.support.tiny_tokenizer import VOCAB_SIZE, save_tiny_tokenizer
from tests.support.training import (
    assert_same_checkpoint,
    assert_same_in_any_layout,
    read_checkpoints,
    read_lines,
    repeatable,
    train_on_ranks,
)

DELAYED = ("teacher_fp8=hybrid", "fp8_recipe=delayed")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A run of three steps, with the student's folder, a copy of it, and another teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    path = write_run(
        folder,
        training={"num_steps": 3},
        checkpoint={"save_every_steps": 1, "keep_last": 4, "asynchronous": False},
        parallel={"tensor": 2},
    )
    shutil.copytree(folder / "model", folder / "copy")
    write_model(folder / "other", "llama", seed=3, vocab_size=VOCAB_SIZE + 41, **SIZES)
    return path


def with_teacher(teacher: Path | str, *more: str) -> list[str]:
    return ["teacher.kind=model", f"teacher.path={teacher}", *more]


@pytest.mark.rest
def test_teacher_equal_to_the_student_is_the_frozen_teacher_bitwise(path):
    """The two runs differ only in that one checkpoint contains the teacher."""
    folder = path.parent
    kinds = {"frozen": ["teacher.kind=frozen"], "model": with_teacher(folder / "copy")}
    for kind, overrides in kinds.items():
        run_ranks(train_on_ranks, 2, path, [*overrides, f"output_dir={folder / kind}"])
    frozen, model = (repeatable(read_lines(folder / kind)) for kind in kinds)
    assert len(frozen) == 3 and model == frozen
    states = run_ranks(read_checkpoints, 1, [folder / kind for kind in kinds])[0]
    frozen, model = states
    of_teacher = {name for name in frozen if name.startswith("teacher.")}
    assert of_teacher
    assert_same_checkpoint(model, {n: value for n, value in frozen.items() if n not in of_teacher})


def test_resumed_run_is_bitwise_the_same_and_refuses_another_teacher(path):
    folder, out = path.parent, path.parent / "resumed"
    overrides = with_teacher(folder / "other", f"output_dir={out}")
    run_ranks(train_on_ranks, 2, path, overrides)
    expected = repeatable(read_lines(out))
    (state,) = run_ranks(read_checkpoints, 1, [out])[0]
    assert not any(name.startswith("teacher.") for name in state)
    manifest = read_manifest(newest(out / "checkpoints"))
    assert manifest["config"]["teacher"]["path"] == str(folder / "other")

    # A folder with the same contents is the same teacher. Other weights are another teacher.
    for step in (2, 3):
        shutil.rmtree(out / "checkpoints" / f"iter_{step:07d}")
    shutil.copytree(folder / "other", folder / "moved")
    write_model(folder / "differs", "llama", seed=4, vocab_size=VOCAB_SIZE + 41, **SIZES)
    moved, differs = (
        with_teacher(folder / name, f"output_dir={out}") for name in ("moved", "differs")
    )
    with pytest.raises(ConfigError, match=r"teacher.path .* \(it is another teacher\)"):
        preflight(load_config(path, differs))
    notes = preflight(load_config(path, [*differs, "checkpoint.allow_changes=[teacher.path]"]))
    assert 'effective from this step: teacher.path "content' in notes[-1]

    run_ranks(train_on_ranks, 2, path, moved)
    assert repeatable(read_lines(out)) == expected
    (resumed,) = run_ranks(read_checkpoints, 1, [out])[0]
    assert_same_checkpoint(resumed, state)


@pytest.mark.rest
def test_teacher_in_its_own_layout_resumes_bitwise_and_gives_the_same_numbers(path):
    folder, numbers = path.parent, {}
    layouts = {
        "student's": [],
        "equal": ["teacher.parallel.tensor=2"],
        "stages": ["teacher.parallel.pipeline=2"],
    }
    for name, layout in layouts.items():
        out = folder / name
        run_ranks(
            train_on_ranks,
            2,
            path,
            with_teacher(folder / "other", *layout, f"output_dir={out}"),
        )
        numbers[name] = repeatable(read_lines(out))
    assert len(numbers["equal"]) == 3 and numbers["equal"] == numbers["student's"]
    assert_same_in_any_layout(numbers["stages"], numbers["equal"])

    (state,) = run_ranks(read_checkpoints, 1, [out])[0]
    for step in (2, 3):
        shutil.rmtree(out / "checkpoints" / f"iter_{step:07d}")
    overrides = with_teacher(folder / "other", *layouts["stages"], f"output_dir={out}")
    run_ranks(train_on_ranks, 2, path, overrides)
    assert repeatable(read_lines(out)) == numbers["stages"]
    (resumed,) = run_ranks(read_checkpoints, 1, [out])[0]
    assert_same_checkpoint(resumed, state)
    # The layout is not a part of the run.
    preflight(load_config(path, with_teacher(folder / "other", f"output_dir={out}")))


@pytest.mark.rest
def test_dense_student_on_the_expert_ranks_of_its_teacher_saves_and_resumes(path):
    folder, out = path.parent, path.parent / "dense"
    write_model(folder / "moe", "qwen3_moe", seed=5)
    layout = ["parallel.tensor=1", "parallel.expert=2", f"output_dir={out}"]
    overrides = with_teacher(folder / "moe", *layout)
    run_ranks(train_on_ranks, 2, path, overrides)
    expected = repeatable(read_lines(out))
    (state,) = run_ranks(read_checkpoints, 1, [out])[0]
    for step in (2, 3):
        shutil.rmtree(out / "checkpoints" / f"iter_{step:07d}")
    run_ranks(train_on_ranks, 2, path, overrides)
    assert repeatable(read_lines(out)) == expected
    (resumed,) = run_ranks(read_checkpoints, 1, [out])[0]
    assert_same_checkpoint(resumed, state)


@pytest.mark.parametrize("vocab_size", [100, VOCAB_SIZE, VOCAB_SIZE + 300])
def test_vocabulary_is_cut_or_padded_with_zeros(path, tmp_path, vocab_size):
    """The stored vocabulary is 300. Checkpoints of both kinds give the same shards."""
    import_hf(HFSource(path.parent / "other"), tmp_path / "imported")
    for source in (HFSource(path.parent / "other"), open_source(tmp_path / "imported")):
        resized = with_vocabulary(source, vocab_size)
        assert source.architecture.vocab_size == VOCAB_SIZE + 41
        for weight in resized.architecture.weights():
            whole = torch.cat([resized.shard(weight, 2, rank) for rank in range(2)])
            if weight.name in (EMBEDDING.name, HEAD.name):
                (name,) = weight.hf
                stored = HFSource(path.parent / "other").files.read(name)
                kept = min(vocab_size, len(stored))
                assert len(whole) == -(-vocab_size // 128) * 128
                assert torch.equal(whole[:kept], stored[:kept]) and not whole[kept:].any()


def swap_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocab = tree["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    file.write_text(json.dumps(tree))


def make_special(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        tree = json.loads(file.read_text())
        for token in tree.get("added_tokens", []):
            token["special"] = token["content"] != "<|im_start|>"
        file.write_text(json.dumps(tree))


def add_token(folder: Path) -> None:
    save_tiny_tokenizer(folder, thinks=True)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_rows(folder: Path) -> None:
    shutil.rmtree(folder)
    write_model(folder, "llama", vocab_size=VOCAB_SIZE - 2, eos_token_id=5, **SIZES)


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap_tokens, r"token 'A' has id 32 in the student's \S+model, and id 33 in .*damaged"),
        (make_special, r"special token '<\|im_start\|>' has id 257 in .*, and id none in"),
        (add_token, r"token '<think>' has id none in the student's .* id 259 in the teacher's"),
        (remove_weights, r"teacher.path: .*damaged.*holds no weights"),
        (remove_rows, r"damaged.*found '<\|im_start\|>' 257, .* \(vocab_size 257"),
        (remove_folder, r"teacher.path: .*damaged.*config\.json"),
    ],
)
def test_teacher_that_does_not_fit_is_refused(
    path, tmp_path, damage: Callable[[Path], None], message: str
):
    shutil.copytree(path.parent / "other", tmp_path / "damaged")
    config = load_config(path, with_teacher(tmp_path / "damaged"))
    preflight(config)
    damage(tmp_path / "damaged")
    with pytest.raises(ConfigError, match=message):
        preflight(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.kind=model"], "kind model and path null: expected the folder of"),
        (["teacher.path=x"], "path x and kind ema: expected path null"),
        (["teacher.parallel.tensor=2"], "parallel is set and kind is ema: expected parallel null"),
        (with_teacher("x", "teacher.parallel.context=2"), "teacher.parallel.context: unknown key"),
        (
            with_teacher("x", "teacher.parallel.sequence=true"),
            "teacher.parallel: sequence is true and tensor is 1: expected tensor > 1",
        ),
        (
            with_teacher("x", "teacher.parallel.tensor=2", "validation.teacher_views=[student]"),
            "validation.teacher_views with teacher.parallel: expected no teacher_views",
        ),
        (["teacher.views=none"], "views none and kind ema: expected views privileged"),
        (
            with_teacher("x", "teacher.views=none"),
            "residual_scale 0.8 and teacher.views none: expected residual_scale 0",
        ),
        (
            with_teacher("x", *(f"precision.{name}" for name in DELAYED), "model.dtype=bf16"),
            "fp8_recipe delayed and teacher.kind model: expected another recipe",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


def test_plan_refuses_a_teacher_that_the_layout_does_not_divide(path, tmp_path):
    odd = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    write_model(tmp_path / "odd", "llama", **odd)
    write_model(tmp_path / "short", "llama", max_position_embeddings=100)
    write_model(tmp_path / "moe", "qwen3_moe")
    for name, more, message in (
        ("odd", [], r"teacher.path .*odd, in the layout .*: parallel.tensor 2: expected a div"),
        ("short", [], r"teacher.path .*short, .* 144 tokens: expected at most 100"),
        ("moe", [], r"teacher.path .*moe, .*parallel.tensor 2 without sequence parallelism"),
        ("other", ["parallel.pipeline=4"], r"teacher.path .*: pipeline-parallel size 4 does not"),
        ("other", ["parallel.expert=2"], r"^parallel.expert 2: expected 1 for a dense model"),
    ):
        folder = path.parent if name == "other" else tmp_path
        with pytest.raises(ValueError, match=message):
            plan(load_config(path, with_teacher(folder / name, *more)), 8)
    for name, layout, message in (
        (
            "odd",
            {"tensor": 2},
            r"teacher.path .*odd, in the layout of teacher.parallel: teacher.parallel.tensor 2: "
            "expected a divisor of the model's 3 key/value heads",
        ),
        ("moe", {"tensor": 2}, "teacher.parallel.tensor 2 without .* teacher.parallel.sequence"),
        ("moe", {"expert": 3}, "teacher.parallel.expert 3: expected a divisor of the model's"),
        ("other", {"expert": 2}, "teacher.parallel.expert 2: expected 1 for a dense model"),
        ("other", {"pipeline": 4}, r"teacher.parallel: pipeline-parallel size 4 does not divide"),
        (
            "other",
            {"tensor": 2, "pipeline": 2},
            "6 processes: expected a multiple of teacher.parallel.tensor 2 x "
            "teacher.parallel.pipeline 2 = 4; change",
        ),
        (
            "other",
            {"pipeline": 2, "layers_in_first_stage": 3},
            "teacher.parallel.layers_in_first_stage 3: found",
        ),
    ):
        folder = path.parent if name == "other" else tmp_path
        settings = [f"teacher.parallel.{key}={value}" for key, value in layout.items()]
        with pytest.raises(ValueError, match=message):
            plan(load_config(path, with_teacher(folder / name, *settings)), 6)
    # A teacher in its own layout need not fit that of the student.
    plan(load_config(path, with_teacher(tmp_path / "odd", "teacher.parallel.tensor=1")), 8)
    plan(load_config(path, with_teacher(tmp_path / "moe", "teacher.parallel.expert=4")), 8)
    # The experts of the teacher may be split over ranks that a dense student does not use.
    experts = ["parallel.expert=2", "parallel.sequence=true"]
    plan(load_config(path, with_teacher(tmp_path / "moe", *experts)), 4)


def test_without_views_every_view_is_the_students_prompt(path):
    from aropd_mcore.data.dataset import RowDataset
    from aropd_mcore.data.tokenizer import load_tokenizer
    from aropd_mcore.data.views import ViewBuilder

    config = load_config(path)
    tokenizer = load_tokenizer(config.model.path)
    plain = ViewBuilder(tokenizer, config.views, is_privileged=False)
    views = replace(plain.build(row := RowDataset.load(config.data.train)[0]), num_cut_tokens=0)
    assert views.student_ids == views.partial_ids == views.full_ids
    privileged = ViewBuilder(tokenizer, config.views).build(row)
    assert privileged.student_ids == views.student_ids != privileged.full_ids
