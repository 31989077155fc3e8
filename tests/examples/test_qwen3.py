"""The example of a thinking model: its configuration on the real tokenizer and the real shapes."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from aropd_mcore.cli import main
from tests.conftest import REPO
from tests.convert.big_models import write_sparse

EXAMPLE = REPO / "examples" / "qwen3" / "qwen3-8b-8xh100.yaml"
QWEN3_8B = json.loads((REPO / "examples/clusters/Qwen3-32B/config.json").read_text()) | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "max_window_layers": 36,
}
# Like Qwen3's: thoughts of earlier turns are removed, and without thinking a prompt ends with an
# empty thought.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set visible = (m.content.split('</think>') | last).lstrip('\n') %}"
    "{{ visible if m.role == 'assistant' else m.content }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


@pytest.fixture
def folder(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with the model's folder, whose weights are headers only, and rows."""
    model = tmp_path / "models" / "Qwen3-8B"
    model.parent.mkdir()
    assert write_sparse(model, QWEN3_8B) == 2 * 8_190_735_360
    shutil.copytree(shared_data / "qwen2_tokenizer", model, dirs_exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>")])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(model))
    rows = tmp_path / "runs" / "math"
    rows.mkdir(parents=True)
    for name, first in (("train", 0), ("heldout", 40)):
        lines = [
            json.dumps({"question": f"{i} + 1?", "reasoning": "Add. " * i, "answer": str(i + 1)})
            for i in range(first + 1, first + 41)
        ]
        (rows / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_qwen3_8b_fits_on_eight_gpus_and_passes_the_dry_run(folder: Path, capsys):
    assert main(["plan", str(EXAMPLE), "--gpus", "8", "--memory", "75"]) == 0
    assert "\nfits into 75 GB: the peak is 60.5 GB" in capsys.readouterr().out
    assert main(["train", str(EXAMPLE), "--dry-run", "--nproc-per-node", "8"]) == 0
    shown = capsys.readouterr().out
    assert "# 8 processes: TP 4 + SP x PP 1 x DP 2; 8,190,735,360 parameters" in shown
    assert "# 40 rows, 200 steps of 32 responses" in shown
    assert "# validation: 120 problems" in shown
    assert "chat_template" not in shown.split("# 40 rows")[1], "a note about the template"


def test_qwen3_8b_prompts_and_spans(folder: Path, capsys):
    words = ["show-views", "runs/math/train.jsonl", "--row", "3", "--config", str(EXAMPLE)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("◀ response") == 3 and "note:" not in shown
    # Thinking: <think>, a line feed, 4 times "Add" and ".", </think>. The last "." has a line feed.
    assert "oracle response: 18 tokens, thinking 11, answer 7 " in shown
    assert "\\boxed{5}<|im_end|>" in shown
    assert main([*words, "--chat-template-kwargs", "{enable_thinking: false}"]) == 0
    assert capsys.readouterr().out.count("</think>") == 6
