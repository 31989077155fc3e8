"""Checkpoints of teachers that are other models (teacher.kind `model`), opened and checked."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aropd_mcore.config import Config, ConfigError, teacher_section
from aropd_mcore.convert.architecture import Architecture, CheckpointError
from aropd_mcore.convert.mapping import FINAL_NORM
from aropd_mcore.convert.source import Source, open_source, with_vocabulary
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.vocabulary import check_same_tokens, check_vocabulary, largest_id
from aropd_mcore.trainer.resume_policy import hash_architecture

if TYPE_CHECKING:
    from aropd_mcore.data.views import ViewBuilder


@dataclass(frozen=True)
class TeacherModel:
    """Headers of the teacher's weights, and its place in the student's vocabulary."""

    source: Source
    """Source whose embedding and head have as many rows as the student's."""
    vocab_size: int
    """Number of ids that the loss compares: those of the tokenizer that both models have. Models
    pad their vocabularies, and the logits of the padding are not compared."""
    fingerprint: str
    """Hash of the architecture and the final norm, by which a resumed run recognizes the
    teacher."""


def open_teacher_models(
    config: Config, student: Architecture, builder: "ViewBuilder"
) -> dict[str, TeacherModel]:
    """Open the checkpoints of the teachers of kind `model` (headers only), by name.

    Args:
        builder: builder of the student's prompts, with its tokenizer.
    Raises:
        ConfigError: a teacher's path is not a checkpoint, its tokenizer differs from the student's,
            or its vocabulary lacks tokens of the tokenizer.
    """
    return {
        name: _open(f"{teacher_section(name)}.path", teacher.path, student, builder)
        for name, teacher in config.teacher_models.items()
    }


def _open(
    setting: str, path: Path | None, student: Architecture, builder: "ViewBuilder"
) -> TeacherModel:
    assert path is not None
    try:
        source = open_source(path)
        tokenizer = load_tokenizer(source.hf_folder)
        fingerprint = _fingerprint(source)
    except (CheckpointError, ValueError) as error:
        raise ConfigError(f"{setting}: {error}") from error
    check_same_tokens(builder.tokenizer, tokenizer, setting)
    own_size = source.architecture.vocab_size
    check_vocabulary(tokenizer, own_size, builder.written_ids())
    return TeacherModel(
        with_vocabulary(source, student.vocab_size),
        min(own_size, student.vocab_size, largest_id(tokenizer) + 1),
        fingerprint,
    )


def _fingerprint(source: Source) -> str:
    digest = hashlib.sha256(hash_architecture(source.architecture).encode())
    norm = next(w for w in source.architecture.weights() if w.name == FINAL_NORM.name)
    for _, tensor in source.parts(norm):
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()[:16]
