"""examples/smollm2: the problems, and with AROPD_SMOLLM2 (make test-smollm2) the real model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aropd_mcore.config_file import load_config
from aropd_mcore.numerics import fused_linear_anchored_residual_kl
from tests.conftest import REPO

EXAMPLE = REPO / "examples" / "smollm2"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def run(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "data"
    run(EXAMPLE / "problems.py", out, "--seeds", 0, 1)
    return out


def test_over_cores_after_a_failure_starts_no_further_run():
    program = """
import sys, time
import study

def make(item, core):
    print("started", flush=True)
    time.sleep(0.2)
    sys.exit("failed")

study.over_cores(make, range(20), 1)
"""
    environment = ENVIRONMENT | {"PYTHONPATH": f"{REPO}:{EXAMPLE}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr == "failed\n"
    # The second run may start before the failure of the first is handled.
    assert done.stdout.count("started") <= 2


def test_runs_of_a_seed_have_one_base():
    program = """
import tables
runs = {"base": {"0": {"base": "a"}, "1": {"base": "b"}}}
old = {"runs": runs, "grid": {}, "views": {}, "diagnoses": {}}
assert tables.merged(old, old | {"runs": {"sft": {"1": {"base": "b"}}}})["runs"]["sft"]
tables.merged(old, old | {"runs": {"sft": {"0": {"base": "b"}}}})
"""
    environment = ENVIRONMENT | {"PYTHONPATH": f"{REPO}:{EXAMPLE}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert "ValueError: seed 0: found runs of the base models a and b (sft)" in done.stderr


def test_differences_of_problems_are_those_of_common_seeds():
    program = """
import tables
answer = {"id": "shop-2-0", "kind": "shop", "num_steps": 2, "cut": False, "skips": False}
answer |= {"premature": False, "length": 9}
def run(*right):
    lines = [answer | {"right": r, "id": f"{i // 2}"} for i, r in enumerate(right)]
    wrong = answer | {"right": False, "kind": "carry"}
    lines += [wrong | {"num_steps": n, "id": f"9{n}"} for n in (3, 5)]
    return tables.numbers({"greedy": lines, "sampled": lines})
first, second = run(True, True, False, True), run(True, False, True, True)
assert first["sampled/problems"] == "2100", first
results = {"runs": {"aropd_0.8": {"0": first, "1": first}, "sft": {"1": second}}}
assert tables.problem_gains(results, "aropd_0.8", "sft", "sampled") == [0.5, -0.5, 0, 0]
"""
    environment = ENVIRONMENT | {"PYTHONPATH": f"{REPO}:{EXAMPLE}"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_scripts_with_a_missing_file_or_run_print_one_line(tmp_path):
    (tmp_path / "few.json").write_text('{"runs": {"sft": {}}}')
    few = ["tables.py", "problems", "--results", "few.json"]
    for words, message in (
        (few, "few.json: found no run of aropd_0.8, only of sft"),
        ([*few, "--reference", "base"], "few.json: found no run of base, only of sft"),
        (["tables.py", "collect", "--runs", "none"], "none: no such folder"),
        (["tables.py", "main", "--results", "none.json"], "none.json: no such file"),
        (["fetch.py", "out", "--wheel", "none.whl"], "none.whl: no such file"),
    ):
        done = subprocess.run(
            [sys.executable, EXAMPLE / words[0], *words[1:]],
            env=ENVIRONMENT,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"{words[0]}: error: {message}")
        assert done.stderr.count("\n") == 1


def test_problems_are_unique_and_their_answers_right(data):
    rows = [row for path in sorted(data.rglob("*.jsonl")) for row in read_rows(path)]
    assert len(rows) == 400 + 100 + 2 * (400 + 200)
    assert len({row["question"] for row in rows}) == len(rows)
    solve = {"shop": solve_shop, "carry": solve_carry}
    for row in rows:
        kind, num_steps, _ = row["id"].split("-")
        trace = row["reasoning"].splitlines()
        assert len(trace) == int(num_steps) + 1
        assert solve[kind](row["question"]) == row["answer"], row
        assert row["answer"] in trace[-1]
        for line in trace[1:]:
            if kind == "shop":
                left, result = line.rstrip(".").split(" = ")
                assert eval(left) == int(result)


def solve_shop(question: str) -> str:
    """Return the amount after all sentences."""
    first, *sentences = question.split(". ")
    amount = int(re.findall(r"\d+", first)[0])
    for sentence in sentences[:-1]:
        numbers = re.findall(r"\d+", sentence)
        if not numbers:
            assert "as many" in sentence
            amount *= 2
        else:
            amount += int(numbers[0]) * (1 if re.search("buys|finds", sentence) else -1)
    return str(amount)


def solve_carry(question: str) -> str:
    """Return the place of the thing after all sentences."""
    sentences = question.split(". ")
    at, holder = {}, sentences[0].split()[0]
    for sentence in sentences[:-1]:
        name, place = sentence.split()[0], re.findall(r"(?:in|to) the (\w+)", sentence)[0]
        if "puts down" in sentence:
            holder, left = None, at[name]
        at[name] = place
        if "picks up" in sentence:
            assert place == left
            holder = name
    return at[holder] if holder else left


def test_problems_with_the_same_arguments_gives_the_same_files(data, tmp_path):
    run(EXAMPLE / "problems.py", tmp_path / "again", "--seeds", 1)
    for path in data.rglob("*.jsonl"):
        assert (tmp_path / "again" / path.relative_to(data)).read_bytes() == path.read_bytes()


VOCAB = 20


@pytest.mark.parametrize("loss", ["top_20", "sampled_token"])
def test_other_losses_have_the_expected_gradients(loss, monkeypatch):
    """With a vocabulary of 20 tokens, `top_20` equals the full sum. The gradients of
    `sampled_token`, weighted by each token's probability, add up to that of KL(student || target).
    """
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from other_losses import LOSSES, loss_with

    torch.manual_seed(0)
    hidden_TH, partial_TH, full_TH = torch.randn(3, 6, 8, dtype=torch.float64)
    student_VH, teacher_VH = torch.randn(2, VOCAB + 4, 8, dtype=torch.float64)
    weights_T = torch.rand(6, dtype=torch.float64)

    def gradients(function, weights_T, ids_T, **more) -> list[torch.Tensor]:
        leaves = [hidden_TH.clone().requires_grad_(), student_VH.clone().requires_grad_()]
        loss, metrics = function(
            *leaves, partial_TH, full_TH, teacher_VH, weights_T, residual_scale=0.8,
            residual_clip=0.5, vocab_size=VOCAB, main_grad_VH=None, sampled_ids_T=ids_T, **more,
        )  # fmt: skip
        assert set(metrics) >= {"loss_T", "kl_full_partial", "logprob_full"}
        loss.backward()
        return [leaf.grad for leaf in leaves]

    ours, ids_T = loss_with(LOSSES[loss]), torch.zeros(6, dtype=torch.long)
    if loss == "top_20":
        actual = gradients(ours, weights_T, ids_T)
        expected = gradients(fused_linear_anchored_residual_kl, weights_T, ids_T)
    else:
        s_TV = (hidden_TH @ student_VH[:VOCAB].T).softmax(-1)
        each = [gradients(ours, weights_T * s_TV[:, y], ids_T + y) for y in range(VOCAB)]
        actual = [sum(parts) for parts in zip(*each, strict=True)]
        divergence = {"divergence": "kl_student_target"}
        expected = gradients(fused_linear_anchored_residual_kl, weights_T, ids_T, **divergence)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def model() -> Path:
    if "AROPD_SMOLLM2" not in os.environ:
        pytest.skip("needs AROPD_SMOLLM2, a folder of SmolLM2-135M-Instruct: make test-smollm2")
    return Path(os.environ["AROPD_SMOLLM2"])


def test_real_model_round_trip_is_bit_for_bit(model, tmp_path):
    run("-m", "aropd_mcore.cli", "convert", "import", model, tmp_path / "megatron")
    run("-m", "aropd_mcore.cli", "convert", "export", tmp_path / "megatron", tmp_path / "hf")
    run("-m", "aropd_mcore.cli", "convert", "verify", model, tmp_path / "hf", "--logits")


def test_real_model_greedy_tokens_equal_transformers(model, data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts, limit = tmp_path / "prompts.jsonl", 64
    rows = read_rows(data / "validation.jsonl")[:8]
    prompts.write_text("".join(json.dumps({"question": row["question"]}) + "\n" for row in rows))
    run(
        *("-m", "aropd_mcore.cli", "generate", "--model", model, "--prompts", prompts),
        *("--out", tmp_path / "out.jsonl", "--temperature", 0, "--dtype", "fp32"),
        *("--max-response-tokens", limit, "--config", EXAMPLE / "aropd.yaml"),
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    system = load_config(EXAMPLE / "aropd.yaml").views.system_prompt
    for row, line in zip(rows, read_rows(tmp_path / "out.jsonl"), strict=True):
        chat = [
            {"role": "system", "content": system},
            {"role": "user", "content": row["question"]},
        ]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = hf.generate(**inputs, max_new_tokens=limit, do_sample=False)
        assert line["response_ids"] == out[0, inputs["input_ids"].shape[1] :].tolist()
