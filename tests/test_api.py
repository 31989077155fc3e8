"""The Python API, in scripts that run in separate processes as users' scripts do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aropd_mcore as aropd
from tests.conftest import REPO
from tests.support.tiny_runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """YAML file of a run of two steps, with a save after each step."""
    return write_run(
        tmp_path_factory.mktemp("api"),
        training={"num_steps": 2},
        checkpoint={"save_every_steps": 1},
    )


def python(script: str, cwd: Path, *launcher: str, code: int = 0) -> str:
    """Run a script from a file; return its stdout and stderr."""
    path = cwd / "script.py"
    path.write_text(script)
    words = launcher or (sys.executable,)
    done = subprocess.run(
        [*words, str(path)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_import_of_the_package_imports_neither_torch_nor_megatron():
    code = (
        "import sys, aropd_mcore as aropd\n"
        "aropd.load_config, aropd.Config, dir(aropd)\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(REPO)}
    )
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        aropd.trian  # noqa: B018


def test_script_without_a_main_guard_trains_twice_and_calls_every_function(run, tmp_path):
    """Two trainings with background saves, then every other function, in one process."""
    output = python(
        f"""
import aropd_mcore as aropd

print("script begins")
for name in ("first", "second"):
    overrides = [f"output_dir={{name}}", "checkpoint.asynchronous=true"]
    config = aropd.load_config({str(run)!r}, overrides)
    result = aropd.train(config)
    assert [line["step"] for line in result.history] == [0, 1]
    assert result.metrics["loss"] > 0 and result.checkpoint.name == "iter_0000002"
responses = aropd.generate("first", prompts=["1 + 1?", {{"question": "2?", "n": 2}}], samples=2,
                           max_response_tokens=8)
assert len(responses) == 4 and responses[3].fields["n"] == 2
assert len(responses[0].response_ids) <= 8
with open("rows.jsonl", "w") as file:
    file.write('{{"question": "1 + 1?", "reasoning": "2", "answer": "2"}}\\n')
summary = aropd.evaluate("first", tasks=["own:math=rows.jsonl"], max_response_tokens=8)
assert summary.tasks["own"]["problems"] == 1 and summary.mean_accuracy in (0, 1)
diagnosis = aropd.diagnose("second", data="rows.jsonl", max_response_tokens=16, rows=1)
assert diagnosis["metrics"]["num_responses"] == 1
folder = result.export_hf("hf")
assert (folder / "config.json").exists()
try:
    aropd.generate("first", prompts=["1?"], max_tokens=8)
except ValueError as error:
    assert "--max-tokens" in str(error), error
else:
    raise AssertionError
print("script ends")
""",
        tmp_path,
    )
    assert output.count("script begins") == output.count("script ends") == 1
    assert not list(tmp_path.glob("eval*")), "without `out`, no folder of results remains"


@pytest.mark.rest
def test_train_with_several_processes_gives_the_metrics_of_torchrun(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    config = aropd.load_config(run, [f"output_dir={tmp_path / 'started'}"])
    result = aropd.train(config, num_processes=2)
    (tmp_path / "rows.jsonl").write_text('{"question": "1?", "reasoning": "1", "answer": "1"}\n')
    script = f"""
import json
import aropd_mcore as aropd

out = [aropd.train(aropd.load_config({str(run)!r}, ["output_dir=ranks"])).metrics["loss"]]
options = dict(max_response_tokens=4)
out.append([r.text for r in aropd.generate("ranks", ["1?", "2?"], out="out.jsonl", **options)])
tasks = ["own:math=rows.jsonl"]
for _ in range(2):  # sampled and graded, then graded again
    out.append(aropd.evaluate("ranks", tasks, out="eval", **options).tasks["own"]["accuracy"])
diagnosis = aropd.diagnose("ranks", "rows.jsonl", out="diagnose", max_response_tokens=16, rows=1)
out.append(diagnosis["metrics"]["num_responses"])
try:
    aropd.generate("ranks", [{{"quest": "1?"}}], out="other.jsonl", **options)
except ValueError as error:
    out.append(str(error))
print("RANK", json.dumps(out), flush=True)
"""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    output = python(script, tmp_path, *torchrun)
    lines = (tmp_path / "ranks/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] == result.metrics["loss"]
    first, second = [
        json.loads(line.split("RANK ")[1]) for line in output.splitlines() if "RANK " in line
    ]
    assert first == second, "every rank gets the result or the error"
    loss, texts, accuracy, again, num_responses, error = first
    assert loss == result.metrics["loss"] and accuracy == again and num_responses == 1
    assert "other.prompts.jsonl" in error
    responses = aropd.generate(tmp_path / "ranks", ["1?", "2?"], max_response_tokens=4)
    assert [response.text for response in responses] == texts, "one process as two"


@pytest.mark.rest
def test_train_with_an_output_dir_in_use_is_refused_in_one_line(run, tmp_path):
    script = f"""
import subprocess, sys, time
import aropd_mcore as aropd

config = aropd.load_config({str(run)!r}, ["output_dir=shared", "training.num_steps=100000"])
metrics = config.output_dir / "metrics.jsonl"
if sys.argv[1:] == ["first"]:
    aropd.train(config)
first = subprocess.Popen([sys.executable, __file__, "first"])
while not (metrics.exists() and metrics.read_text()):
    assert first.poll() is None
    time.sleep(0.1)
try:
    aropd.train(config)
except ValueError as error:
    num_lines = len(metrics.read_text().splitlines())
    while len(metrics.read_text().splitlines()) == num_lines:
        assert first.poll() is None
        time.sleep(0.1)
    sys.exit(f"refused: {{error}}")
finally:
    first.kill()
"""
    output = python(script, tmp_path, code=1)
    assert "refused: output_dir shared is in use by another run" in output
    assert "Traceback" not in output


def test_train_with_a_missing_model_raises_the_error_itself(run, tmp_path):
    config = aropd.load_config(run, [f"output_dir={tmp_path}", "model.path=/nowhere"])
    with pytest.raises(ValueError, match="/nowhere"):
        aropd.train(config)


@pytest.mark.rest
@pytest.mark.processes
def test_failed_job_of_several_processes_raises_its_command_and_exit_code(
    run, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    config = aropd.load_config(run, [f"output_dir={tmp_path}", "data.train=[/nowhere.jsonl]"])
    with pytest.raises(aropd.CommandFailed, match="aropd train: exit code 2") as failure:
        aropd.train(config, num_processes=2)
    assert failure.value.code == 2
    assert "/nowhere.jsonl" in capfd.readouterr().err


def test_train_outside_the_main_thread_is_refused(run):
    from concurrent.futures import ThreadPoolExecutor

    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(ValueError, match="expected the main thread"),
    ):
        pool.submit(aropd.train, aropd.load_config(run)).result()
