"""What of a run's configuration may differ from the checkpoint's that it goes on from.

    free      where and how fast: the run is the same up to rounding
    said      the run goes on by other rules from this step on, which may be what is wanted
    refused   the steps so far would not belong to it; checkpoint.allow_changes lets it through

A setting that stands in neither list is `said`. Data and model are compared by what is in them, not
by the paths that name them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.removed_settings import is_removed_default

FREE = (
    "output_dir",
    "checkpoint",
    "limits",
    "logging",
    "parallel",
    "training.micro_batch_size",
    "training.packing",
    "training.max_tokens_per_microbatch",
    "training.recompute",
    "training.max_skipped_steps",
    "teacher.weights",
    "teacher.hidden_states",
    "objective.chunk_tokens",
    "objective.metrics",
    "objective.topk_overlap",
    "objective.hindsight_gap",
    "objective.hindsight_floor",
    "rollout.batch_size",
    "rollout.kv_cache_tokens",
    "rollout.vllm",
    # Its effect is in the rows and their order, which are compared by content.
    "data.on_bad_row",
)
REFUSED = {
    "data.train": "the rows behind it are others, so the place in the data means nothing",
    "data.shuffle": "the rows come in another order, some again and some never",
    "training.seed": "the rows come in another order, some again and some never",
    "training.global_batch_size": "a step takes other rows, some again and some never",
    "rollout.rollouts_per_prompt": "a step takes other rows, some again and some never",
    "model.path": "the architecture that its config.json describes is another",
    "model.chat_template": "the prompts are others",
    "model.tokenizer": "the prompts are others, or token ids mean other text",
    "model.dtype": "the weights are stored in another",
    "objective.name": "it is another method, with another optimizer state behind it",
    "teacher.kind": "the teacher's weights are others, or are not in the checkpoint",
    "teacher.fp32_master": "the teacher's average is stored in another precision",
}
"""Setting -> why."""
CONTENTS_ONLY = ("model.chat_template", "model.tokenizer")
"""Of REFUSED, what is no setting: files of the model's folder."""
_BY_CONTENT = ("data.train", "model.path", *CONTENTS_ONLY)


@dataclass(frozen=True)
class Change:
    """One setting that differs."""

    key: str
    saved: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.saved)} -> {json.dumps(self.current)}"


def describe_run(
    config: Config, dataset: RowDataset, identity: Mapping[str, str]
) -> dict[str, Any]:
    """Describe a run for the manifests of its checkpoints.

    Args:
        identity: hashes of the chat template and the tokenizer, as ViewBuilder.identity has them.
    Returns:
        `config`, `contents` (hashes of what is behind the config's paths), `data` (counts of rows)
        and `config_hash`, a hash of settings and contents that are not free.
    """
    settings = config.model_dump(mode="json")
    contents = {"data.train": dataset.fingerprint(), "model.path": _architecture(config)}
    contents |= {f"model.{name}": identity[name] for name in ("chat_template", "tokenizer")}
    counted = {k: v for k, v in _flat(settings).items() if not _is_free(k)} | contents
    return {
        "config": settings,
        "config_hash": _hash(json.dumps(counted, sort_keys=True)),
        "contents": contents,
        "data": {"num_rows": len(dataset), "num_bad_rows": dataset.num_bad_rows},
    }


def _architecture(config: Config) -> str:
    architecture = read_architecture(config.model.path)
    parts = {field.name: getattr(architecture, field.name) for field in fields(architecture)}
    return _hash(str(parts | {"family": architecture.family.architecture}))


def check_changes(
    saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Sequence[str]
) -> list[str]:
    """Compare a checkpoint's run with this one.

    Args:
        saved, current: as describe_run gives them. Contents that a checkpoint of an older version
            does not record are not compared.
        allowed: checkpoint.allow_changes.
    Returns:
        One line per kind of difference; empty if there is none.
    Raises:
        ConfigError: a change is refused; the message names all of them, and the way out.
    """
    for key in allowed:
        if key not in REFUSED:
            raise ConfigError(
                f"checkpoint.allow_changes: found {key!r}, which nothing refuses; expected some of "
                + ", ".join(REFUSED)
            )
    old, new = saved["contents"], current["contents"]
    changes = _differences(saved["config"], current["config"]) + [
        Change(key, f"content {old[key]}", f"content {new[key]}")
        for key in _BY_CONTENT
        if key in old and old[key] != new[key]
    ]
    unknown = [key for key in _BY_CONTENT if key not in old]
    refused = [c for c in changes if c.key in REFUSED and c.key not in allowed]
    if refused:
        raise ConfigError(
            "the checkpoint is of another run:"
            + "".join(f"\n  {change} ({REFUSED[change.key]})" for change in refused)
            + "\nuse the saved values, or another output_dir; or go on nevertheless with "
            f"'checkpoint.allow_changes=[{','.join(c.key for c in refused)}]'"
        )
    free = [str(c) for c in changes if _is_free(c.key)]
    said = [str(c) for c in changes if not _is_free(c.key)]
    notes = []
    if free:
        notes.append(f"changed, and the same run: {', '.join(free)}")
    if said:
        notes.append(f"changed, and other rules from here on: {', '.join(said)}")
    if unknown:
        notes.append(
            f"the checkpoint is older than the record of {', '.join(unknown)}: whether they have "
            "changed is not known"
        )
    return notes


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    old, new = _flat(saved), _flat(current)
    return [
        Change(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key not in _BY_CONTENT
        and not is_removed_default(key, old.get(key))
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else None
        flat |= {prefix + name: value} if inner is None else inner
    return flat


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
