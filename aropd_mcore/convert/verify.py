"""Comparison of two checkpoints by architecture, tensors and, on request, outputs."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from aropd_mcore.convert.folders import companions
from aropd_mcore.convert.global_tensors import stored_weights
from aropd_mcore.convert.import_export import export_hf
from aropd_mcore.convert.progress import progress
from aropd_mcore.convert.source import HFSource, Source

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 2, 32, 16


@dataclass(frozen=True)
class Comparison:
    """Comparison of one tensor in two checkpoints."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    equal: bool
    """Whether dtype and bits are equal."""
    max_abs_error: float | None
    """Largest |a - b|. None if shapes differ, or if one tensor has a NaN or infinity."""
    max_rel_error: float | None
    """Largest |a - b| divided by the largest |a|."""


@dataclass
class Report:
    """Result of `verify`."""

    a: str
    b: str
    facts: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Values in a and b of the facts of config.json that differ, by name."""
    tensors: list[Comparison] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    max_logit_error: float | None = None
    """Largest difference of fp32 logits. None if logits were not compared or are not finite."""
    same_greedy_tokens: bool | None = None
    """Whether greedy tokens are equal. None if they were not compared."""
    notes: list[str] = field(default_factory=list)
    """Differences of other files, which do not affect weights and architecture."""

    @property
    def same(self) -> bool:
        """Whether architecture, the bits of all tensors and compared outputs are equal."""
        computed = (self.max_logit_error, self.same_greedy_tokens)
        return (
            not self.facts
            and not self.only_a
            and not self.only_b
            and all(tensor.equal for tensor in self.tensors)
            and computed in ((None, None), (0.0, True))
        )

    def as_json(self) -> dict[str, Any]:
        return {"same": self.same, **asdict(self)}


def verify(a: Source, b: Source, *, logits: bool = False) -> Report:
    """Compare two checkpoints. One weight of each checkpoint is in memory at a time.

    Args:
        logits: also compare logits and greedy tokens with transformers. This loads each complete
            model, one after the other, and exports Megatron checkpoints to temporary folders.
    """
    report = Report(str(a.path), str(b.path))
    facts = _facts(a), _facts(b)
    report.facts = {
        name: (facts[0].get(name), facts[1].get(name))
        for name in facts[0] | facts[1]
        if facts[0].get(name) != facts[1].get(name)
    }
    report.notes = _notes(a, b)
    names = {"a": set(a.order), "b": set(b.order)}
    report.only_a, report.only_b = sorted(names["a"] - names["b"]), sorted(names["b"] - names["a"])
    total = sum(info.num_bytes for info in (a.tensors | a.untrained).values())
    with progress("verify", total) as advance:
        for name, one, other in _pairs(a, b):
            report.tensors.append(_compare(name, one, other))
            advance(one.nbytes)
    if logits:
        (logits_a, tokens_a), (logits_b, tokens_b) = _run(a), _run(b)
        report.max_logit_error = _largest_difference(logits_a, logits_b)
        report.same_greedy_tokens = torch.equal(tokens_a, tokens_b)
    return report


def _facts(source: Source) -> dict[str, Any]:
    """Return the properties of the model that config.json determines, by name."""
    architecture = source.architecture
    facts = {f.name: getattr(architecture, f.name) for f in fields(architecture)}
    facts["family"] = architecture.family.architecture
    for part in ("rope", "windows", "routing"):
        if values := facts.pop(part):
            facts |= {f"{part}.{name}": value for name, value in asdict(values).items()}
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in source.tensors.values()})
    loaded_in = source.config.dtype or "/".join(dtypes)
    return facts | {"dtype": loaded_in}


def _notes(a: Source, b: Source) -> list[str]:
    """List differences of other files, and of keys of config.json that are not read."""
    notes = []
    unread = a.config.unread, b.config.unread
    keys = sorted(unread[0].keys() | unread[1].keys())
    if other := [key for key in keys if unread[0].get(key) != unread[1].get(key)]:
        notes.append(
            f"config.json differs in keys that are not compared: {', '.join(other)}; --logits "
            "compares what transformers computes"
        )
    names = {name for side in (a, b) for name in companions(side.hf_folder)} - {"config.json"}
    for name in sorted(names):
        files = a.hf_folder / name, b.hf_folder / name
        contents = [file.read_bytes() if file.exists() else None for file in files]
        if contents[0] != contents[1]:
            missing = contents.index(None) if None in contents else None
            notes.append(f"{name} differs" if missing is None else f"{files[missing]} is missing")
    return notes


def _pairs(a: Source, b: Source) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name and both values of every tensor that exists in both checkpoints."""
    in_b = {tuple(weight.hf): weight for weight in stored_weights(b.architecture)}
    for name in a.untrained:
        if name in b.untrained:
            yield name, a.read_untrained(name), b.read_untrained(name)
    for weight in stored_weights(a.architecture):
        if other := in_b.get(tuple(weight.hf)):
            for (name, one), (_, two) in zip(a.parts(weight), b.parts(other), strict=True):
                yield name, one, two


def _compare(name: str, a: Tensor, b: Tensor) -> Comparison:
    dtypes = (str(a.dtype).removeprefix("torch."), str(b.dtype).removeprefix("torch."))
    equal, error, relative = False, None, None
    if a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b)):
        equal, error, relative = True, 0.0, 0.0
    elif a.shape == b.shape:
        error = _largest_difference(a, b)
        relative = error / scale if error and (scale := float(a.abs().max())) else error
    return Comparison(name, tuple(a.shape), dtypes, equal, error, relative)


def _largest_difference(a: Tensor, b: Tensor) -> float | None:
    pieces = zip(a.flatten().split(2**24), b.flatten().split(2**24), strict=True)
    largest = max((float((x.double() - y.double()).abs().max()) for x, y in pieces), default=0.0)
    return largest if math.isfinite(largest) else None


def _bits(tensor: Tensor) -> Tensor:
    """View a tensor as integers, so that NaN equals itself and -0 differs from 0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def _run(source: Source) -> tuple[Tensor, Tensor]:
    """Compute fp32 logits [B, S, V] and greedy tokens [B, N] of a fixed random prompt."""
    if isinstance(source, HFSource):
        return _run_folder(source.path)
    with TemporaryDirectory(prefix="aropd-verify-") as folder:
        export_hf(source, Path(folder) / "model")
        return _run_folder(Path(folder) / "model")


@torch.no_grad()
def _run_folder(folder: Path) -> tuple[Tensor, Tensor]:
    from transformers import AutoModelForCausalLM  # a slow import that is needed only here

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_PROMPTS, PROMPT_TOKENS)
    prompt = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS
    )
    return model(prompt).logits, tokens[:, PROMPT_TOKENS:]
