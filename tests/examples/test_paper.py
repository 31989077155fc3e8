"""examples/paper: configs, preparation of the data, and submitted jobs."""

import importlib
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest
from pyarrow import parquet

from aropd_mcore.cli.entry import main, parse
from aropd_mcore.config_file import load_config
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.evaluation.tasks import Choices, parse_task, read_task
from tests.conftest import REPO
from tests.support.tiny_runs import write_model

NUM_ROWS = 260
"""Number of rows of a test: one step of 256 responses, and a few more."""
MODEL = "examples/clusters/Qwen2.5-7B-Instruct"


@pytest.fixture
def paper(monkeypatch) -> ModuleType:
    monkeypatch.chdir(REPO)
    monkeypatch.syspath_prepend(REPO / "examples" / "paper")
    return importlib.import_module("experiment")


def test_committed_configs_equal_the_table(paper):
    committed = {path: path.read_text() for path in paper.CONFIGS.rglob("*.*")}
    pairs = [(name, method) for name in paper.DOMAINS for method in paper.METHODS]
    assert committed == {
        paper.config_path(name, method): paper.config_text(name, method) for name, method in pairs
    }
    assert len(committed) == 18
    for name in paper.DOMAINS:
        first, *others = (load_config(paper.config_path(name, m)).views for m in paper.METHODS)
        assert all(views == first for views in others), "one domain has one kind of views"


def problem(number: int) -> dict[str, object]:
    """Return a record of NuminaMath-CoT."""
    question, solution = f"What is {number} + 1?", f"Add. So $\\boxed{{{number + 1}}}$."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
    return {"source": "cn_k12", "problem": question, "solution": solution, "messages": turns}


def task(number: int) -> dict[str, object]:
    """Return a record of Magicoder-Evol-Instruct-110K."""
    response = f"Return it.\n\n```python\ndef f():\n    return {number}\n```\n\nThat is all."
    return {"instruction": f"Write f, which returns {number}.", "response": response}


def question(number: int) -> dict[str, object]:
    """Return a record of MedMCQA as on the Hub."""
    letters = ("a", "b", "c", "d")
    return {
        "id": f"id-{number}",
        "question": f"Which is {number % 4}?",
        **{f"op{letter}": str(index) for index, letter in enumerate(letters)},
        "cop": number % 4,
        "choice_type": "single",
        "exp": "Look at the numbers one after the other." if number % 7 else None,
        "subject_name": "Anatomy",
        "topic_name": None,
    }


def write_hub_files(name: str, folder: Path) -> list[Path]:
    record = {"math": problem, "code": task, "medical": question}[name]
    records = [record(number) for number in range(2 * NUM_ROWS)]
    if name == "code":
        path = folder / "data-evol_instruct-decontaminated.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return [path]
    shards = [folder / f"train-0000{shard}-of-00002.parquet" for shard in range(2)]
    for shard, path in enumerate(shards):
        parquet.write_table(pa.Table.from_pylist(records[shard::2]), path)
    return shards


@pytest.mark.slow
@pytest.mark.parametrize("name", ["math", "code", "medical"])
def test_dry_run_of_every_method_accepts_rows_from_hub_files(
    paper, tmp_path, monkeypatch, capsys, name
):
    configs = {m: paper.config_path(name, m).absolute() for m in paper.METHODS}
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "model", max_position_embeddings=6144, num_key_value_heads=4)
    files = write_hub_files(name, tmp_path)
    assert paper.main(["prepare", name, *map(str, files), "--rows", str(NUM_ROWS)]) == 0
    rows = RowDataset.load([Path(f"runs/paper/rows/{name}.jsonl")])
    assert len(rows) == NUM_ROWS and all(row.reasoning for row in rows)
    capsys.readouterr()
    for method, config in configs.items():
        words = ["train", config, f"model.path={model}", "--dry-run", "--nproc-per-node", 16]
        assert main([*map(str, words)]) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        assert f"output_dir: runs/paper/{name}-{method}\n" in printed
        assert f"{NUM_ROWS} rows, 1 steps of 256 responses" in printed
        assert "TP 4 + SP x PP 1 x DP 4" in printed and "left out" not in printed


def test_mmlu_medical_has_only_the_medical_subjects(paper, tmp_path, capsys):
    subjects = ["virology", *paper.MMLU_MEDICAL, "anatomy", "astronomy"]
    records = [
        {"question": f"About {subject}?", "subject": subject, "choices": list("wxyz"), "answer": 2}
        for subject in subjects
    ]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "test.parquet")
    words = ["mmlu", str(tmp_path / "test.parquet"), "--benchmarks", str(tmp_path)]
    assert paper.main(words) == 0
    problems = read_task(parse_task(f"mmlu_medical:choices={capsys.readouterr().out.strip()}"))
    assert len(problems) == len(paper.MMLU_MEDICAL) + 1
    assert {problem.gold for problem in problems} == {Choices(tuple("wxyz"), "C")}
    written = (tmp_path / "mmlu_medical.jsonl").read_bytes()
    parquet.write_table(pa.Table.from_pylist(records[-2:]), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="no questions of the subjects clinical_knowledge"):
        paper.main(words)
    assert (tmp_path / "mmlu_medical.jsonl").read_bytes() == written


def test_dry_run_prints_one_job_per_run_and_model(paper, capsys):
    for_sbatch = ["--dry-run", "--model", MODEL, "--", "--partition=gpu"]
    before = sorted(REPO.glob("runs/paper/*"))
    assert paper.main(["train", *for_sbatch]) == 0
    trained = capsys.readouterr().out.splitlines()
    assert len({re.search(r"--job-name=(\S+)", line)[1] for line in trained}) == 18
    assert all("--nodes=2" in line and "--partition=gpu" in line for line in trained)

    assert paper.main(["evaluate", "--benchmarks", "b", *for_sbatch]) == 0
    tasks: Counter[str] = Counter()
    models = set()
    for line in capsys.readouterr().out.splitlines():
        wrapped = next(word for word in shlex.split(line) if word.startswith("--wrap="))
        program, *words = shlex.split(wrapped.removeprefix("--wrap="))
        args = parse(words)
        assert program == "aropd" and args.config.is_file()
        assert args.temperature == 0 and args.samples == 1
        domain = args.config.parent.name
        assert args.max_response_tokens == (512 if domain == "medical" else 1024)
        assert args.allow_code_execution == (args.code_asserts == 5) == (domain == "code")
        tasks.update(f"{domain} {parse_task(text).name}" for text in args.tasks)
        models.add((domain, args.model))
    assert len(models) == 21 and set(tasks.values()) == {7}
    assert set(tasks) == {
        *("math math500", "math amc23", "code humaneval_plus", "code mbpp_plus"),
        *("medical mmlu_medical", "medical medqa", "medical medmcqa"),
    }
    assert ("code", Path("runs/paper/code-aropd_0.8")) in models
    assert sorted(REPO.glob("runs/paper/*")) == before


def test_evaluate_without_sbatch_is_refused(paper, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    for name in ("math500.jsonl", "amc23.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match="sbatch is not on PATH"):
        paper.main(["evaluate", "--domains", "math", "--benchmarks", str(tmp_path)])


def test_prepare_0_rows_is_refused(paper, capsys):
    with pytest.raises(SystemExit):
        paper.main(["prepare", "math", "x.jsonl", "--rows", "0"])
    assert "expected at least 1, found 0" in capsys.readouterr().err
