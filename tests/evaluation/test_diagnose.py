"""Tests of `aropd diagnose` against METHOD in dense fp64, and across layouts."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image
from transformers import AutoModelForCausalLM, AutoTokenizer

from aropd_mcore import cli
from aropd_mcore.config import ObjectiveConfig
from aropd_mcore.config_file import load_config
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.evaluation import grade
from aropd_mcore.evaluation.diagnose.score import NUM_TOP, diagnose
from aropd_mcore.evaluation.diagnose.spec import build_diagnosis_spec
from aropd_mcore.evaluation.diagnose.summary import FLOORS, GAPS, Scored, summarize
from aropd_mcore.evaluation.predictors import predict
from aropd_mcore.mcore import runtime
from aropd_mcore.numerics.token_diagnostics import SUPPORT_GAPS
from aropd_mcore.rollout.generate import start_generation_runtime
from aropd_mcore.trainer import build
from aropd_mcore.trainer.loop import train
from aropd_mcore.types import Rollout, Row, Views
from tests.support import oracles
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_run
from tests.support.tiny_tokenizer import save_tiny_tokenizer

NUM_ROWS, SAMPLES, NUM_READ = 7, 2, 5
SKIP, GAP, FLOOR = 2, 0.3, 0.2
SCALE, CLIP = 1.2, 0.5
VIEWS = ("student", "partial", "full", "target")
_METRICS = (
    "kl_full_student", "kl_partial_student", "kl_full_partial", "kl_target_student",
    "entropy_full", *SUPPORT_GAPS,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with run.yaml, rows.jsonl, models, and `out`: the run after two large steps.

    The teacher of the run differs from its student.
    """
    folder = tmp_path_factory.mktemp("diagnose")
    objective = {"residual_scale": SCALE, "residual_clip": CLIP, "skip_response_tokens": SKIP}
    objective |= {"hindsight_gap": GAP, "hindsight_floor": FLOOR}
    path = write_run(folder, objective=objective, training={"num_steps": 2, "global_batch_size": 4})
    write_model(folder / "moe", "qwen3_moe")
    run_ranks(_train, 1, path)
    for role in ("student", "teacher"):
        arguments = ["convert", "export", str(folder / "out"), str(folder / role)]
        assert cli.main([*arguments, "--weights", role]) == 0
    return folder


def _train(path: Path) -> None:
    config = load_config(path, ["optimizer.lr=0.005"])
    train(config, build.start_runtime(config))


Call = dict[str, Any]


def _diagnose_all(calls: list[Call]) -> None:
    for call in calls:
        common = {"num_rows": NUM_ROWS, "num_read": NUM_READ, "parallel": {}}
        request = build_diagnosis_spec(
            **common | {"rollout": {"rollouts_per_prompt": SAMPLES}} | call
        )
        diagnose(request, start_generation_runtime(request.spec))
        runtime.stop()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def diagnosed(folder) -> dict[str, Any]:
    """Diagnosis by one rank, with all responses token by token."""
    call = {"model": folder / "out", "data": folder / "rows.jsonl", "out": None, "num_read": 99}
    run_ranks(_diagnose_all, 1, [call])
    return _read(folder / "out" / "diagnose" / "rows-step2.json")


@pytest.fixture(scope="module")
def dense(folder, diagnosed) -> list[dict[str, np.ndarray]]:
    """Log-probabilities [T, V] of each response under each distribution, in fp64."""
    models = {
        role: AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float64).eval()
        for role in ("student", "teacher")
    }
    config = load_config(folder / "run.yaml")
    builder = ViewBuilder(load_tokenizer(folder / "model"), config.views)
    views = [builder.build(row) for row in RowDataset.load([folder / "rows.jsonl"])[:NUM_ROWS]]

    @torch.no_grad()
    def logprobs(role: str, prompt: tuple[int, ...], ids: list[int]) -> torch.Tensor:
        logits = models[role](torch.tensor([[*prompt, *ids]])).logits[0]
        return torch.log_softmax(logits[len(prompt) - 1 : -1], -1)

    responses = []
    for index, rollout in enumerate(diagnosed["rollouts"]):
        row, ids = views[index // SAMPLES], rollout["ids"]
        log_s = logprobs("student", row.student_ids, ids)
        log_p = logprobs("teacher", row.partial_ids, ids)
        log_f = logprobs("teacher", row.full_ids, ids)
        log_q = oracles.target_logprobs(log_p, log_f, SCALE, CLIP)
        responses.append(dict(zip(VIEWS, (log_s, log_p, log_f, log_q), strict=True)))
    return responses


def test_rollouts_of_a_diagnosis_have_the_dense_log_probs_and_likeliest_tokens(diagnosed, dense):
    assert len(diagnosed["rollouts"]) == NUM_ROWS * SAMPLES
    lengths = {len(rollout["ids"]) for rollout in diagnosed["rollouts"]}
    assert len(lengths) > 3 and max(lengths) == 16
    for rollout, expected in zip(diagnosed["rollouts"], dense, strict=True):
        ids = torch.tensor(rollout["ids"])
        sampled = {name: log.gather(1, ids[:, None])[:, 0] for name, log in expected.items()}
        for name in VIEWS:
            assert rollout[name] == pytest.approx(sampled[name].tolist(), abs=2e-4)
        residual = sampled["full"] - sampled["partial"]
        assert rollout["residual"] == pytest.approx(residual.tolist(), abs=2e-4)
        is_hindsight = (residual > GAP) & (sampled["partial"] < math.log(FLOOR))
        assert rollout["hindsight"] == is_hindsight.tolist()
        for t, top in enumerate(rollout["top"]):
            likeliest = set()
            for log in expected.values():
                likeliest |= set(log[t].topk(NUM_TOP).indices.tolist())
            known = {id for id, *_ in top}
            assert known <= likeliest and len(known) == len(top)
            # Tokens with a probability below 0.05 % under every distribution are left out.
            for id in likeliest - known:
                assert max(float(log[t, id].exp()) for log in expected.values()) < 6e-4
            for id, *probabilities in top:
                dense_probabilities = [float(expected[name][t, id].exp()) for name in VIEWS]
                assert probabilities == pytest.approx(dense_probabilities, abs=2e-4)


def test_metrics_of_a_diagnosis_are_those_of_method_over_loss_tokens(diagnosed, dense):
    rows = [
        (rollout["ids"][SKIP:], {name: log[SKIP:] for name, log in expected.items()})
        for rollout, expected in zip(diagnosed["rollouts"], dense, strict=True)
    ]
    log = {name: torch.cat([logs[name] for _, logs in rows]) for name in VIEWS}
    ids = torch.tensor([id for loss_ids, _ in rows for id in loss_ids])
    expected = oracles.token_metrics(
        log["student"], log["partial"], log["full"], ids, scale=SCALE, clip=CLIP
    )
    sampled = {name: expected.pop(f"logprob_{name}") for name in VIEWS}
    for a, b in (
        ("full", "partial"), ("full", "student"), ("target", "partial"), ("target", "student")
    ):  # fmt: skip
        only_a = (log[b] < math.log(FLOOR)) & (log[a] - log[b] > GAP)
        expected[f"support_gap_{a}_{b}"] = (log[a].exp() * only_a).sum(-1)
        assert expected[f"support_gap_{a}_{b}"].max() > 1e-3
    residual = sampled["full"] - sampled["partial"]

    def rate(gap: float, floor: float) -> float:
        return float(((residual > gap) & (sampled["partial"] < math.log(floor))).double().mean())

    metrics = diagnosed["metrics"]
    assert expected["clip_fraction"].max() > 0.05
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(float(values.mean()), abs=1e-4), name
        if f"{name}/0-255" in metrics:
            assert metrics[f"{name}/0-255"] == metrics[name]
    assert (
        metrics["hindsight_token_rate"] == pytest.approx(rate(GAP, FLOOR)) and rate(GAP, FLOOR) > 0
    )
    uptake = metrics["kl_partial_student"] - metrics["kl_full_student"]
    assert metrics["residual_uptake"] == uptake and metrics["num_loss_tokens"] == len(ids)
    swept = diagnosed["hindsight"]
    assert (swept["gaps"], swept["floors"]) == (list(GAPS), list(FLOORS))
    for i, gap in enumerate(GAPS):
        assert swept["rates"][i] == pytest.approx([rate(gap, floor) for floor in FLOORS])
    assert sum(diagnosed["residual"]["counts"]) == len(ids)
    assert diagnosed["residual"]["mean"] == pytest.approx(float(residual.mean()), abs=1e-4)
    # The tenth of a token is its relative position in its response.
    lengths = [len(loss_ids) for loss_ids, _ in rows]
    tenths = [10 * (t + SKIP) // (length + SKIP) for length in lengths for t in range(length)]
    for tenth in range(10):
        members = [t for t, token_tenth in enumerate(tenths) if token_tenth == tenth]
        assert diagnosed["tenths"]["num_tokens"][tenth] == len(members)
        if members:
            kl = float(expected["kl_full_student"][members].mean())
            assert diagnosed["tenths"]["kl_full_student"][tenth] == pytest.approx(kl, abs=1e-4)


def test_responses_and_prompts_of_a_diagnosis_equal_those_of_generate(folder, diagnosed, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ["--max-response-tokens", "16", "--samples", str(SAMPLES)]
    files = ["--model", folder / "out", "--prompts", folder / "rows.jsonl", "--out", out]
    assert cli.main(["generate", *map(str, files), *options]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for line, rollout in zip(lines, diagnosed["rollouts"], strict=False):
        assert rollout["ids"] == line["response_ids"] and rollout["question"] == line["question"]
        assert rollout["text"] == tokenizer.decode(rollout["ids"])
        assert f"{line['question'].strip()}<|im_end|>" in rollout["prompt"]
    assert set(diagnosed["vocabulary"]) >= {
        str(id) for r in diagnosed["rollouts"] for id in r["ids"]
    }
    assert diagnosed["model"]["teacher"] == "own" and diagnosed["model"]["step"] == 2
    plot = image.imread(folder / "out" / "diagnose" / "rows-step2.png")
    assert plot[..., :3].std() > 0.1


def test_reliability_is_the_share_of_pairs_in_which_the_right_response_is_preferred(tmp_path):
    """The preference is the mean of log f - log s, without the first token.

    3 of 4 pairs are in order where the full view shows 10 tokens.
    """
    tokenizer = save_tiny_tokenizer(tmp_path)
    right, early, wrong = (
        tuple(tokenizer.encode(text)) for text in ("so it is 42", "42 it is, so", "it is not 7")
    )
    made = [
        (10, right, 1.0), (10, right, 0.5), (10, wrong, 0.7), (10, early, 0.0),
        (50, right, 0.3), (50, wrong, 0.3),
    ]  # fmt: skip
    row = Row(question="?", reasoning="", answer="42")
    views, scored = [], []
    for number, (shown, ids, gain) in enumerate(made):
        views.append(Views(row, (1, 2), (1, 2), (1, 2) + (3,) * shown))
        scores = {name: np.ones(len(ids), np.float32) for name in _METRICS}
        scores |= {f"logprob_{name}": np.full(len(ids), -2.0, np.float32) for name in VIEWS}
        scores["logprob_full"] = scores["logprob_full"] + np.float32(gain)
        scores["logprob_full"][0] = -90.0  # not a loss token
        scored.append(Scored(number, 0, Rollout(ids, (), True, 0), scores, range(1, len(ids))))
    diagnosis = summarize(scored, views, tokenizer, ObjectiveConfig(skip_response_tokens=1))
    few, many = diagnosis["reliability"]
    assert (few["tokens_from"], few["tokens_to"], few["responses"]) == (10, 10, 4)
    assert (few["ends_with_answer"], few["prefers_right"]) == (0.5, 0.75)
    assert (many["tokens_from"], many["responses"], many["prefers_right"]) == (50, 2, 0.5)
    assert few["gain_full_student"] == pytest.approx((10 * 1.0 + 10 * 0.5 + 10 * 0.7) / 41)
    assert diagnosis["metrics"]["premature_answer_rate"] == pytest.approx(1 / 6)
    assert diagnosis["metrics"]["ends_with_answer_rate"] == pytest.approx(3 / 6)


def _responses(tokenizer, made, answer: str = "42") -> tuple[list[Scored], list[Views]]:
    """Build responses from (text, finished, log f - log s, log p - log s).

    The differences apply to every token except the first.
    """
    row = Row(question="?", reasoning="", answer=answer)
    scored = []
    for number, (text, finished, total, partial) in enumerate(made):
        ids = (*tokenizer.encode(text), *[tokenizer.eos_token_id] * finished)
        scores = {name: np.ones(len(ids), np.float32) for name in _METRICS}
        for name, gain in zip(VIEWS, (0.0, partial, total, 0.0), strict=True):
            scores[f"logprob_{name}"] = np.full(len(ids), -2.0 + gain, np.float32)
            scores[f"logprob_{name}"][0] = -90.0 * number  # not a loss token
        rollout = Rollout(ids, (), finished, 0)
        scored.append(Scored(number, 0, rollout, scores, range(1, len(ids))))
    return scored, [Views(row, (1, 2), (1, 2), (1, 2))] * len(scored)


def test_predict_compares_the_signals_of_right_and_wrong_responses(tmp_path):
    """Grading is that of `aropd eval`: the last answer counts, and 42.0 is 42."""
    tokenizer = save_tiny_tokenizer(tmp_path)
    made = [
        ("I add them: the answer is 42.0", True, 0.9, 0.2),
        ("so it is 42", True, 0.4, 0.3),
        ("42 it is not, the answer is 7", True, 0.5, 0.3),
        ("no idea", False, 0.1, 0.4),
        ("7", False, 5.0, 5.0),  # no loss tokens: graded but not compared
    ]
    scored, views = _responses(tokenizer, made)
    predictors = predict(scored, views, tokenizer)
    assert (predictors["graded"], predictors["right"], predictors["wrong"]) == (5, 2, 2)
    assert predictors["accuracy"] == pytest.approx(2 / 5) and predictors["reason"] is None
    low, high = predictors["accuracy_95"]
    assert 0 < low < 0.4 < high < 1
    # total 0.9, 0.4 | 0.5, 0.1; partial 0.2, 0.3 | 0.3, 0.4; marginal 0.7, 0.1 | 0.2, -0.3
    areas = {name: signal["auc"] for name, signal in predictors["signals"].items()}
    assert areas == pytest.approx({"total": 3 / 4, "partial": 0.5 / 4, "marginal": 3 / 4})
    for signal in predictors["signals"].values():
        low, high = signal["interval_95"]
        assert 0 <= low <= signal["auc"] <= high <= 1


def test_predict_without_an_auc_returns_the_reason(tmp_path, monkeypatch):
    tokenizer = save_tiny_tokenizer(tmp_path)
    made = [("it is 42", True, 0.9, 0.2), ("so 42", True, 0.4, 0.3)]
    for answer, right, reason in (
        ("42", 2, "all graded responses with loss tokens are right"),
        ("43", 0, "all graded responses with loss tokens are wrong"),
        ("", 0, "no row has an answer that can be graded"),
        ("```python\nx = 42\n```", 0, "no row has an answer that can be graded"),
    ):
        scored, views = _responses(tokenizer, made, answer)
        predictors = predict(scored, views, tokenizer)
        assert (predictors["right"], predictors["reason"]) == (right, reason)
        assert predictors["signals"]["total"] == {"auc": None, "interval_95": None}
    assert predictors["accuracy"] is None and predictors["graded"] == 0
    monkeypatch.setattr(grade.importlib.util, "find_spec", lambda _: None)
    predictors = predict(scored, views, tokenizer)
    assert "pip install 'aropd-mcore[eval]'" in predictors["reason"] and predictors["graded"] == 0


def test_response_ends_average_finished_responses_only(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path)
    made = [("a", True, 0.5, 0.25), ("longer", True, 1.0, -0.5), ("cut", False, 1.5, 1.5)]
    scored, views = _responses(tokenizer, made)
    objective = ObjectiveConfig(skip_response_tokens=1)
    ends = summarize(scored, views, tokenizer, objective)["response_ends"]
    assert (ends["finished"], ends["cut"]) == (2, 1)
    mean = {"student": (0, 0), "partial": (0.25, -0.5), "full": (0.5, 1.0), "target": (0, 0)}
    assert ends["eos_prob"] == pytest.approx(
        {name: sum(math.exp(gain - 2) for gain in gains) / 2 for name, gains in mean.items()}
    )
    ends = summarize(scored[2:], views, tokenizer, objective)["response_ends"]
    assert ends == {"finished": 0, "cut": 1, "eos_prob": dict.fromkeys(VIEWS)}


def test_response_ends_and_predictors_equal_those_of_the_dense_log_probs(diagnosed, dense):
    ends = diagnosed["response_ends"]
    finished = [
        (rollout["ids"][-1], logs)
        for rollout, logs in zip(diagnosed["rollouts"], dense, strict=True)
        if rollout["finished"]
    ]
    assert (ends["finished"], ends["cut"]) == (len(finished), len(dense) - len(finished))
    assert 1 < len(finished) < len(dense)
    for name in VIEWS:
        probs = [float(logs[name][-1, eos].exp()) for eos, logs in finished]
        assert ends["eos_prob"][name] == pytest.approx(sum(probs) / len(probs), abs=1e-4)
    predictors = diagnosed["predictors"]
    lengths = [len(rollout["ids"]) for rollout in diagnosed["rollouts"]]
    assert predictors["graded"] == len(dense)
    assert predictors["right"] + predictors["wrong"] == sum(n > SKIP for n in lengths)


@pytest.mark.rest
def test_diagnose_in_every_layout_writes_the_same_diagnosis(folder, tmp_path):
    """Responses are scored in chunks. The last chunk of the MoE model is smaller than dp_size."""

    def call(name: str, *, moe: bool = False, **sizes: int) -> Call:
        request = {"data": folder / "rows.jsonl", "out": tmp_path / name, "parallel": sizes}
        if moe:
            sampling = {"rollouts_per_prompt": 1, "batch_size": 1}
            request |= {"model": folder / "moe", "config": folder / "run.yaml", "num_rows": 5}
        else:
            sampling = {"rollouts_per_prompt": SAMPLES, "batch_size": 3}
            request |= {"model": folder / "out"}
        return request | {"rollout": sampling}

    run_ranks(_diagnose_all, 1, [call("one"), call("one-moe", moe=True)])
    on_two = [call("replicas"), call("tensor-moe", moe=True, tensor=2)]
    run_ranks(_diagnose_all, 2, [*on_two, call("expert-moe", moe=True, expert=2)])
    run_ranks(_diagnose_all, 4, [call("both", tensor=2, pipeline=2)])
    for name in ("replicas", "both", "tensor-moe", "expert-moe"):
        kind, file = ("-moe", "rows.json") if "moe" in name else ("", "rows-step2.json")
        expected = _read(tmp_path / f"one{kind}" / file)
        _assert_close(_read(tmp_path / name / file), expected, name)
    read = _read(tmp_path / "both" / "rows-step2.json")["rollouts"]
    assert len(read) == NUM_READ and [r["sample"] for r in read] == [0, 1, 0, 1, 0]


def _assert_close(actual: Any, expected: Any, where: str) -> None:
    """Compare numbers up to rounding, and likeliest tokens in any order, because of ties."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            _assert_close(actual[key], expected[key], f"{where}.{key}")
    elif where.endswith(".top"):
        for top, expected_top in zip(actual, expected, strict=True):
            expected_by_id = {id: probabilities for id, *probabilities in expected_top}
            for id, *probabilities in top:
                if id in expected_by_id:
                    assert probabilities == pytest.approx(expected_by_id[id], abs=3e-4), where
                else:
                    assert max(probabilities) < 1e-3, where
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for i, (item, expected_item) in enumerate(zip(actual, expected, strict=True)):
            path = where if isinstance(expected_item, list) else f"{where}[{i}]"
            _assert_close(item, expected_item, path)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, abs=3e-4), where
    else:
        assert actual == expected, where


_HF_MODEL = ["--model", "{folder}/model", "--max-response-tokens", "16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (_HF_MODEL, "model: not a run's checkpoint: specify --out"),
        (["--data", "nowhere"], "nowhere: no such file"),
        ([*_HF_MODEL, "--weights", "teacher"], "holds one model and no teacher"),
        (["--max-response-tokens", "500"], "exceed the model's 512 positions"),
    ],
)
def test_diagnose_with_invalid_options_fails_before_it_starts(folder, capsys, options, message):
    options = [option.format(folder=folder) for option in options]
    files = ["--model", folder / "out", "--data", folder / "rows.jsonl"]
    assert cli.main(["diagnose", *map(str, files), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aropd: error: ") and message in error


def test_diagnose_command_writes_to_the_folder_of_the_run(folder, capsys, tmp_path):
    files = ["--model", folder / "out", "--data", folder / "rows.jsonl", "--weights", "teacher"]
    assert cli.main(["diagnose", *map(str, files), "--rows", "2", "--read", "0"]) == 0
    out = folder / "out" / "diagnose" / "rows-teacher-step2.json"
    printed = capsys.readouterr()
    assert printed.out == f"{folder / 'rows.jsonl'} -> {out}\n"
    diagnosis = _read(out)
    ends = diagnosis["response_ends"]
    text = f"response ends: {ends['finished']} finished, {ends['cut']} cut at the limit\n"
    assert text in printed.err and "predictors of a right answer" in printed.err
    assert diagnosis["rollouts"] == [] and diagnosis["model"]["teacher"] == "the model itself"
    assert diagnosis["data"]["rows"] == 2
