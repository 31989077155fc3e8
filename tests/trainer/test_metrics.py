"""Metrics of rollouts and time, hooks, and the log. test_step.py compares the token metrics."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from aropd_mcore.config import ObjectiveConfig, RolloutConfig
from aropd_mcore.config_file import load_config
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.data.spans import Thinking
from aropd_mcore.mcore.objectives import reported_metrics
from aropd_mcore.mcore.router import RouterLosses
from aropd_mcore.numerics.position_metrics import METRICS, token_metrics
from aropd_mcore.numerics.token_diagnostics import SUPPORT_GAPS
from aropd_mcore.plan.cost import forward_flops
from aropd_mcore.plan.devices import peak_bf16_flops
from aropd_mcore.trainer import hooks
from aropd_mcore.trainer.hooks import DeviceUse, utilization
from aropd_mcore.trainer.metrics import MetricsLog, rollout_metrics
from aropd_mcore.trainer.samples import Line
from aropd_mcore.trainer.timing import time_metrics
from aropd_mcore.types import Rollout, Row, Views
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_run

RESPONSES = [  # per rank: text, whether the response is finished, gold answer
    [("42 at once, then more words", True, "42"), ("a 421 is no 42", True, "42")],
    [("the answer comes last: 7", False, "7"), ("7.5 .................", True, "7.5")],
]
THINKING = [5, 3, 24, 0]
"""Lengths of the responses' thinking spans. The cut response ends in its thought."""


class CharacterTokenizer:
    """Tokenizer with one token per character."""

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))


def test_rollout_metrics_cover_the_responses_of_all_ranks():
    lengths = torch.tensor([len(text) for rank in RESPONSES for text, *_ in rank]).double()
    thinking = torch.tensor(THINKING).double()
    parts = {"response": lengths, "thinking": thinking, "answer": lengths - thinking}
    quantiles = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
    expected_lengths = {
        f"{part}_length_{name}": float(torch.quantile(values, quantile))
        for part, values in parts.items()
        for name, quantile in quantiles.items()
    }
    for metrics in run_ranks(rank_metrics, 2):
        assert metrics == pytest.approx(
            {
                **expected_lengths,
                **{f"{part}_length_mean": float(v.mean()) for part, v in parts.items()},
                "truncation_rate/thinking": 0.25,
                "truncation_rate/answer": 0.0,
                "num_response_tokens": int(lengths.sum()),
                "num_cut_tokens": 4 * 3,
                "truncation_rate": 0.25,
                # 42 and 7.5 come early. 421 is another number, and 7 comes at the end.
                "premature_answer_rate": 0.5,
            }
        )


def rank_metrics() -> dict[str, float]:
    from aropd_mcore.mcore import runtime

    rt = runtime.start()
    responses = RESPONSES[rt.dp_rank]
    result = SimpleNamespace(
        views=[Views(Row("q", "r", answer), (1,), (1,), (1,), 3) for *_, answer in responses],
        rollouts=[
            Rollout(tuple(map(ord, text)), (), finished, 0) for text, finished, _ in responses
        ],
        thinking=[Thinking(0, length) for length in THINKING[2 * rt.dp_rank :][:2]],
    )
    return rollout_metrics(result, CharacterTokenizer(), rt)  # type: ignore[arg-type]


def test_metrics_log_with_an_invalid_line_is_refused_and_unchanged(tmp_path):
    config = load_config(write_run(tmp_path))
    config.output_dir.mkdir()
    log = config.output_dir / "metrics.jsonl"
    log.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl:2: found .*, expected an object with 'step'"
    ):
        MetricsLog(config, first_step=1)
    assert log.read_text().count("\n") == 3


@pytest.mark.slow
def test_wandb_id_differs_between_runs_and_survives_a_restart(tmp_path, monkeypatch):
    """Two new runs in the same relative folder, as on two machines, and a restart of the second."""
    path = write_run(tmp_path)
    ids = []
    for folder in ("one", "two", "two"):
        (tmp_path / folder / "out").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        config = load_config(path, ["output_dir=out", "logging.wandb=offline"])
        log = MetricsLog(config, first_step=0)
        assert log._wandb.name == "out"
        ids.append(log._wandb.id)
        settings = dict(log._wandb.config)
        assert settings["objective"] == config.model_dump(mode="json")["objective"]
        log.close()
    first, second, again = ids
    assert first != second == again
    assert (tmp_path / "two" / "out" / "wandb_id").read_text().strip() == second


@pytest.mark.slow
def test_samples_are_a_table_in_wandb_and_texts_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Line(3, "rows", "student", "a", "7?\n<b>", "so 7", "7", "right", 4, True)
    lines = [
        asdict(line)
        for line in (first, replace(first, id="b", verdict=None, finished=False, mean_residual=0.5))
    ]
    overrides = ["logging.wandb=offline", "logging.tensorboard=true"]
    config = load_config(write_run(tmp_path), overrides)
    config.output_dir.mkdir()
    log = MetricsLog(config, first_step=0)
    log.send_samples(lines, 3, "samples")
    log.write({"step": 3, "loss": 1.0})
    log.close()

    (table,) = config.output_dir.glob("wandb/offline-run-*/files/media/table/samples_*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == list(lines[0])
    assert content["data"] == [list(line.values()) for line in lines]

    events = EventAccumulator(str(config.output_dir / "tensorboard"))
    events.Reload()
    tags = [f"samples/rows/{slot}/text_summary" for slot in (0, 1)]
    assert events.Tags()["tensors"] == tags
    written = [events.Tensors(tag)[0] for tag in tags]
    assert [event.step for event in written] == [3, 3]
    texts = [event.tensor_proto.string_val[0].decode() for event in written]
    assert "right, 4 tokens" in texts[0] and "    <b>" in texts[0] and "    so 7" in texts[0]
    assert "not graded, 4 tokens, cut off, mean residual 0.5000 nats" in texts[1]


def test_seconds_of_a_step_add_up_to_its_whole_time():
    metrics = time_metrics(
        {"rollout": 3.0, "student": 1.0}, elapsed=4.5, saving=0.5, num_response_tokens=100
    )
    assert sum(v for k, v in metrics.items() if k.startswith("seconds/")) == 5.0
    assert metrics["seconds/other"] == 0.5 and metrics["tokens_per_second"] == 20.0


def test_hooks_run_between_update_and_checkpoint_and_add_metrics(tmp_path):
    """Two hooks in a real run. The second one sees the metric that the first one added."""
    run_ranks(train_with_hooks, 1, write_run(tmp_path, training={"num_steps": 2}))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["twice"] for line in lines] == [2, 4]


class CountResponses:
    def after_step(self, run, step, result, metrics):
        assert not list((run.config.output_dir / "checkpoints").glob(f"iter_{step + 1:07d}"))
        return {"once": len(result.rollouts) * (step + 1) // 8}


class Double:
    def after_step(self, run, step, result, metrics):
        return {"twice": 2 * metrics["once"]}


def train_with_hooks(path) -> None:
    from aropd_mcore.trainer import loop
    from aropd_mcore.trainer.build import build_run, start_runtime

    def build(config, runtime, stops):
        return replace(build_run(config, runtime, stops), hooks=[CountResponses(), Double()])

    config = load_config(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_run", build)
        loop.train(config, start_runtime(config))


@pytest.mark.parametrize("num_scored", [2, 1])
def test_utilization_counts_layers_of_every_scored_view_and_the_heads_once(tmp_path, num_scored):
    """With teacher.views `none`, the first of two equal views is scored."""
    architecture = read_architecture(write_model(tmp_path / "model"))
    of_teacher = read_architecture(write_model(tmp_path / "teacher", "qwen3", hidden_size=96))
    views = Views(Row("q", "r", "a"), (1,) * 4, (1,) * 6, (1,) * 9)
    result = SimpleNamespace(
        views=[views], rollouts=[Rollout((1,) * 3, (), True, 0)],
        seconds={"teacher": 1.0, "student": 3.0, "rollout": 50.0},
    )  # fmt: skip
    student = SimpleNamespace(
        model=SimpleNamespace(architecture=architecture),
        objective=SimpleNamespace(views=("partial", "full")),
    )
    runtime = SimpleNamespace(world_size=2, gather_over_data=lambda local: local)
    mfu = utilization(
        SimpleNamespace(  # type: ignore[arg-type]
            student=student,
            teachers={"": SimpleNamespace(model=SimpleNamespace(architecture=of_teacher))},
            config=SimpleNamespace(
                scored_views=("partial", "full")[:num_scored], row_teachers=(), adapter=None
            ),
            runtime=runtime,
        ),
        result,  # type: ignore[arg-type]
        {"num_loss_tokens": 3},
        peak_flops=1e6,
    )
    layers = 3 * sum(forward_flops(architecture, 7))
    layers += sum(sum(forward_flops(of_teacher, tokens)) for tokens in (9, 12)[:num_scored])
    head = 2 * 3 * (3 * 64 + 2 * 96) * architecture.sizes["vocab"]
    assert mfu == pytest.approx((layers + head) / (4 * 2 * 1e6))


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A1000", None),
    ],
)
def test_peak_flops_are_looked_up_by_device_name(name, flops):
    assert peak_bf16_flops(name) == flops


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", {"device_memory_peak_gb": 5.0, "mfu": 0.25}),
        ("Some other GPU", {"device_memory_peak_gb": 5.0}),
    ],
)
def test_device_use_reports_the_peak_of_the_step_and_mfu_on_known_devices_only(
    monkeypatch, name, expected
):
    resets = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: int(3e9))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(hooks, "utilization", lambda run, result, metrics, peak: peak / 3956e12)
    # Another rank of the job uses 2 GB more.
    runtime = SimpleNamespace(device="cuda:0", max_over_job=lambda peak: peak + int(2e9))
    hook, run = DeviceUse(runtime), SimpleNamespace(runtime=runtime)  # type: ignore[arg-type]
    assert hook.after_step(run, 0, None, {}) == expected  # type: ignore[arg-type]
    assert resets == ["cuda:0"]


@pytest.mark.parametrize(
    ("name", "derived"),
    [("aropd", {"residual_uptake", "residual_capture_ratio"}), ("sft", set())],
)
def test_objective_reports_exactly_its_declared_metrics(tmp_path, name, derived):
    path = write_run(tmp_path, training={"num_steps": 1}, objective={"name": name})
    [(declared, sums, reported)] = run_ranks(metric_names, 1, path)
    assert sums == declared <= METRICS.keys()
    plain = {metric for metric in reported if "/" not in metric}
    assert plain == declared - {"num_tokens"} | {"num_loss_tokens"} | derived


def metric_names(path) -> tuple[set[str], set[str], set[str]]:
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.step import train_step

    config = load_config(path)
    run = build_run(config, start_runtime(config))
    run.source.weights_changed(0)
    sums = train_step(run, 0).sums
    return set(run.student.objective.metrics), set(sums), set(token_metrics(sums))


def test_every_declared_metric_is_reported_by_some_part():
    rollout = RolloutConfig(engine="vllm", importance="token")
    reported = {*reported_metrics(ObjectiveConfig(), rollout), *RouterLosses.NAMES, *SUPPORT_GAPS}
    reported |= {name for name, metric in METRICS.items() if metric.over == "derived"}
    assert METRICS.keys() - reported == {"cross_entropy"}  # by CrossEntropy
