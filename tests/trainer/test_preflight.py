"""Checks of a dry run and of `launch` before a run starts. The run makes the same checks."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from aropd_mcore import cli
from aropd_mcore.config import ConfigError
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.manifest import newest
from aropd_mcore.trainer.preflight import preflight
from tests.conftest import REPO
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import NUM_ROWS, write_model, write_run
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, save_tiny_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    write_run(folder, training={"num_steps": 2}, objective={"name": "sft"})
    return folder


@pytest.fixture
def run(original, tmp_path, monkeypatch) -> Path:
    """YAML file of a copy of the run, with relative paths, in the working directory. A test may
    damage the copy."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run.yaml"
    path.write_text(path.read_text().replace(f"{original}/", ""))
    monkeypatch.chdir(tmp_path)
    return Path("run.yaml")


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """File that exists after a call of sbatch."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/sh\ntouch '{calls}'\n")
    (folder / "sbatch").chmod(0o700)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    for name in ("CONTAINER_IMAGE", "CONTAINER_MOUNTS", "VENV", "RANKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    return calls


def rewrite(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def change_tensor(name: str, change: Callable | None) -> None:
    tensors = load_file("model/model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})


def forget_tokenizer() -> None:
    for path in Path("model").glob("*token*"):
        path.unlink()


def smaller_vocabulary() -> None:
    shutil.rmtree("model")
    write_model(Path("model"))
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change_tensor(name, lambda weight: weight[:200].contiguous())


def read_rows() -> list[dict]:
    return [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]


def write_rows(rows: list[dict]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def no_weight() -> None:
    write_rows([row | {"sample_weight": 0} for row in read_rows()])


NOTHING: Callable[[], object] = lambda: None  # noqa: E731
CANNOT_START: list[tuple[str, Callable[[], object], list[str], str]] = [
    ("no data", NOTHING, ["data.train=[none.jsonl]"], "none.jsonl: no such file"),
    (
        "a broken row",
        lambda: rewrite("rows.jsonl", '"question": "QQ 2', '"qestion": "QQ 2'),
        [],
        "rows.jsonl:3: key 'question' is missing",
    ),
    ("no row", lambda: Path("rows.jsonl").write_text(""), [], "at least one usable row"),
    ("no prompt fits", NOTHING, ["views.max_prompt_tokens=10"], "rows.jsonl:1: the student view"),
    ("no weight above 0", no_weight, [], "expected a row with a sample_weight above 0"),
    ("no weights", lambda: Path("model/model.safetensors").unlink(), [], "holds no weights"),
    (
        "a missing weight",
        lambda: change_tensor("model.norm.weight", None),
        [],
        "model.norm.weight is missing",
    ),
    (
        "a weight of another shape",
        lambda: change_tensor("model.norm.weight", lambda weight: weight[1:].contiguous()),
        [],
        "model.norm.weight has shape",
    ),
    ("no tokenizer", forget_tokenizer, [], "model: no tokenizer in this folder"),
    ("no model", NOTHING, ["model.path=nowhere"], "nowhere/config.json: cannot be read"),
    ("tokens beyond the vocabulary", smaller_vocabulary, [], "outside the model's vocabulary"),
    (
        "a broken chat template",
        lambda: Path("model/chat_template.jinja").write_text("{% if %}"),
        [],
        "model/chat_template.jinja: line 1: the chat template failed",
    ),
    ("a template's field", NOTHING, ["views.student_template=x"], "views.student_template"),
    (
        "an epoch of no step",
        NOTHING,
        ["training={num_epochs: 1, global_batch_size: 32}"],
        f"training.num_epochs 1 of {NUM_ROWS} rows: fewer than one step of 32 prompts",
    ),
    (
        "output_dir is a file",
        lambda: Path("file").write_text(""),
        ["output_dir=file/run"],
        "file is a file, expected a folder",
    ),
    (
        "the model's files have no folder",
        lambda: (Path("out").mkdir(), Path("out/hf").write_text("")),
        [],
        "out/hf is a file, expected a folder",
    ),
    (
        "no interpreter of vLLM",
        NOTHING,
        ["objective.name=aropd", "rollout.engine=vllm", "rollout.vllm.python=none/python"],
        "rollout.vllm.python none/python: no such program",
    ),
    (
        "no vLLM",
        NOTHING,
        ["objective.name=aropd", "rollout.engine=vllm"],
        "rollout.vllm.python is null, and ",
    ),
    (
        "too long for the model",
        NOTHING,
        ["views.max_prompt_tokens=100000"],
        "views.max_prompt_tokens 100000 + rollout.max_response_tokens 16",
    ),
]


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [case[1:] for case in CANNOT_START],
    ids=[case[0] for case in CANNOT_START],
)
def test_dry_run_and_launch_of_an_invalid_run_exit_with_2(
    run, sbatch, capsys, damage, overrides, message
):
    damage()
    before = sorted(Path().rglob("*"))
    commands = (["train", "--dry-run"], ["launch", "--gpus-per-node=1", "--dry-run"])
    for command, *options in (*commands, ["launch", "--gpus-per-node=1"]):
        assert cli.main([command, str(run), *overrides, *options]) == 2, (command, options)
        error = capsys.readouterr().err
        assert error.startswith("aropd: error: ") and message in error, error
        assert error.count("\n") == 1, error
    assert sorted(Path().rglob("*")) == before and not sbatch.exists()


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_missing_package_of_a_logger_is_refused(run, sbatch, monkeypatch, capsys, package):
    """A folder of the package's name, such as W&B's own logs, is not the package."""
    value = {"wandb": "offline", "tensorboard": "true"}[package]
    command = [str(run), f"logging.{package}={value}"]
    Path(package).mkdir()
    monkeypatch.setattr(sys, "path", [os.getcwd()])
    monkeypatch.delitem(sys.modules, package, raising=False)
    for words in (["train", *command, "--dry-run"], ["launch", *command, "--gpus-per-node=1"]):
        assert cli.main(words) == 2
        assert f"pip install 'aropd-mcore[{package}]'" in capsys.readouterr().err
    # In a container the job has its own environment.
    monkeypatch.setenv("CONTAINER_IMAGE", "image")
    assert cli.main(["launch", *command, "--gpus-per-node=1"]) == 0 and sbatch.exists()


def test_launch_with_renaming_mounts_skips_the_checks(run, sbatch, monkeypatch, capsys):
    Path("rows.jsonl").unlink()
    monkeypatch.setenv("CONTAINER_IMAGE", "image")
    monkeypatch.setenv("CONTAINER_MOUNTS", "/data:/data:ro,/scratch/me:/work")
    assert cli.main(["launch", str(run), "--gpus-per-node=1", "--dry-run"]) == 0
    assert "# data and weights are not checked: CONTAINER_MOUNTS renames /scratch/me" in (
        capsys.readouterr().out
    )
    monkeypatch.setenv("CONTAINER_MOUNTS", "/data:/data:ro,/scratch")
    assert cli.main(["launch", str(run), "--gpus-per-node=1", "--dry-run"]) == 2
    monkeypatch.delenv("CONTAINER_IMAGE")
    assert cli.main(["launch", str(run), "--gpus-per-node=1", "--", "--chdir=/tmp"]) == 2
    assert "call `aropd launch` in the other folder" in capsys.readouterr().err


def test_dry_run_reports_rows_prompts_and_start(run, capsys):
    rows = read_rows()
    rows[2] = {"question": "no trace"}
    rows[4]["reasoning"] = rows[6]["reasoning"] = "word"
    rows[5]["question"] = "long " * 100
    write_rows(rows)
    save_tiny_tokenizer(
        Path("model"),
        chat_template=CHAT_TEMPLATE.replace("{% if add_generation_prompt %}", "{% if false %}"),
    )
    overrides = ["data.on_bad_row=skip", "objective.name=aropd", "training.global_batch_size=4"]
    assert cli.main(["train", str(run), *overrides, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "# 23 rows (1 left out, first: rows.jsonl:3: key 'reasoning' is missing",
        ", 2 steps of 4 responses",
        "# longest prompt: 128 of 128 tokens (views.max_prompt_tokens); responses: up to 16 tokens",
        "# the question of 1 of 23 rows is cut to fit views.max_prompt_tokens; first: rows.jsonl:6",
        "# the partial view of 2 of 23 rows equals the full view, so their residual is zero; "
        "first: rows.jsonl:5",
        "the chat template ignores add_generation_prompt",
        "# the run will start at step 0: there is no checkpoint",
    ):
        assert line in printed, line
    assert not Path("out").exists()
    assert cli.main(["train", str(run), *overrides, "objective.name=sft", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "equals the full view" not in printed
    assert "# the trace of 18 of 23 rows is cut to rollout.max_response_tokens" in printed


def test_preflight_does_not_import_megatron(run):
    program = (
        "import sys\nfrom pathlib import Path\nfrom aropd_mcore.config_file import load_config\n"
        "from aropd_mcore.trainer.preflight import preflight\n"
        f"preflight(load_config(Path({str(run)!r})))\n"
        "assert 'megatron' not in sys.modules, sorted(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        check=True,
        timeout=120,
    )


# --- resumed runs ---


@pytest.fixture(scope="module")
def trained(original) -> str:
    """Output of the run, trained for two steps."""
    printed, error = run_ranks(train_here, 1, original / "run.yaml", [])[0]
    assert error is None
    return printed


def train_here(path: Path, overrides: list[str]) -> tuple[str, str | None]:
    """Train; return the output and the text of the error, if there was one."""
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.loop import train

    config = load_config(path, overrides)
    with redirect_stdout(StringIO()) as printed:
        try:
            train(config, start_runtime(config))
        except ConfigError as error:
            return printed.getvalue(), str(error)
    return printed.getvalue(), None


def other_template(folder: Path) -> Path:
    """Copy the model of a run, with another chat template."""
    model = folder / "other"
    shutil.copytree(folder / "model", model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("<|im_start|>", "BEGIN "))
    return model


def other_tokenizer(folder: Path) -> Path:
    """Copy the model of a run, with two ids of its tokenizer exchanged."""
    model = folder / "other"
    shutil.copytree(folder / "model", model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def test_run_with_another_chat_template_does_not_resume(trained, original, tmp_path):
    """The template changes in the same folder, as by a user's edit."""
    assert "longest prompt: " in trained
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    shutil.rmtree(folder / "model")
    shutil.move(other_template(original), folder / "model")
    overrides = ["training.num_steps=4", f"output_dir={folder / 'out'}"]
    overrides.append(f"model.path={folder / 'model'}")
    _, error = run_ranks(train_here, 1, original / "run.yaml", overrides)[0]
    assert error and "the checkpoint belongs to another run:\n  model.chat_template " in error
    assert "or permit the changes with 'checkpoint.allow_changes=[model.chat_template]'" in error

    allowed = [*overrides, "checkpoint.allow_changes=[model.chat_template]"]
    printed, error = run_ranks(train_here, 1, original / "run.yaml", allowed)[0]
    assert error is None
    assert "effective from this step: " in printed and "model.chat_template " in printed
    assert len((folder / "out" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("other", "key"),
    [(other_template, "model.chat_template"), (other_tokenizer, "model.tokenizer")],
)
def test_dry_run_refuses_the_changes_that_the_run_refuses(trained, original, tmp_path, other, key):
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    overrides = [f"model.path={other(tmp_path)}"]
    with pytest.raises(ConfigError, match=f"another run:\n  {key} "):
        preflight(load_config(original / "run.yaml", overrides))
    overrides.append(f"checkpoint.allow_changes=[{key}]")
    *_, note = preflight(load_config(original / "run.yaml", overrides))
    assert f"effective from this step: {key} " in note


def test_dry_run_reports_where_the_run_resumes(trained, original, tmp_path):
    path, out = original / "run.yaml", tmp_path / "out"
    shutil.copytree(original / "out", out)
    overrides = [f"output_dir={out}", "training.num_steps=4", "views.partial_ratio=0.25"]
    notes = preflight(load_config(path, overrides))
    assert f"the run will resume at step 2 from {out / 'checkpoints' / 'iter_0000002'}" in notes
    assert any("effective from this step" in n and "views.partial_ratio" in n for n in notes)
    notes = preflight(load_config(path, [f"output_dir={out}"]))
    assert any("; no step is left" in note for note in notes)
    with pytest.raises(ConfigError, match=r"another run:\n  training\.seed 1234 -> 5"):
        preflight(load_config(path, [*overrides, "training.seed=5"]))

    checkpoint = newest(out / "checkpoints")
    assert checkpoint is not None
    damaged = checkpoint.with_name("iter_0000003")
    shutil.copytree(checkpoint, damaged)
    (damaged / ".metadata").write_bytes(b"")
    notes = preflight(load_config(path, overrides))
    assert any("has 0 bytes, expected" in n and "set this checkpoint aside" in n for n in notes)
    assert f"the run will resume at step 2 from {checkpoint}" in notes
    shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="none of the checkpoints is intact") as error:
        preflight(load_config(path, overrides))
    assert ".metadata: has 0 bytes" in str(error.value)


def test_preflight_when_no_token_counts_in_the_loss_notes_it(run):
    for skip, is_noted in ((15, False), (16, True)):
        config = load_config(run, [f"objective.skip_response_tokens={skip}"])
        text = f"skip_response_tokens is {skip}, expected less than rollout.max_response_tokens 16"
        assert any(text in sentence for sentence in preflight(config)) == is_noted
