"""Presets: changed settings, precedence, and the loss of each method."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

from aropd_mcore import cli
from aropd_mcore.config import Config, ConfigError
from aropd_mcore.config_file import PRESETS, load_config, preset_changes
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.numerics import vocab_parallel_anchored_residual_kl
from aropd_mcore.types import Row
from tests.conftest import REPO
from tests.support.oracles import kl
from tests.support.tiny_runs import write_run
from tests.support.tiny_tokenizer import save_tiny_tokenizer

SMALLEST = {
    "output_dir": "runs/one",
    "model": {"path": "models/one"},
    "data": {"train": ["rows.jsonl"]},
    "training": {"num_steps": 10},
}
FULL_VIEW = {"objective.residual_scale": 1.0, "objective.residual_clip": None}
BEYOND_FULL_VIEW = {
    "objective.residual_scale": 1.25,
    "objective.residual_clip": None,
    "views.partial_view": "prefix_without_answer",
    "views.partial_ratio": 0.0,
}
CHANGES = {
    "reference": {
        "views.partial_cut": "reference",
        "views.on_long_prompt": "cut_chat",
        "objective.reduction": "sequence_mean_all",
        "objective.temper_logits": True,
        "objective.sft_prompt_loss": True,
        "teacher.fp32_master": False,
    },
    "opsd": {
        **FULL_VIEW,
        "objective.divergence": "jsd",
        "objective.reduction": "token_mean",
        "objective.skip_response_tokens": 0,
        "objective.temper_logits": True,
        "teacher.kind": "frozen",
    },
    "sdft": FULL_VIEW,
    "er_opd": BEYOND_FULL_VIEW,
    "g_opd": {
        **BEYOND_FULL_VIEW,
        "objective.divergence": "kl_student_target",
        "objective.skip_response_tokens": 0,
        "teacher.kind": "frozen",
    },
}
"""Settings that each preset changes in a run with default settings."""


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def settings(config: Config) -> dict:
    tree = config.model_dump(mode="json", exclude={"output_dir"})
    sections = {name: keys for name, keys in tree.items() if keys is not None}
    return {f"{section}.{key}": v for section, keys in sections.items() for key, v in keys.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_changes_exactly_its_settings(path, preset):
    before, config = settings(load_config(path)), load_config(path, preset=preset)
    changed = {key: v for key, v in settings(config).items() if v != before[key]}
    assert changed == CHANGES[preset]
    assert {line.split(":")[0] for line in preset_changes(path, preset, config)} == changed.keys()


def test_preset_takes_precedence_over_the_file_and_overrides_over_both(path):
    tree = SMALLEST | {"objective": {"name": "sft", "residual_scale": 0.6, "jsd_weight": 0.3}}
    path.write_text(yaml.safe_dump(tree))
    overrides = ["objective.jsd_weight=0.9", "teacher.kind=live"]
    config = load_config(path, overrides, preset="opsd")
    assert (config.objective.name, config.objective.residual_scale) == ("aropd", 1.0)
    assert (config.objective.jsd_weight, config.teacher.kind) == (0.9, "live")
    lines = preset_changes(path, "opsd", config)
    assert 'objective.name: "sft" -> "aropd"' in lines
    assert "objective.residual_scale: 0.6 -> 1.0" in lines
    assert "objective.jsd_weight: 0.3 -> 0.5, replaced by an override: 0.9" in lines
    assert 'teacher.kind: "ema" -> "frozen", replaced by an override: "live"' in lines
    # A value that the file already has is no change.
    path.write_text(yaml.safe_dump(SMALLEST | {"objective": {"residual_clip": None}}))
    assert preset_changes(path, "sdft", load_config(path, preset="sdft")) == [
        "objective.residual_scale: 0.8 -> 1.0"
    ]


def test_unknown_preset_is_refused_in_one_line(path, capsys):
    for command in ("train", "plan", "launch", "serve"):
        assert cli.main([command, str(path), "--preset", "../opsd"]) == 2
        assert capsys.readouterr().err == (
            "aropd: error: preset '../opsd': expected one of er_opd, g_opd, opsd, reference, sdft\n"
        )
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "er_opd, g_opd, opsd, reference, sdft" in " ".join(capsys.readouterr().out.split())


def test_temper_logits_with_temperature_0_is_refused(path):
    with pytest.raises(ConfigError, match=r"temper_logits true and rollout.temperature 0"):
        load_config(path, ["rollout.temperature=0"], preset="opsd")
    # sft does not divide the logits.
    load_config(path, ["rollout.temperature=0", "objective.name=sft"], preset="reference")


@pytest.mark.rest
def test_run_with_a_preset_resumes_without_changes(tmp_path, capsys):
    run = write_run(tmp_path, training={"num_steps": 1}, objective={"name": "sft"})
    command = ["train", str(run), "--preset", "reference", "objective.reduction=token_mean"]
    command += ["--nproc-per-node", "2"]
    assert cli.main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "# preset reference: objective.sft_prompt_loss: false -> true\n" in printed
    assert 'sequence_mean" -> "sequence_mean_all", replaced by an override: "token_' in printed
    assert not (tmp_path / "out").exists()

    environment = os.environ | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "aropd_mcore.cli", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    resolved = load_config(tmp_path / "out" / "config.yaml")
    assert resolved == load_config(run, ["objective.reduction=token_mean"], preset="reference")

    assert cli.main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "the run will resume at step 1" in printed and "# settings changed" not in printed


def extrapolate(log_p, log_f):
    return torch.log_softmax(1.25 * log_f - 0.25 * log_p, -1)


def jensen_shannon(log_q, log_s):
    log_m = ((log_q.exp() + log_s.exp()) / 2).log()
    return (kl(log_q, log_m) + kl(log_s, log_m)) / 2


@pytest.mark.parametrize(
    ("preset", "compute_loss"),
    [
        ("opsd", lambda log_s, log_p, log_f: jensen_shannon(log_f, log_s)),
        ("sdft", lambda log_s, log_p, log_f: kl(log_f, log_s)),
        ("er_opd", lambda log_s, log_p, log_f: kl(extrapolate(log_p, log_f), log_s)),
        ("g_opd", lambda log_s, log_p, log_f: kl(log_s, extrapolate(log_p, log_f))),
    ],
)
def test_loss_of_a_preset_equals_the_published_equation(path, preset, compute_loss):
    """Loss and gradient are compared."""
    objective = load_config(path, preset=preset).objective
    torch.manual_seed(0)
    student, partial, full = (3 * torch.randn(5, 40, dtype=torch.float64) for _ in range(3))
    student.requires_grad_()
    expected = compute_loss(*(torch.log_softmax(x, -1) for x in (student, partial, full)))
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    loss_T, _ = vocab_parallel_anchored_residual_kl(
        student,
        partial,
        full,
        residual_scale=objective.residual_scale,
        residual_clip=objective.residual_clip,
        divergence=objective.divergence,
        jsd_weight=objective.jsd_weight,
        vocab_size=40,
    )
    assert_close(loss_T, expected)
    assert_close(torch.autograd.grad(loss_T.sum(), student)[0], gradient)


@pytest.mark.parametrize("preset", ["er_opd", "g_opd"])
def test_partial_view_of_extrapolation_equals_the_student_view(path, tmp_path, preset):
    builder = ViewBuilder(save_tiny_tokenizer(tmp_path), load_config(path, preset=preset).views)
    views = builder.build(Row("1 + 1?", "One and one make two.", "2"))
    assert views.partial_ids == views.student_ids != views.full_ids
