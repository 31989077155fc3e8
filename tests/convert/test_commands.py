"""aropd convert: output, files and exit status of the commands, and the scripts in tools/."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aropd_mcore import cli
from aropd_mcore.convert.hf_io import SINGLE
from tests.conftest import REPO
from tests.support.tiny_models import LLAMA31_ROPE, save_tiny_model
from tests.support.tiny_tokenizer import save_tiny_tokenizer

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """Create a folder as on the Hub: weights, tokenizer, template, license, and unused files."""
    folder = tmp_path_factory.mktemp("commands") / "hf"
    save_tiny_model("qwen2", folder, tie=True, num_hidden_layers=2)
    save_tiny_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (folder / "LICENSE").write_text("free")
    (folder / "modeling_custom.py").write_text("raise SystemExit('run')")
    (folder / "README.md").write_text("of the original weights")
    return folder


@pytest.fixture(scope="module")
def megatron(hf: Path) -> Path:
    """Import the folder with the script."""
    target = hf.parent / "megatron"
    subprocess.run(
        [sys.executable, REPO / "tools" / "convert_hf_to_mcore.py", hf, target], check=True
    )
    return target


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def test_scripts_restore_the_whole_folder(hf: Path, megatron: Path, tmp_path: Path):
    names = {path.name for path in (megatron / "iter_0000000").iterdir()}
    files = {name for name in names if name.endswith(".distcp")}
    assert "__0_0.distcp" in files and names - files == {".metadata", "metadata.json", "common.pt"}
    assert (megatron / "latest_checkpointed_iteration.txt").read_text() == "0"
    back = tmp_path / "back"
    script = REPO / "tools" / "convert_mcore_to_hf.py"
    subprocess.run([sys.executable, script, megatron, back], check=True)
    expected = {p.relative_to(hf) for p in hf.rglob("*") if p.suffix not in (".py", ".md")}
    assert {p.relative_to(back) for p in back.rglob("*")} == expected
    for path in expected:
        if (hf / path).is_file():
            assert (back / path).read_bytes() == (hf / path).read_bytes(), path


def test_a_single_iteration_takes_its_config_from_another_folder(
    hf: Path, megatron: Path, tmp_path: Path, capsys
):
    alone = tmp_path / "alone"
    shutil.copytree(megatron / "iter_0000000", alone)
    assert convert("export", alone, tmp_path / "out") == 2
    assert f"{tmp_path / 'hf' / 'config.json'} is missing" in capsys.readouterr().err
    assert convert("export", alone, tmp_path / "out", "--hf", hf) == 0
    assert convert("verify", hf, tmp_path / "out") == 0


def test_verify_reports_differences(hf: Path, megatron: Path, tmp_path: Path, capsys):
    assert convert("verify", hf, megatron, "--logits", "--json", tmp_path / "same.json") == 0
    printed = capsys.readouterr().out
    assert printed.endswith("the same\n") and "greedy tokens equal" in printed
    report = json.loads((tmp_path / "same.json").read_text())
    assert report["same"] and report["max_logit_error"] == 0 and len(report["tensors"]) == 26

    changed = _changed(hf, tmp_path / "changed", lambda norm: norm.add_(0.5 * (norm == norm[3])))
    assert convert("verify", megatron, changed, "--logits", "--json", tmp_path / "report.json") == 1
    printed = capsys.readouterr().out
    assert NORM in printed and "25 of 26 tensors are equal" in printed and "DIFFERENT" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    (different,) = [tensor for tensor in report["tensors"] if not tensor["equal"]]
    largest = float(load_file(hf / SINGLE)[NORM].abs().max())
    assert different["max_abs_error"] == pytest.approx(0.5)
    assert different["max_rel_error"] == pytest.approx(0.5 / largest)
    assert report["max_logit_error"] > 1e-3

    lost = _changed(hf, tmp_path / "lost", lambda norm: norm.fill_(torch.nan))
    assert convert("verify", hf, lost) == 1
    assert "no number" in capsys.readouterr().out
    assert convert("verify", lost, lost) == 0, "equal bits are equal, even if they are NaN"


def _changed(hf: Path, target: Path, change) -> Path:
    target.mkdir()
    tensors = load_file(hf / SINGLE)
    change(tensors[NORM])
    save_file(tensors, target / SINGLE)
    (target / "config.json").write_text((hf / "config.json").read_text())
    return target


def test_another_dtype_is_a_difference_with_its_error(
    hf: Path, megatron: Path, tmp_path: Path, capsys
):
    half = tmp_path / "half"
    assert convert("export", megatron, half, "--dtype", "bfloat16") == 0
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    original = load_file(hf / SINGLE)
    for name, tensor in load_file(half / SINGLE).items():
        assert torch.equal(tensor, original[name].bfloat16()), name
    capsys.readouterr()
    assert convert("verify", hf, half) == 1
    printed = capsys.readouterr().out
    assert "float32 / bfloat16" in printed and "0 of 26 tensors are equal" in printed
    assert "and 6 more" in printed


def test_other_architectures_differ_by_their_tensors(hf: Path, tmp_path: Path, capsys):
    save_tiny_model("qwen2", tmp_path / "deeper", tie=True, num_hidden_layers=3)
    assert convert("verify", hf, tmp_path / "deeper") == 1
    printed = capsys.readouterr().out
    assert f"only in {tmp_path / 'deeper'}: model.layers.2.mlp.up_proj.weight" in printed


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"rope_theta": 500.0}, {"rope.theta": [10000.0, 500.0]}),
        (
            {"rope_parameters": LLAMA31_ROPE},
            {
                "rope.scaling": ["default", "llama3"],
                "rope.factor": [None, 8.0],
                "rope.original_positions": [None, 8192],
            },
        ),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": [1e-6, 1e-5]}),
        ({"max_position_embeddings": 256}, {"max_position_embeddings": [512, 256]}),
        ({"dtype": "bfloat16"}, {"dtype": ["float32", "bfloat16"]}),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
            {
                "num_heads": [8, 4],
                "num_kv_heads": [4, 2],
                "head_dim": [8, 16],
                "rope.dim": [8, 16],
            },
        ),
    ],
)
def test_verify_lists_facts_that_differ_though_all_tensors_are_equal(
    changes: dict, facts: dict, tmp_path: Path, capsys
):
    """Each change affects what transformers or vLLM computes or accepts, but no tensor."""
    save_tiny_model("qwen2", tmp_path / "a", num_hidden_layers=2)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    if "rope_theta" in changes:
        config.pop("rope_parameters")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | changes))
    assert convert("verify", tmp_path / "a", tmp_path / "b", "--json", tmp_path / "report") == 1
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report").read_text())
    assert report["facts"] == facts and not report["same"]
    assert all(tensor["equal"] for tensor in report["tensors"])
    for name, (a, b) in facts.items():
        assert f"{name} differs: {a} in {tmp_path / 'a'}, {b} in {tmp_path / 'b'}\n" in printed


def test_verify_lists_sliding_windows_and_routing_that_differ(tmp_path: Path, capsys):
    for family, key, value, line in (
        ("mistral", "sliding_window", None, "windows.size differs: 10 in"),
        ("qwen3_moe", "norm_topk_prob", False, "routing.normalized differs: True in"),
        ("qwen3_moe", "num_experts_per_tok", 1, "routing.experts_per_token differs: 2 in"),
    ):
        sizes = {"num_hidden_layers": 1, "max_position_embeddings": 48}
        a, b = tmp_path / f"{key} a", tmp_path / f"{key} b"
        save_tiny_model(family, a, **sizes)
        shutil.copytree(a, b)
        config = json.loads((b / "config.json").read_text()) | {key: value}
        if value == 1:
            config["norm_topk_prob"] = False
        (b / "config.json").write_text(json.dumps(config))
        assert convert("verify", a, b) == 1
        assert line in capsys.readouterr().out


def test_verify_notes_other_files_that_differ(hf: Path, tmp_path: Path, capsys):
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    assert convert("verify", hf, other) == 0
    assert "note" not in capsys.readouterr().out
    (other / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    (other / "generation_config.json").unlink()
    config = json.loads((hf / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"logit_scale": 0.5, "bos_token_id": 3}))
    assert convert("verify", hf, other) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "note: config.json differs in keys that are not compared: bos_token_id, logit_scale; "
        "--logits compares what transformers computes",
        "note: chat_template.jinja differs",
        f"note: {other / 'generation_config.json'} is missing",
        "the same",
    ]


def test_inspect_summarizes_both_kinds(hf: Path, megatron: Path, tmp_path: Path, capsys):
    assert convert("inspect", megatron, "--shapes", "--json", tmp_path / "summary.json") == 0
    printed = capsys.readouterr().out
    for text in ("Megatron torch_dist", "Qwen2ForCausalLM, tied", "float32", "step        0"):
        assert text in printed
    assert "model.layers.0.self_attn.k_proj.bias [32]" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dtypes"] == {"float32": summary["parameters"]}
    assert (summary["has_teacher"], summary["has_optimizer"]) == (False, False)
    assert convert("inspect", hf) == 0
    assert "(HF)" in capsys.readouterr().out


def test_shards_have_the_requested_size(megatron: Path, hf: Path, tmp_path: Path, capsys):
    arguments = ("export", megatron, tmp_path / "out", "--max-shard-size")
    assert convert(*arguments, "100KB") == 0
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 140_000  # the embedding, 130 KB, cannot be cut
    assert convert("verify", hf, tmp_path / "out") == 0
    assert convert(*arguments, "5 GiB") == 2
    assert "found '5 GiB', expected a size such as 5GB" in capsys.readouterr().err


def test_a_checkpoint_of_the_wrong_kind_is_refused(
    hf: Path, megatron: Path, tmp_path: Path, capsys
):
    for arguments, message in (
        (
            ("import", megatron, tmp_path / "out"),
            "found a Megatron checkpoint, expected an HF",
        ),
        (("export", hf, tmp_path / "out"), "found an HF folder, expected a Megatron checkpoint"),
        (("export", megatron, tmp_path / "out", "--weights", "teacher"), "has no teacher"),
        (("verify", hf, tmp_path), "not a checkpoint; expected config.json (HF), or"),
    ):
        assert convert(*arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["import", "export", "verify", "inspect"])
def test_help_states_every_default(command: str, capsys):
    with pytest.raises(SystemExit) as done:
        convert(command, "--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    options = text[text.index("options:") : text.index("examples:")]
    named = [line for line in options.splitlines() if line.startswith("  --")]
    assert len(named) >= 3
    assert " ".join(options.split()).count("(default") == len(named)
    assert "exit status:" in text
