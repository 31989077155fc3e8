"""End-to-end tests of `aropd eval`: engines, layouts, interruptions, output files."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from aropd_mcore import cli
from aropd_mcore.evaluation.run import build_evaluation, grade
from aropd_mcore.evaluation.tasks import parse_task
from aropd_mcore.mcore import runtime
from aropd_mcore.rollout.generate import generate, start_generation_runtime
from tests.support.fake_vllm import FakeVllm
from tests.support.ranks import run_ranks, shutdown_pool
from tests.support.tiny_runs import write_model, write_run

KEY = "a key"
MATH = [{"problem": f"{i} + {i}?", "answer": 2 * i, "id": f"m{i}"} for i in range(7)]
CHOICES = [{"question": "Which?", "choices": ["x", "y"], "answer": i % 2} for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with a model, run.yaml, `out` (the run after one step) and two tasks."""
    folder = tmp_path_factory.mktemp("eval")
    path = write_run(folder, training={"num_steps": 1, "global_batch_size": 4})
    write_model(folder / "model", initializer_range=0.1)
    run_ranks(train_run, 1, path)
    for name, records in (("math", MATH), ("choices", CHOICES)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def train_run(path: Path) -> None:
    from aropd_mcore.config_file import load_config
    from aropd_mcore.trainer import build
    from aropd_mcore.trainer.loop import train

    config = load_config(path, ["optimizer.lr=0.05"])
    train(config, build.start_runtime(config))


def run_evaluations(calls: list[dict[str, Any]]) -> None:
    for call in calls:
        tasks = [parse_task(f"{name}={path}") for name, path in call.pop("tasks").items()]
        sampling = {"max_response_tokens": 12, "temperature": 0.0} | call.pop("rollout", {})
        call = {"allow_code_execution": False, "parallel": {}, "rollout": sampling} | call
        evaluation = build_evaluation(tasks=tasks, **call)
        here = start_generation_runtime(evaluation.spec)
        generate(evaluation.spec, here)
        runtime.stop()
        if here.rank == 0:
            grade(evaluation)


def build_call(folder: Path, out: Path, **call: Any) -> dict[str, Any]:
    tasks = {name: folder / f"{name}.jsonl" for name in ("math", "choices")}
    return {"model": folder / "out", "tasks": tasks, "out": out} | call


def read_samples(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_samples_file_has_prompt_answer_and_verdict_per_response(folder, tmp_path):
    call = build_call(folder, tmp_path / "out", role="teacher", config=folder / "run.yaml")
    run_ranks(run_evaluations, 1, [call])
    lines = read_samples(tmp_path / "out")
    assert [(line["task"], line["id"]) for line in lines] == [
        *(("math", record["id"]) for record in MATH),
        *(("choices", str(number)) for number in (1, 2, 3, 4)),
    ]
    # The run's views have no system prompt.
    assert lines[2]["prompt"] == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert lines[2]["answer"] == "4" and lines[8]["answer"] == "B"
    for line in lines:
        assert list(line) == [
            *("task", "id", "sample", "prompt", "text", "response_ids", "length", "finish_reason"),
            *("answer", "extracted", "rule", "verdict"),
        ]
        assert line["length"] == len(line["response_ids"]) and line["sample"] == 0
        assert line["finish_reason"] == "stop" or line["length"] == 12
        assert (line["extracted"] is None) == (line["rule"] == "none")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("evaluation.json", "prompts.jsonl", "responses.jsonl", "samples.jsonl", "summary.json")
    ]
    responses = (tmp_path / "out" / "responses.jsonl").read_text().splitlines()
    assert {json.loads(line)["weight_version"] for line in responses} == {1}


@pytest.mark.rest
def test_eval_writes_the_same_files_for_every_engine_and_layout(folder, tmp_path, monkeypatch):
    """Sample from the run's student with the native engine in three layouts, and with fake vLLM.

    The fake servers sample from the weights that they are requested to load.
    """
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    shutdown_pool()  # its processes lack the key
    fake = FakeVllm(key=KEY)
    fake.greedy = True
    config = yaml.safe_load((folder / "run.yaml").read_text())
    vllm = {"urls": [fake.url], "start_timeout": 5.0, "weights_dir": str(tmp_path)}
    config["rollout"]["vllm"] = vllm
    (tmp_path / "vllm.yaml").write_text(yaml.safe_dump(config))
    settings = {
        "native": {},
        "vllm": {"rollout": {"engine": "vllm"}},
        "tensor": {"parallel": {"tensor": 2}},
        "replicas": {},
    }
    calls = {
        name: build_call(folder, tmp_path / name, config=tmp_path / "vllm.yaml", **call)
        for name, call in settings.items()
    }
    run_ranks(run_evaluations, 1, [calls["native"], calls["vllm"]])
    run_ranks(run_evaluations, 2, [calls["tensor"], calls["replicas"]])
    assert fake.responses == len(MATH) + len(CHOICES) and fake.loaded
    for name in ("vllm", "tensor", "replicas"):
        for file in ("samples.jsonl", "summary.json"):
            expected = (tmp_path / "native" / file).read_bytes()
            assert (tmp_path / name / file).read_bytes() == expected
    assert len({line["text"] for line in read_samples(tmp_path / "native")}) > 1


def build_command(folder: Path, out: Path, *options: str) -> list[str]:
    tasks = [f"--task={name}={folder / name}.jsonl" for name in ("math", "choices")]
    model = ["--model", str(folder / "model"), "--max-response-tokens", "12"]
    return ["eval", *model, *tasks, "--out", str(out), *options]


def test_eval_command_after_an_interruption_resumes_grading(folder, tmp_path, capsys, monkeypatch):
    sampled = ["--samples", "3", "--temperature", "1"]
    call = {"model": folder / "model"}
    call |= {"rollout": {"temperature": 1.0, "rollouts_per_prompt": 3}}
    out = tmp_path / "out"
    run_ranks(run_evaluations, 1, [build_call(folder, out, **call)])
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    # Simulate an interruption after two lines and half of the third one.
    kept = b"".join(whole["samples.jsonl"].splitlines(keepends=True)[:3])[:-9]
    (out / "samples.jsonl").unlink()
    (out / "summary.json").unlink()
    partial = out / "samples.jsonl.partial"
    partial.mkdir()
    (partial / "lines.jsonl").write_bytes(kept)
    (partial / "job.json").write_bytes(whole["evaluation.json"])
    monkeypatch.setattr("aropd_mcore.cli.evaluate.run_as_ranks", None)  # nothing is sampled again
    assert cli.main(build_command(folder, out, *sampled)) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    printed = capsys.readouterr()
    assert "grading 31 responses" in printed.err
    assert "accuracy by response tokens" in printed.out and "0-255" in printed.out
    summary = json.loads(whole["summary.json"])
    math = summary["tasks"]["math"]
    assert {"avg@3", "pass@1", "pass@2", "pass@3"} < set(math) and math["samples"] == 3
    assert math["by_length"]["0-255"]["samples"] == 21 and math["problems"] == 7
    assert sum(math["verdicts"].values()) == sum(math["rules"].values()) == 21
    assert 0 < math["truncation_rate"] < 1

    # Another evaluation cannot use the same folder.
    assert cli.main(build_command(folder, out, *sampled, "--seed", "5")) == 2
    assert "holds another evaluation: seed was 1234 and is now 5" in capsys.readouterr().err
    other = [*build_command(folder, out, *sampled), f"--task=more={folder / 'math.jsonl'}"]
    assert cli.main(other) == 2
    assert "holds an evaluation of other problems" in capsys.readouterr().err


def test_eval_with_other_code_asserts_in_the_same_folder_is_refused(
    folder, tmp_path, capsys, monkeypatch
):
    # This problem has no assert to show, so the prompts are the same with and without asserts.
    (tmp_path / "code.jsonl").write_text(json.dumps(HUMANEVAL) + "\n")
    out = tmp_path / "out"
    call = {"model": folder / "model", "tasks": {"code": tmp_path / "code.jsonl"}, "out": out}
    run_ranks(run_evaluations, 1, [call | {"allow_code_execution": True, "code_asserts": 3}])
    assert json.loads((out / "summary.json").read_text())["code_asserts"] == 3
    monkeypatch.setattr("aropd_mcore.cli.evaluate.run_as_ranks", None)
    task = [f"--task=code={tmp_path / 'code.jsonl'}", "--allow-code-execution"]
    again = ["eval", "--model", str(folder / "model"), *task, "--max-response-tokens", "12"]
    assert cli.main([*again, "--out", str(out), "--code-asserts", "3"]) == 0
    assert cli.main([*again, "--out", str(out)]) == 2
    assert "code_asserts was 3 and is now None" in capsys.readouterr().err


HUMANEVAL = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f): assert f(1)"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "x"], "task 'x': expected name=FILE or name:format=FILE"),
        (["--task", "x=nowhere"], "nowhere: no such file"),
        (["--task", "math={folder}/math.jsonl"], "math, choices, math: expected different names"),
        (["--task", "rows={folder}/run.yaml"], "run.yaml:1: the line is not JSON"),
        (["--task", "code={tmp}/code.jsonl"], "'code' is graded by running the model's code"),
        (["--samples", "2"], "--samples 2: greedy samples are all the same; expected 1"),
        (["--weights", "teacher"], "holds one model and no teacher"),
    ],
)
def test_eval_with_invalid_options_fails_before_it_writes(
    folder, tmp_path, capsys, options, message
):
    (tmp_path / "code.jsonl").write_text(json.dumps(HUMANEVAL) + "\n")
    options = [option.format(folder=folder, tmp=tmp_path) for option in options]
    assert cli.main(build_command(folder, tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("aropd: error: ") and message in error
    assert not (tmp_path / "out").exists()
