"""Remedies that make a job fit, the order of layouts, and the output of `aropd plan`."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from pydantic import ValidationError

from aropd_mcore.cli import main
from aropd_mcore.config import Config
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.convert.tensors import padded_vocab_size
from aropd_mcore.plan.cost import step_time
from aropd_mcore.plan.fit import build_planned_run, remedies, sweep
from aropd_mcore.plan.layout import plan
from aropd_mcore.plan.memory import stage_memory, worst_stage
from aropd_mcore.plan.parameters import rank_parameters
from aropd_mcore.plan.setup import Setup, build_setup
from tests.conftest import REPO
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_runs import tiny_config

CLUSTERS = REPO / "examples" / "clusters"
GPUS = {
    "qwen2.5-7b-8xh100.yaml": 8,
    "qwen2.5-32b-to-7b-16xh100.yaml": 16,
    "qwen2.5-two-teachers-16xh100.yaml": 16,
    "qwen3-32b-32xh100.yaml": 32,
    "llama3.1-70b-64xh100.yaml": 64,
    "llama3.1-70b-lora-8xh100.yaml": 8,
    "qwen3-235b-a22b-256xh100.yaml": 256,
    "gpt-oss-20b-16xh100.yaml": 16,
    "glm-4.5-air-64xh100.yaml": 64,
    "deepseek-v3-1024xh100.yaml": 1024,
}


@pytest.mark.parametrize("name", GPUS)
def test_cluster_examples_fit_and_pass_the_dry_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    """The examples fit into 80 GB, with 5 GB for fragmentation, and `train` accepts the layout."""
    monkeypatch.chdir(REPO)
    path = str(CLUSTERS / name)
    assert {p.name for p in CLUSTERS.glob("*.yaml")} == set(GPUS)
    assert main(["plan", path, "--gpus", str(GPUS[name]), "--memory", "75"]) == 0
    printed = capsys.readouterr().out
    assert "\nfits into 75 GB" in printed and "per node of 8" in printed
    assert plan(load_config(Path(path)), GPUS[name]).world_size == GPUS[name]
    # A dry run fails only because these folders hold no weights.
    assert main(["train", path, "--dry-run", "--nproc-per-node", str(GPUS[name])]) == 2
    assert "holds no weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, expected",
    [
        ("rollout.max_response_tokens=8192", {"parallel.tensor=4", "teacher.weights=host"}),
        (
            "training.micro_batch_size=8",
            {"training.recompute=full", "training.micro_batch_size=1", "parallel.context=8"},
        ),
    ],
)
def test_each_remedy_makes_the_job_fit(override: str, expected: set[str], monkeypatch, capsys):
    """Each remedy is passed to the command as printed."""
    monkeypatch.chdir(REPO)
    path = str(CLUSTERS / "qwen2.5-7b-8xh100.yaml")
    room = ["--memory", "58"]
    job = build_planned_run(
        load_config(Path(path), [override]), 8, gpus_per_node=8, memory_bytes=58e9
    )
    suggested = [remedy.change for remedy in remedies(job)]
    assert main(["plan", path, override, *room]) == 0
    printed = capsys.readouterr().out
    assert "\ndoes not fit into 58 GB" in printed
    assert expected & set(suggested), suggested
    for change in suggested:
        assert change in printed
        assert main(["plan", path, override, *room, *_arguments(change)]) == 0
        assert "\nfits into 58 GB" in capsys.readouterr().out, change


def _arguments(change: str) -> list[str]:
    return change.split() if change.startswith("--") else [change]


@pytest.mark.slow
def test_sweep_is_sorted_and_fits(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(REPO)
    path = CLUSTERS / "qwen2.5-7b-8xh100.yaml"
    job = build_planned_run(load_config(path), 8, gpus_per_node=8, memory_bytes=80e9)
    fitting = sweep(job)
    times = [estimate.mean_total for estimate in fitting]
    assert times == sorted(times)
    assert all(estimate.setup.world_size == 8 for estimate in fitting)
    assert max(estimate.memory.peak for estimate in fitting) <= 80e9
    layouts = {(e.setup.tensor, e.setup.pipeline, e.setup.context, e.setup.data) for e in fitting}
    assert (2, 1, 1, 4) in layouts and (8, 1, 1, 1) not in layouts  # 4 key/value heads
    assert main(["plan", str(path), "--sweep"]) == 0
    assert f"{len(fitting)} layouts fit" in capsys.readouterr().out


PARALLEL = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "sequence")
SPLIT = ("layers_in_first_stage", "layers_in_last_stage", "pipeline_layout")
TRAINING = ("recompute", "micro_batch_size")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sweep_lists_every_layout_that_fits(family: str, tmp_path: Path):
    """The sweep equals a search over all settings that the config and `plan` accept: 4 key/value
    heads, 4 layers and 4 experts, on 8 GPUs."""
    save_tiny_model(family, tmp_path, max_position_embeddings=4096)
    tree = tiny_config(tmp_path, tmp_path / "rows.jsonl", tmp_path / "out")
    tree["views"] = {"max_prompt_tokens": 2048}
    tree["rollout"] = {"max_response_tokens": 2048}
    peaks = {}
    sizes = (1, 2, 4, 8)
    for values in product(
        *(sizes, sizes, sizes, sizes, sizes, (False, True)),
        *(("none", "selective", "full"), sizes),
    ):
        parallel = dict(zip(PARALLEL, values, strict=False))
        training = dict(zip(TRAINING, values[len(PARALLEL) :], strict=True))
        try:
            config = Config.model_validate(
                {**tree, "parallel": parallel, "training": tree["training"] | training}
            )
            peaks[values] = worst_stage(build_setup(config, 8)).peak
        except (ValidationError, ValueError):
            continue
    assert any(values[PARALLEL.index("virtual_pipeline")] == 2 for values in peaks)
    assert any(values[PARALLEL.index("expert")] == 4 for values in peaks) == (family == "mixtral")
    room = sorted(peaks.values())[len(peaks) // 2]
    job = build_planned_run(Config.model_validate(tree), 8, gpus_per_node=8, memory_bytes=room)
    fitting = [_settings(estimate.setup) for estimate in sweep(job)]
    assert len(fitting) == len(set(fitting))
    assert set(fitting) == {values for values, peak in peaks.items() if peak <= room}


def _settings(setup: Setup) -> tuple:
    return tuple(getattr(setup, name) for name in PARALLEL + TRAINING)


@pytest.mark.parametrize(
    "pipeline, split, layers",
    [
        (4, {"layers_in_first_stage": 23, "layers_in_last_stage": 23}, (23, 24, 24, 23)),
        (8, {"layers_in_last_stage": 10}, (12,) * 7 + (10,)),
        (16, {"pipeline_layout": "Et*5|(t*6|)*14t*5L"}, (5, *(6,) * 14, 5)),
    ],
)
def test_plan_counts_the_layers_of_uneven_stages(pipeline: int, split: dict, layers: tuple):
    """94 layers on 4, 8 and 16 stages. All stages together have the model's parameters."""
    model = read_architecture(CLUSTERS / "Qwen3-235B-A22B")
    setup = Setup(model, pipeline=pipeline, num_microbatches=2 * pipeline, **split)
    assert setup.stage_layers == layers
    parts = [rank_parameters(setup, stage).total for stage in range(pipeline)]
    padding = padded_vocab_size(model.vocab_size, 1) - model.vocab_size
    assert sum(parts) == model.num_parameters + 2 * padding * model.hidden_size
    # The compared stages have the largest peak of all, and a step waits for the most layers.
    peaks = [stage_memory(setup, stage).peak for stage in range(pipeline)]
    assert worst_stage(setup).peak == max(peaks)
    one_stage = replace(setup, pipeline=1, **dict.fromkeys(SPLIT))
    share = step_time(setup).teacher * (1 - step_time(setup).teacher_bubble)
    assert share == pytest.approx(step_time(one_stage).teacher * max(layers) / 94)


def test_more_stages_with_an_uneven_split_are_a_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPO)
    path = CLUSTERS / "qwen3-235b-a22b-256xh100.yaml"
    split = ["parallel.layers_in_first_stage=null", "parallel.layers_in_last_stage=null"]
    config = load_config(path, ["parallel.pipeline=2", "parallel.expert=8", *split])
    run = build_planned_run(config, 256, gpus_per_node=8, memory_bytes=80e9)
    assert not run.fits(run.estimate().memory)
    changes = [remedy.change for remedy in remedies(run) if "pipeline" in remedy.change]
    assert changes == ["parallel.pipeline=8 parallel.layers_in_last_stage=10"]
    config = load_config(path, ["parallel.expert=8", *split, *changes[0].split()])
    run = build_planned_run(config, 256, gpus_per_node=8, memory_bytes=80e9)
    assert run.fits(run.estimate().memory)


@pytest.mark.slow
def test_expert_parallelism_is_a_remedy_and_in_the_sweep(monkeypatch, capsys):
    """227B of 235B parameters are experts. Without expert parallelism, on two stages, the weights
    of a rank take more than 100 GB."""
    monkeypatch.chdir(REPO)
    path = CLUSTERS / "qwen3-235b-a22b-256xh100.yaml"
    machines = {"gpus_per_node": 8, "memory_bytes": 80e9}
    two_stages = ["parallel.pipeline=2", *(f"parallel.{name}=null" for name in SPLIT)]
    config = load_config(path, ["parallel.expert=1", *two_stages])
    whole = build_planned_run(config, 256, **machines)
    assert whole.estimate().memory.state["weights"] > 100e9
    assert "parallel.expert=32" in [remedy.change for remedy in remedies(whole)]

    best = sweep(whole)[0].setup
    assert best.expert > 1
    # The suggested overrides are exactly the settings that differ from this configuration.
    no_remedy = [f"parallel.{size}=1" for size in ("expert", "pipeline", "tensor")]
    no_remedy += [*two_stages[1:], "parallel.sequence=false"]
    assert main(["plan", str(path), "--gpus", "256", *no_remedy]) == 0
    suggestion = capsys.readouterr().out.split("with the shortest step:")[1]
    given = load_config(path, no_remedy)
    expected = set()
    for section, names in (("parallel", PARALLEL + SPLIT), ("training", TRAINING)):
        for name in names:
            value = getattr(best, name)
            if value != getattr(getattr(given, section), name):
                expected.add(f"{section}.{name}={str(value).lower()}")
    overrides = suggestion.split("(")[0].split()
    assert set(overrides) == expected
    assert main(["plan", str(path), "--gpus", "256", *no_remedy, *overrides]) == 0
    assert "\nfits into 80 GB" in capsys.readouterr().out


@pytest.mark.slow
def test_sweep_omits_columns_of_ones(monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    for name, machines, columns in (
        ("qwen3-235b-a22b-256xh100.yaml", ["--gpus", "256"], "TP PP VPP CP EP DP SP"),
        ("qwen2.5-7b-8xh100.yaml", ["--gpus", "1", "--memory", "400"], "TP PP CP DP SP"),
    ):
        assert main(["plan", str(CLUSTERS / name), *machines, "--sweep"]) == 0
        printed = capsys.readouterr().out
        header = [line for line in printed.splitlines() if line.startswith("┃")]
        assert set(re.findall("[CDESTV]?[CDEPT]P|SP", "".join(header))) == set(columns.split())
        assert "…" not in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["parallel.tensor=8"], "parallel.tensor 8: expected a divisor of the model's 4 key/value"),
        (["--gpus", "5"], "5 processes: expected a multiple of parallel.tensor 2"),
        (["parallel.tensr=8"], "did you mean 'tensor'?"),
        (["model.path=nowhere"], "nowhere/config.json: cannot be read"),
    ],
)
def test_plan_of_bad_input_prints_one_line(arguments: list[str], message: str, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    assert main(["plan", str(CLUSTERS / "qwen2.5-7b-8xh100.yaml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("aropd: error: ")


def test_plan_with_packing_uses_the_token_budget(monkeypatch: pytest.MonkeyPatch):
    """A microbatch of 4,500 tokens has room for two sequences of 2,048."""
    monkeypatch.chdir(REPO)
    path = CLUSTERS / "qwen2.5-7b-8xh100.yaml"
    packed = ["training.packing=true", "training.max_tokens_per_microbatch=4500"]
    job = build_planned_run(load_config(path, packed), 8, gpus_per_node=8, memory_bytes=80e9)
    setup = job.estimate().setup
    assert (setup.num_microbatches, setup.microbatch_tokens) == (4, 4500)
    # Without a budget, a microbatch has room for micro_batch_size sequences, and little more.
    by_size = ["training.packing=true", "training.micro_batch_size=2"]
    job = build_planned_run(load_config(path, by_size), 8, gpus_per_node=8, memory_bytes=80e9)
    setup = job.estimate().setup
    assert setup.num_microbatches == 4 and 4096 < setup.microbatch_tokens < 4120
    assert len({estimate.setup.micro_batch_size for estimate in sweep(job)}) > 1


def test_plan_needs_neither_megatron_nor_a_process_group(monkeypatch: pytest.MonkeyPatch):
    import subprocess
    import sys

    code = (
        "import json, sys; from aropd_mcore.cli import main; "
        "code = main(['plan', 'examples/clusters/qwen2.5-7b-8xh100.yaml']); "
        "print(json.dumps([code, any(m.split('.')[0] == 'megatron' for m in sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, False], done.stderr
