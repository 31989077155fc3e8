"""Remedies that make a job fit, the order of layouts, and the output of `aropd plan`."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
from pydantic import ValidationError

from aropd_mcore.cli import main
from aropd_mcore.config import Config
from aropd_mcore.config_file import load_config
from aropd_mcore.plan.fit import build_planned_run, remedies, sweep
from aropd_mcore.plan.layout import plan
from aropd_mcore.plan.memory import worst_stage
from aropd_mcore.plan.setup import Setup, build_setup
from tests.conftest import REPO
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_runs import tiny_config

CLUSTERS = REPO / "examples" / "clusters"
GPUS = {
    "qwen2.5-7b-8xh100.yaml": 8,
    "qwen3-32b-32xh100.yaml": 32,
    "llama3.1-70b-64xh100.yaml": 64,
    "qwen3-235b-a22b-256xh100.yaml": 256,
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


@pytest.mark.slow
def test_expert_parallelism_is_a_remedy_and_in_the_sweep(monkeypatch, capsys):
    """227B of 235B parameters are experts. Without expert parallelism, on two stages, the weights
    of a rank take more than 100 GB."""
    monkeypatch.chdir(REPO)
    path = CLUSTERS / "qwen3-235b-a22b-256xh100.yaml"
    machines = {"gpus_per_node": 8, "memory_bytes": 60e9}
    whole = build_planned_run(load_config(path, ["parallel.expert=1"]), 256, **machines)
    assert whole.estimate().memory.state["weights"] > 100e9
    assert "parallel.expert=64" in [remedy.change for remedy in remedies(whole)]

    best = sweep(whole)[0].setup
    assert best.expert > 1
    values = [f"parallel.{name}={str(getattr(best, name)).lower()}" for name in PARALLEL]
    values += [f"training.{name}={getattr(best, name)}" for name in TRAINING]
    plan(load_config(path, values), 256)
    # The suggested overrides are exactly the settings that differ from this configuration.
    no_remedy = [f"parallel.{size}=1" for size in ("expert", "pipeline", "tensor")]
    no_remedy += ["parallel.sequence=false"]
    config = load_config(path, no_remedy)
    expected = {
        f"{section}.{name}={str(getattr(best, name)).lower()}"
        for section, names in (("parallel", PARALLEL), ("training", TRAINING))
        for name in names
        if getattr(best, name) != getattr(getattr(config, section), name)
    }
    words = ["plan", str(path), "--gpus", "256", "--memory", "60", *no_remedy]
    assert main(words) == 0
    suggestion = capsys.readouterr().out.splitlines()[-1]
    overrides = suggestion.split("(")[0].split()
    assert set(overrides) == expected
    assert main([*words, *overrides]) == 0
    assert "\nfits into 60 GB" in capsys.readouterr().out


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
        (["parallel.tensor=8"], "tensor-parallel size 8 does not divide the model's 4 key/value"),
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
