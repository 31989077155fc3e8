"""Split of a model's layers into pipeline stages.

A stage holds one chunk of layers, or several with interleaving. Chunks are numbered in the order in
which a token passes them, so chunk c is on stage c % pipeline.
"""

import re
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import groupby

Split = dict[str, int | str]
"""Settings of section `parallel` that split the layers unevenly."""

_GROUP = re.compile(r"\(([^()]+)\)\*(\d+)")
_PIECE = re.compile(r"([EtL|])\*(\d+)")


@dataclass(frozen=True)
class Stages:
    """Numbers of stages and chunks, and how layers are split over them: evenly by default.

    The fields are those of config.ParallelConfig, with the same meaning.
    """

    pipeline: int = 1
    virtual_pipeline: int = 1
    layers_in_first_stage: int | None = None
    layers_in_last_stage: int | None = None
    pipeline_layout: str | None = None

    @classmethod
    def of(cls, settings: object) -> "Stages":
        """Read the fields from an object that has all of them.

        Raises:
            ValueError: see `Stages`.
        """
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        """Check what does not depend on the model.

        Raises:
            ValueError: settings exclude each other, or pipeline_layout is malformed.
        """
        ends = {
            name: getattr(self, name)
            for name in ("layers_in_first_stage", "layers_in_last_stage")
            if getattr(self, name) is not None
        }
        if self.pipeline_layout is not None and ends:
            name, number = next(iter(ends.items()))
            raise ValueError(
                f"pipeline_layout {self.pipeline_layout!r} and {name} {number}: expected only one "
                "of the two, since pipeline_layout states the layers of every stage; set "
                f"{name} to null"
            )
        for name, number in ends.items():
            if self.pipeline == 1:
                raise ValueError(
                    f"{name} {number} and pipeline 1: expected pipeline > 1, since one stage holds "
                    f"all layers; set {name} to null or raise pipeline"
                )
            if number % self.virtual_pipeline:
                raise ValueError(
                    f"{name} {number}: expected a multiple of virtual_pipeline "
                    f"{self.virtual_pipeline}, the chunks of the stage; change {name}, or set "
                    "pipeline_layout instead"
                )
        if self.pipeline_layout is not None:
            self._check_layout(self.pipeline_layout)

    def _check_layout(self, layout: str) -> None:
        parts, num_chunks = _parse_layout(layout), self.pipeline * self.virtual_pipeline
        marked = "".join(parts)
        has_ends = re.fullmatch("Et*L", marked) and parts[0] and parts[-1]
        if len(parts) != num_chunks or not has_ends or not all(parts):
            raise ValueError(
                f"pipeline_layout {layout!r}: found {len(parts)} parts, {'|'.join(parts)[:80]}; "
                f"expected {num_chunks} (pipeline {self.pipeline} x virtual_pipeline "
                f"{self.virtual_pipeline}) separated by |, of one t per layer, with E (embedding) "
                "before the first layer, L (loss) after the last one, and no empty part, such as "
                f"{layout_text((1,) * num_chunks)} for a model of {num_chunks} layers"
            )

    def chunk_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the number of layers of each chunk, in the order in which a token passes them.

        Raises:
            ValueError: the settings do not split this number of layers.
        """
        return _chunk_layers(self, num_layers)

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the number of layers of each stage, over all its chunks."""
        chunks = self.chunk_layers(num_layers)
        return tuple(sum(chunks[stage :: self.pipeline]) for stage in range(self.pipeline))

    def stage_of(self, layer: int, num_layers: int) -> int:
        """Return the stage of a layer. Layers are counted from 0 over the whole model."""
        end = 0
        for chunk, number in enumerate(self.chunk_layers(num_layers)):
            end += number
            if layer < end:
                return chunk % self.pipeline
        raise IndexError(f"layer {layer} of {num_layers}")

    def fitted(self, num_layers: int) -> "Stages":
        """Return stages for a second model with this number of layers.

        The split is this one if it fits the number of layers, otherwise the most even one.

        Raises:
            ValueError: there are fewer layers than chunks.
        """
        try:
            self.chunk_layers(num_layers)
        except ValueError:
            splits = find_splits(num_layers, self.pipeline, self.virtual_pipeline)
            if not splits:
                raise
            even = {f.name: None for f in fields(self) if f.name.endswith(("_stage", "_layout"))}
            return replace(self, **{**even, **splits[0]})
        return self


ONE_STAGE = Stages()


@lru_cache(maxsize=4096)
def _chunk_layers(stages: Stages, num_layers: int) -> tuple[int, ...]:
    pipeline, virtual = stages.pipeline, stages.virtual_pipeline
    if stages.pipeline_layout is not None:
        chunks = tuple(part.count("t") for part in _parse_layout(stages.pipeline_layout))
        if sum(chunks) != num_layers:
            raise ValueError(
                f"parallel.pipeline_layout {stages.pipeline_layout!r}: found {sum(chunks)} layers "
                f"(t), expected the model's {num_layers}; {_working(stages, num_layers)}"
            )
        return chunks
    first, last = stages.layers_in_first_stage, stages.layers_in_last_stage
    middle, odd = pipeline - (first is not None) - (last is not None), (first or 0) + (last or 0)
    each, rest = divmod(num_layers - odd, middle) if middle else (0, num_layers - odd)
    if rest or (middle and (each < 1 or each % virtual)):
        raise ValueError(_describe(stages, num_layers) + _working(stages, num_layers))
    numbers = [each] * pipeline
    if first is not None:
        numbers[0] = first
    if last is not None:
        numbers[-1] = last
    return tuple(number // virtual for number in numbers) * virtual


def _describe(stages: Stages, num_layers: int) -> str:
    chunks = f" x {stages.virtual_pipeline} chunks on each stage"
    pipeline = (
        f"pipeline-parallel size {stages.pipeline}{chunks if stages.virtual_pipeline > 1 else ''}"
    )
    first, last = stages.layers_in_first_stage, stages.layers_in_last_stage
    if first is None and last is None:
        return f"{pipeline} does not divide the model's {num_layers} layers; "
    ends = [f"parallel.layers_in_first_stage {first}"] if first is not None else []
    ends += [f"parallel.layers_in_last_stage {last}"] if last is not None else []
    others = stages.pipeline - len(ends)
    left = num_layers - (first or 0) - (last or 0)
    expected = f"a positive multiple of {others * stages.virtual_pipeline}" if others else "none"
    return (
        f"{pipeline} with {' and '.join(ends)}: found {left} of the model's {num_layers} layers "
        f"left for the other stages ({others}), expected {expected}; "
    )


def _working(stages: Stages, num_layers: int) -> str:
    """Return the advice of an error: even and uneven splits that work."""
    virtual = stages.virtual_pipeline
    products = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
    text = f"{'sizes' if virtual == 1 else 'products'} that divide: {', '.join(map(str, products))}"
    splits = find_splits(num_layers, stages.pipeline, virtual)
    if splits:
        settings = [f"parallel.{name} {value}" for name, value in splits[-1].items()]
        how = " and ".join(settings) if settings else "an even split"
        text += f"; with parallel.pipeline {stages.pipeline}, {how} would work"
    return text


def find_splits(num_layers: int, pipeline: int, virtual_pipeline: int = 1) -> list[Split]:
    """Return splits into these stages whose largest stage is as small as possible.

    `[{}]` if the layers divide evenly. Otherwise one or two uneven splits, in which the last stage
    has fewer layers, since it also computes the loss, and in the second one the first stage, too.
    They need pipeline_layout if neither is possible. `[]` if there are too few layers.
    """
    num_chunks = pipeline * virtual_pipeline
    most = -(-num_layers // num_chunks)
    missing = most * num_chunks - num_layers
    if not missing:
        return [{}]
    splits: list[Split] = []
    units, rest = divmod(missing, virtual_pipeline)
    for in_first in dict.fromkeys((0, units // 2)):
        in_last = units - in_first
        if rest or pipeline == 1 or max(in_first, in_last) >= most:
            continue
        split: Split = {"layers_in_first_stage": (most - in_first) * virtual_pipeline}
        split = split if in_first else {}
        splits.append(split | {"layers_in_last_stage": (most - in_last) * virtual_pipeline})
    if splits or pipeline == 1:
        return splits
    # One layer less in some chunks: the last one, the first one, then the others from the end.
    order = [num_chunks - 1, 0, *range(num_chunks - 2, 0, -1)]
    chunks = [most] * num_chunks
    for chunk in order[:missing]:
        chunks[chunk] -= 1
    return [{"pipeline_layout": layout_text(chunks)}] if all(chunks) else []


def layout_text(chunks: tuple[int, ...] | list[int]) -> str:
    """Format numbers of layers per chunk as pipeline_layout, such as `Et*3|(t*4|)*6t*3L`."""
    parts = [("t" * number if number < 3 else f"t*{number}") + "|" for number in chunks]
    runs = [(part, len(list(equal))) for part, equal in groupby(parts[1:-1])]
    inner = "".join(f"({part})*{n}" if n > 2 else part * n for part, n in runs)
    first, last = ("", parts[0]) if len(parts) == 1 else (parts[0], parts[-1])
    return f"E{first}{inner}{last[:-1]}L"


def _parse_layout(layout: str) -> list[str]:
    """Return the parts of a pipeline_layout, written out.

    `x*n` repeats one character and `(...)*n` a group, in which `x*n` may occur. Commas are ignored.
    """
    for pattern in (_GROUP, _PIECE):
        layout = pattern.sub(lambda found: found[1] * int(found[2]), layout.replace(",", ""))
    return layout.split("|")
