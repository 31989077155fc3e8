"""Settings that may change when a run is resumed.

    free       affects only where and how fast the run computes: the run is the same up to rounding
    effective  changes the computation from this step on: the run resumes and prints the change
    refused    the steps so far would belong to another run; checkpoint.allow_changes permits it

A setting in neither FREE nor REFUSED is effective. Data and model are compared by content, not by
path. The settings of one of several teachers, `teachers.NAME`, follow the rules of `teacher`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from aropd_mcore.config import Config, ConfigError, teacher_section
from aropd_mcore.convert.architecture import Architecture, read_architecture
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.removed_settings import is_removed_default, renamed_value

FREE = (
    "output_dir",
    "checkpoint",
    "limits",
    "logging",
    "validation",
    "parallel",
    "training.micro_batch_size",
    "training.packing",
    "training.max_tokens_per_microbatch",
    "training.recompute",
    "training.max_skipped_steps",
    "teacher.parallel",
    "teacher.weights",
    "teacher.hidden_states",
    "objective.chunk_tokens",
    "objective.metrics",
    "objective.topk_overlap",
    "objective.hindsight_gap",
    "objective.hindsight_floor",
    "rollout.batch_size",
    "rollout.kv_cache_tokens",
    "rollout.cuda_graphs",
    "rollout.vllm",
    # It affects only the rows and their order, which are compared by content.
    "data.on_bad_row",
)
REFUSED = {
    "data.train": "the rows or their weights differ, so the position in the data is invalid",
    "data.shuffle": "the order of the rows changes: some would repeat or be skipped",
    "training.seed": "the order of the rows changes: some would repeat or be skipped",
    "training.global_batch_size": "steps take other rows: some would repeat or be skipped",
    "rollout.rollouts_per_prompt": "steps take other rows: some would repeat or be skipped",
    "model.path": "its config.json describes another architecture",
    "model.chat_template": "the prompts change",
    "model.tokenizer": "the prompts or the meaning of token ids change",
    "adapter.rank": "the checkpoint has an adapter of another rank, or none",
    "adapter.alpha": "the trained adapter would have another scale",
    "adapter.targets": "the checkpoint's adapter changes other layers",
    "adapter.path": "the run started from another adapter",
    "adapter.base": "the adapter was trained on other base weights",
    "model.dtype": "the weights are stored in another dtype",
    "objective.name": "the method changes, and the optimizer state belongs to the old one",
    "teacher.kind": "the teacher's weights differ, or are not in the checkpoint",
    "teacher.path": "it is another teacher",
    "teacher.fp32_master": "the teacher's average is stored in another precision",
}
"""Settings that may not change, and the reason."""
CONTENTS_ONLY = ("model.chat_template", "model.tokenizer", "adapter.base")
"""Keys of REFUSED that are no settings but files in the model's folder."""
_BY_CONTENT = ("data.train", "model.path", "teacher.path", *CONTENTS_ONLY)


@dataclass(frozen=True)
class Change:
    """One setting that differs from the checkpoint."""

    key: str
    saved: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.key} {json.dumps(self.saved)} -> {json.dumps(self.current)}"


def describe_run(
    config: Config,
    dataset: RowDataset,
    identity: Mapping[str, str],
    *,
    teacher_fingerprints: Mapping[str, str] | None = None,
    base_fingerprint: str | None = None,
) -> dict[str, Any]:
    """Describe a run for the manifests of its checkpoints.

    Args:
        identity: hashes of the chat template and the tokenizer (ViewBuilder.identity).
        teacher_fingerprints: hashes of the teachers of kind `model` by name
            (TeacherModel.fingerprint).
        base_fingerprint: hash of the base weights of an adapter (convert.adapter.base_fingerprint).
    Returns:
        config: all settings.
        contents: hashes of the rows, the architecture, the chat template, the tokenizer, of
            teachers of kind `model`, and of an adapter's base weights.
        data: numbers of rows and of bad rows.
        config_hash: hash of the contents and of the settings that are not free.
    """
    settings = config.model_dump(mode="json")
    architecture = read_architecture(config.model.path)
    contents = {
        "data.train": dataset.fingerprint(),
        "model.path": hash_architecture(architecture),
    }
    for name, fingerprint in (teacher_fingerprints or {}).items():
        contents[f"{teacher_section(name)}.path"] = fingerprint
    if base_fingerprint is not None:
        contents["adapter.base"] = base_fingerprint
    contents |= {f"model.{name}": identity[name] for name in ("chat_template", "tokenizer")}
    counted = {k: v for k, v in _flat(settings).items() if not _is_free(k)} | contents
    return {
        "config": settings,
        "config_hash": _hash(json.dumps(counted, sort_keys=True)),
        "contents": contents,
        "data": {"num_rows": len(dataset), "num_bad_rows": dataset.num_bad_rows},
    }


def hash_architecture(architecture: Architecture) -> str:
    """Return a hash (16 hex digits) of an architecture, independent of where it is stored."""
    parts = {field.name: getattr(architecture, field.name) for field in fields(architecture)}
    return _hash(str(parts | {"family": architecture.family.architecture}))


def check_changes(
    saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Sequence[str]
) -> list[str]:
    """Compare the run of a checkpoint with the current run.

    Args:
        saved, current: descriptions by describe_run. Contents that a checkpoint of an older version
            does not record are not compared.
        allowed: keys of refused changes to permit (checkpoint.allow_changes).
    Returns:
        One line per kind of change. Empty if nothing changed.
    Raises:
        ConfigError: a change is refused. The message lists all refused changes and how to permit
            them.
    """
    for key in allowed:
        if _rule(key) not in REFUSED:
            raise ConfigError(
                f"checkpoint.allow_changes: found {key!r}, expected settings that may not change "
                "otherwise: " + ", ".join(REFUSED)
            )
    old, new = saved["contents"], current["contents"]
    changes = _differences(saved["config"], current["config"]) + [
        Change(key, f"content {old[key]}", f"content {new[key]}")
        for key in new
        if key in old and old[key] != new[key]
    ]
    # A teacher that the checkpoint does not know has a kind, too, which is a change.
    unknown = [key for key in new if key not in old and _rule(key) == key]
    refused = [c for c in changes if _rule(c.key) in REFUSED and c.key not in allowed]
    if refused:
        raise ConfigError(
            "the checkpoint belongs to another run:"
            + "".join(f"\n  {change} ({REFUSED[_rule(change.key)]})" for change in refused)
            + "\nuse the saved values or another output_dir, or permit the changes with "
            f"'checkpoint.allow_changes=[{','.join(c.key for c in refused)}]'"
        )
    free = [str(c) for c in changes if _is_free(c.key)]
    effective = [str(c) for c in changes if not _is_free(c.key)]
    notes = []
    if free:
        notes.append(f"settings changed, same run up to rounding: {', '.join(free)}")
    if effective:
        notes.append(f"settings changed, effective from this step: {', '.join(effective)}")
    if unknown:
        notes.append(
            f"changes not checked: the checkpoint, of an older version, does not record "
            f"{', '.join(unknown)}"
        )
    return notes


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    old, new = _flat(saved), _flat(current)
    return [
        Change(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if renamed_value(key, old.get(key)) != new.get(key)
        and _rule(key) not in _BY_CONTENT
        and not is_removed_default(key, old.get(key))
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else None
        flat |= {prefix + name: value} if inner is None else inner
    return flat


def _rule(key: str) -> str:
    """Return the setting whose rule a setting follows: itself, or `teacher.KEY` for
    `teachers.NAME.KEY`."""
    return re.sub(r"^teachers\.[^.]+\.", "teacher.", key)


def _is_free(key: str) -> bool:
    return any(_rule(key) == free or _rule(key).startswith(f"{free}.") for free in FREE)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
