"""Configuration: defaults, overrides, refused values and their messages."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.config_file import dump_config, load_config
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.setup import build_setup
from tests.conftest import REPO

CLUSTERS = REPO / "examples" / "clusters"
EXAMPLES = sorted((REPO / "examples").rglob("*.yaml"))
SMALLEST = {
    "output_dir": "runs/one",
    "model": {"path": "models/one"},
    "data": {"train": ["rows.jsonl"]},
    "training": {"num_steps": 10},
}


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "run.yaml", SMALLEST)


def write(path: Path, tree: Any) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def test_defaults_are_the_reference_settings(path):
    """METHOD section 6."""
    config = load_config(path)
    objective, optimizer = config.objective, config.optimizer
    assert (objective.residual_scale, objective.residual_clip) == (0.8, 5.0)
    assert (objective.divergence, objective.reduction) == ("kl_target_student", "sequence_mean")
    assert objective.skip_response_tokens == 3
    assert (config.views.partial_view, config.views.partial_ratio) == ("prefix_with_answer", 0.5)
    assert (config.rollout.rollouts_per_prompt, config.prompts_per_step) == (1, 32)
    assert (config.views.max_prompt_tokens, config.rollout.max_response_tokens) == (1024, 1024)
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 1.0)
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_ratio) == (2e-5, "cosine", 0.1)
    assert (optimizer.min_lr, optimizer.clip_grad) == (0.0, 1.0)
    assert (config.teacher.kind, config.teacher.ema_rate) == ("ema", 0.01)


@pytest.mark.parametrize(
    ("overrides", "views"),
    [
        ("", ("partial", "full")),
        ("metrics=false", ("partial", "full")),
        ("residual_scale=0", ("partial", "full")),
        ("residual_scale=0 metrics=false", ("partial",)),
        ("residual_scale=1 metrics=false", ("partial", "full")),
        ("residual_scale=1 residual_clip=null metrics=false", ("full",)),
        ("name=sft", ()),
    ],
)
def test_objective_views_of_each_setting(path, overrides, views):
    config = load_config(path, [f"objective.{override}" for override in overrides.split()])
    assert config.objective.views == views
    setup = build_setup(config, 1, architecture=read_architecture(CLUSTERS / "Qwen2.5-7B-Instruct"))
    assert (setup.num_views, setup.teacher) == (len(views), "ema" if views else None)


def test_overrides_are_yaml_at_dotted_keys(path):
    config = load_config(
        path,
        [
            "optimizer.lr=1e-5",
            "objective.residual_clip=null",
            "data.train=[a.jsonl, b.parquet]",
            "views.student_template='{question} = ?'",
            "rollout.top_k=5",
        ],
    )
    assert config.optimizer.lr == 1e-5
    assert config.objective.residual_clip is None
    assert config.data.train == [Path("a.jsonl"), Path("b.parquet")]
    assert config.views.student_template == "{question} = ?"
    assert config.rollout.top_k == 5
    assert load_config(path).optimizer.lr == 2e-5, (
        "an override must not change later loads of the file"
    )


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", ".1e-4"])
def test_float_in_any_notation_is_a_float(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST) + f"optimizer: {{lr: {text}}}\n")
    assert load_config(path).optimizer.lr == pytest.approx(1e-5)


def test_dumped_config_loads_as_the_same_config(path, tmp_path):
    sources = "[a.jsonl, hf://b/c/test, {path: d.zst, weight: 0.5}, {path: hf://b/c, weight: 2}]"
    overrides = [f"data.train={sources}", "validation.rows=[hf://b/c]"]
    overrides += ["views.partial_ratio=[0.25, 0.5]"]
    config = load_config(path, ["objective.residual_clip=null", "optimizer.lr=3e-7", *overrides])
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        (
            "objective.residual_scal=1",
            "objective.residual_scal",
            "unknown key; did you mean 'residual_scale'?",
        ),
        ("optimiser.lr=1", "optimiser", "unknown key; did you mean 'optimizer'?"),
        (
            "logging.zzz=1",
            "logging.zzz",
            "unknown key; known keys: tensorboard, wandb, wandb_project, samples, "
            "samples_every_steps",
        ),
        (
            "optimizer.lr=fast",
            "optimizer.lr",
            "Input should be a valid number, unable to parse string as a number, found 'fast'",
        ),
        ("optimizer.lr=0", "optimizer.lr", "Input should be greater than 0, found 0"),
        (
            "views.partial_ratio=1.5",
            "views.partial_ratio",
            "Input should be less than or equal to 1, found 1.5",
        ),
        (
            "views.partial_ratio=[0.5, 2]",
            "views.partial_ratio.1",
            "Input should be less than or equal to 1, found 2",
        ),
        (
            "views.partial_ratio=[]",
            "views.partial_ratio",
            "List should have at least 1 item after validation, not 0, found []",
        ),
        ("views.partial_ratio=[true]", "views.partial_ratio", "expected a number, found true"),
        (
            "data.train=[{path: a.jsonl, weight: 0}]",
            "data.train.0.weight",
            "Input should be greater than 0, found 0",
        ),
        (
            "data.train=[{path: a.jsonl, weight: 1e9}]",
            "data.train.0.weight",
            "Input should be less than or equal to 1000, found 1000000000.0",
        ),
        (
            "data.train=[a.jsonl, {path: b.jsonl, weight: 1, wieght: 2}]",
            "data.train.1.wieght",
            "unknown key; did you mean 'weight'?",
        ),
        (
            "data.train=[hf://gsm8k]",
            "data.train.0",
            "hf://gsm8k: expected hf://NAMESPACE/NAME[@REVISION][/SUBSET][/SPLIT]",
        ),
        (
            "training.global_batch_size=2.5",
            "training.global_batch_size",
            "Input should be a valid integer, got a number with a fractional part, found 2.5",
        ),
        (
            "objective.divergence=kl",
            "objective.divergence",
            "Input should be 'kl_target_student', 'kl_student_target' or 'jsd', found 'kl'",
        ),
        (
            "rollout.vllm.urls=[node7:8000]",
            "rollout.vllm.urls.0",
            "String should match pattern '^https?://', found 'node7:8000'",
        ),
        (
            "rollout.vllm={placement: colocated, urls: ['http://node7:8000']}",
            "rollout.vllm",
            "placement colocated with urls: expected servers that the run starts on its GPUs; "
            "remove urls, or set placement to separate",
        ),
        (
            "rollout.vllm={placement: colocated, sync: nccl}",
            "rollout.vllm",
            "placement colocated with sync nccl: expected sync disk, since NCCL does not connect "
            "two processes on one GPU; remove sync",
        ),
        (
            "rollout.vllm.devices=['0', '1', '2']",
            "rollout.vllm",
            "devices has 3 entries: expected one per server, and servers is 1; change one of them",
        ),
        (
            "data.train=[]",
            "data.train",
            "List should have at least 1 item after validation, not 0, found []",
        ),
        (
            "teacher=ema",
            "teacher",
            "Input should be a valid dictionary or instance of TeacherConfig, found 'ema'",
        ),
        (
            "training.num_epochs=1",
            "training",
            "found both of num_steps and num_epochs: set exactly one of them",
        ),
        (
            "training.num_steps=null",
            "training",
            "found neither of num_steps and num_epochs: set exactly one of them",
        ),
        (
            "training.micro_batch_size=5",
            "training",
            "global_batch_size 32: expected a multiple of micro_batch_size 5; change one of them",
        ),
        (
            "rollout.rollouts_per_prompt=5",
            "(top level)",
            "training.global_batch_size 32: expected a multiple of rollout.rollouts_per_prompt 5; "
            "change one of them",
        ),
        (
            "precision={fp8: hybrid, fp8_recipe: delayed, bf16_last_layers: 1}",
            "precision",
            "bf16_first_layers 0 and bf16_last_layers 1: expected 0 and 0 with fp8_recipe delayed, "
            "which collects its statistics over all layers; choose another recipe",
        ),
        (
            "teacher={kind: live, weights: host}",
            "teacher",
            "weights host and kind live: expected weights device, since a live teacher is the "
            "student itself; set weights to device or choose another kind",
        ),
        (
            "parallel.overlap_param_gather=true",
            "parallel.overlap_param_gather",
            "found true, a key that was removed; remove the key; updated parameters are gathered "
            "right after the update",
        ),
        (
            "rollout={engine: megatron, batch_size: 8}",
            "rollout.engine",
            'found "megatron", a value that was removed; expected vllm, the fast engine, or '
            "native, which samples in every layout",
        ),
        (
            "rollout.async_steps=2",
            "rollout",
            "async_steps 2 and engine native: expected engine vllm, since the training model "
            "cannot sample while it trains; set async_steps to 0 or engine to vllm",
        ),
        ("optimizer.lr=.nan", "optimizer.lr", "Input should be a finite number, found nan"),
        (
            "objective.residual_clip=.inf",
            "objective.residual_clip",
            "Input should be a finite number, found inf",
        ),
    ],
)
def test_invalid_value_is_refused(path, override, key, message):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert str(caught.value) == f"{path}: {key}: {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "override 'optimizer.lr': expected section.key=value"),
        ("=3", "override '=3': expected section.key=value"),
        ("output_dir.x=3", "override 'output_dir.x=3': output_dir is a value, not a section"),
        ("data.train=[a", "override 'data.train=[a': not YAML"),
    ],
)
def test_invalid_override_is_refused(path, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert str(caught.value).startswith(message)


def test_load_config_with_the_default_of_a_removed_key_ignores_it(tmp_path, path):
    """The config.yaml of a run of an earlier version has this key."""
    tree = load_config(path).model_dump(mode="json")
    tree["parallel"]["overlap_param_gather"] = False
    assert load_config(write(tmp_path / "config.yaml", tree)) == load_config(path)


def test_load_config_with_an_earlier_name_of_a_value_renames_it(tmp_path, path):
    tree = load_config(path).model_dump(mode="json")
    assert tree["views"]["partial_cut"] == "words"
    tree["views"]["partial_cut"] = "word_end"
    assert load_config(write(tmp_path / "config.yaml", tree)) == load_config(path)


def test_invalid_file_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    for tree, message in (
        ({}, "output_dir: missing; this key is required"),
        (["a list"], "found list at the top level, expected a mapping"),
        ({**SMALLEST, "model": {}}, "model.path: missing; this key is required"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(write(path, tree))
    path.write_text("training: [")
    with pytest.raises(ConfigError, match=r"run\.yaml: not YAML"):
        load_config(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="the file has no settings; expected a mapping at"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"run\.yaml: not UTF-8"):
        load_config(path)


def test_config_with_several_problems_names_all_of_them(path):
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["optimizer.lr=-1", "modle.path=x"])
    assert "optimizer.lr" in str(caught.value) and "did you mean 'model'" in str(caught.value)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.relative_to(REPO)))
def test_shipped_yaml_loads(example):
    load_config(example)


def test_sequence_parallelism_without_tensor_parallelism_is_refused(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("parallel: {sequence: true}")
    with pytest.raises(ConfigError, match=r"parallel: sequence is true and tensor is 1"):
        load_config(path)


def test_fp8_with_fp32_or_another_format_for_a_live_teacher_is_refused(path):
    load_config(path, ["precision.teacher_fp8=e4m3"])
    for overrides, message in (
        (["precision.fp8=e4m3", "model.dtype=fp32"], "fp8 products with model.dtype fp32"),
        (
            ["precision.teacher_fp8=e4m3", "teacher.kind=live"],
            "teacher_fp8 e4m3: expected as_student",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path, overrides)


def test_examples_exist():
    assert EXAMPLES


def test_every_setting_is_documented():
    def undocumented(model: type[BaseModel], prefix: str) -> list[str]:
        names = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                names += undocumented(field.annotation, f"{prefix}{name}.")
            elif not (field.description or "").strip():
                names.append(prefix + name)
        return names

    assert undocumented(Config, "") == []
