"""Files of a tiny run (model, tokenizer, rows and YAML), written in a second without downloads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_tokenizer import (
    CHAT_TEMPLATE,
    TAGS,
    THINKING_TEMPLATE,
    VOCAB_SIZE,
    save_tiny_tokenizer,
)

EOS_IDS = list(range(5, VOCAB_SIZE, 16))
"""EOS tokens. There are many, so that a random model's responses end at different lengths."""
NUM_ROWS = 24


def write_model(
    folder: Path,
    family: str = "qwen2",
    *,
    tie: bool = False,
    thinks: bool = False,
    **settings: Any,
) -> Path:
    """Save a random model with the byte tokenizer into `folder`.

    Args:
        thinks: the chat template opens a thought, and some tokens close it.
    """
    ids: dict[str, Any] = {
        "eos_token_id": EOS_IDS,
        # transformers initializes the embedding of a padding token as zeros and does not train it.
        "pad_token_id": None,
    }
    ids["vocab_size"] = VOCAB_SIZE + len(TAGS) * thinks
    save_tiny_model(family, folder, tie=tie, **{**ids, **settings})
    template = THINKING_TEMPLATE if thinks else CHAT_TEMPLATE
    save_tiny_tokenizer(folder, chat_template=template, thinks=thinks)
    return folder


def write_rows(path: Path, teachers: Sequence[str] = ()) -> Path:
    """Write rows with questions, traces and sample weights of different sizes.

    Args:
        teachers: two names of teachers. The first one has two thirds of the rows. The rows then
            have domains, too.
    """
    rows = [
        {
            "question": f"{'Q' * (i % 5)} {i} + {i * i}?",
            "reasoning": f"add {i} to {i * i} " * (1 + i % 3),
            "answer": str(i + i * i),
            "sample_weight": 0.5 + (i % 4) / 2,
        }
        for i in range(NUM_ROWS)
    ]
    for i, row in enumerate(rows if teachers else ()):
        row["teacher"] = teachers[i % 3 == 0]
        if i % 4:  # other rows have no domain
            row["domain"] = f"level {i % 4 // 2}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_config(model: Path, rows: Path, output_dir: Path, **sections: dict[str, Any]) -> dict:
    """Return a run's configuration as a YAML tree: short prompts and responses, a few steps."""
    base: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {"train": [str(rows)]},
        # Without packing the number of microbatches does not depend on the responses.
        "training": {
            "num_steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "packing": False,
        },
        "views": {
            "system_prompt": None,
            "max_prompt_tokens": 128,
            "teacher_template": "{question}\n{trace}",
            "trace_template": "{reasoning}\n{answer}",
        },
        "rollout": {"max_response_tokens": 16},
        "optimizer": {"lr": 1e-3, "warmup_ratio": 0.0},
        "teacher": {"ema_rate": 0.1},
    }
    if "teachers" in sections:
        del base["teacher"]
    config: dict[str, Any] = {"output_dir": str(output_dir), **base}
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return config


def write_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write all input of `aropd train` into `folder`, and return the YAML's path.

    The run's output_dir is folder/out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = write_model(folder / "model")
    rows = write_rows(folder / "rows.jsonl", list(sections.get("teachers", ())))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(model, rows, folder / "out", **sections)))
    return path
