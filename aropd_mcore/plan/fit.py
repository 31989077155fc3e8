"""Estimates of a job, changes that make it fit into its GPUs, and layouts that fit."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, get_args

from aropd_mcore.config import Config, ModelLayoutConfig, Recompute, Section
from aropd_mcore.convert.architecture import Architecture, read_architecture
from aropd_mcore.plan.cost import StepTime, step_time
from aropd_mcore.plan.layout import read_teacher_architectures
from aropd_mcore.plan.memory import Memory, worst_stage
from aropd_mcore.plan.rates import FASTEST
from aropd_mcore.plan.setup import Setup, build_setup
from aropd_mcore.stages import find_splits


@dataclass(frozen=True)
class Estimate:
    """Estimated memory and time of a job."""

    setup: Setup
    memory: Memory
    time: StepTime
    """Longest time."""

    @cached_property
    def shortest(self) -> StepTime:
        """Shortest time."""
        return step_time(self.setup, FASTEST)

    @property
    def mean_total(self) -> float:
        """Middle of the range of a step's seconds, by which layouts are compared."""
        return (self.shortest.total + self.time.total) / 2


@dataclass(frozen=True)
class Remedy:
    """A change that makes a job fit."""

    change: str
    """Argument of `aropd plan` that makes the change."""
    peak: float
    """Peak memory after the change, in bytes."""


@dataclass(frozen=True)
class PlannedRun:
    """A configuration and the machines that it runs on."""

    config: Config
    num_gpus: int
    gpus_per_node: int
    memory_bytes: float
    """Memory of a GPU."""
    architecture: Architecture
    teachers: Mapping[str, Architecture]
    """Architectures of the teachers of kind `model`, by name."""

    def estimate(self, num_gpus: int | None = None, **changes: dict[str, Any]) -> Estimate:
        """Estimate the job after changes to sections of its configuration.

        Raises:
            ValueError: the model or the batch cannot be split over this layout.
        """
        setup = self.setup(num_gpus, **changes)
        return Estimate(setup, worst_stage(setup), step_time(setup))

    def setup(self, num_gpus: int | None = None, **changes: dict[str, Any]) -> Setup:
        """Return the setup that `estimate` is computed from, with the same errors."""
        return build_setup(
            _changed(self.config, changes),
            num_gpus or self.num_gpus,
            gpus_per_node=self.gpus_per_node,
            architecture=self.architecture,
            teachers=self.teachers,
        )

    def fits(self, memory: Memory) -> bool:
        return memory.peak <= self.memory_bytes


def build_planned_run(
    config: Config, num_gpus: int, *, gpus_per_node: int, memory_bytes: float
) -> PlannedRun:
    architecture = read_architecture(config.model.path)
    teachers = read_teacher_architectures(config)
    return PlannedRun(config, num_gpus, gpus_per_node, memory_bytes, architecture, teachers)


def remedies(run: PlannedRun) -> list[Remedy]:
    """Return single changes that suffice, the smallest of each kind, by descending peak memory."""
    sufficient = []
    for kind in _candidates(run):
        for change, num_gpus, changes in kind:
            try:
                estimate = run.estimate(num_gpus, **changes)
            except ValueError:  # the model or the batch does not divide
                continue
            if run.fits(estimate.memory):
                sufficient.append(Remedy(change, estimate.memory.peak))
                break
    return sorted(sufficient, key=lambda remedy: -remedy.peak)


EVEN: dict[str, Any] = {
    "layers_in_first_stage": None,
    "layers_in_last_stage": None,
    "pipeline_layout": None,
}
"""Settings of `parallel` for an even split of the layers."""

Change = tuple[str, int, dict[str, dict[str, Any]]]
"""Argument of `aropd plan`, number of GPUs, values by section."""


def _candidates(run: PlannedRun) -> Iterator[list[Change]]:
    """Yield the changes of each kind, the smallest first."""
    config, gpus = run.config, run.num_gpus

    def changes(section: str, key: str, values: list[Any]) -> list[Change]:
        keys = [f"{section}.{key}={yaml_value(value)}" for value in values]
        sections = [{section: {key: value}} for value in values]
        return [(text, gpus, section) for text, section in zip(keys, sections, strict=True)]

    parallel, training = config.parallel, config.training
    for key in ("tensor", "context"):
        yield changes("parallel", key, _doublings(getattr(parallel, key), run.gpus_per_node))
    yield [(_text(run.config, stages), gpus, {"parallel": stages}) for stages in _deeper(run)]
    more_experts = [n for n in _expert_sizes(run) if n > parallel.expert]
    yield changes("parallel", "expert", more_experts)
    if parallel.tensor > 1 and not parallel.sequence:
        yield changes("parallel", "sequence", [True])
    if training.recompute != "full":
        yield changes("training", "recompute", ["full"])
    has_budget = training.max_tokens_per_microbatch is not None
    size = "max_tokens_per_microbatch" if has_budget else "micro_batch_size"
    yield changes("training", size, _halvings(getattr(training, size)))
    if config.objective.name == "aropd":
        kinds = {"ema": ["frozen", "live"], "frozen": ["live"]} if not config.teachers else {}
        for kind in kinds.get(config.teacher.kind, []):
            yield changes("teacher", "kind", [kind])
        yield changes("rollout", "batch_size", _halvings(config.rollout.batch_size))
        for key in ("weights", "hidden_states"):
            if config.teachers:
                yield [_of_all_teachers(run, key, "host")]
            elif key != "weights" or config.teacher.kind != "live":
                yield changes("teacher", key, ["host"])
        if config.teacher_models and not config.teachers:
            yield list(_wider_teachers(run))
    yield [(f"--gpus {number}", number, {}) for number in _doublings(gpus, 16 * gpus)]


def _of_all_teachers(run: PlannedRun, key: str, value: Any) -> Change:
    """Return the change of a setting of each teacher."""
    teachers = run.config.teachers.items()
    text = " ".join(f"teachers.{name}.{key}={yaml_value(value)}" for name, _ in teachers)
    changed = {name: teacher.model_copy(update={key: value}) for name, teacher in teachers}
    return text, run.num_gpus, {"teachers": changed}


def _wider_teachers(run: PlannedRun) -> Iterator[Change]:
    """Yield layouts of the teacher, a model of its own, with more tensor ranks."""
    layout = run.config.layout_of(run.config.teacher)
    settings = layout.model_dump(include=set(ModelLayoutConfig.model_fields))
    for tensor in _doublings(layout.tensor, run.gpus_per_node):
        own = ModelLayoutConfig.model_validate(settings | {"tensor": tensor})
        changed = own.model_dump(exclude_defaults=True).items()
        text = " ".join(f"teacher.parallel.{key}={yaml_value(value)}" for key, value in changed)
        yield text, run.num_gpus, {"teacher": {"parallel": own}}


def _deeper(run: PlannedRun) -> Iterator[dict[str, Any]]:
    """Yield values of `parallel` with more stages, which split the layers as evenly as possible."""
    parallel, num_layers = run.config.parallel, run.architecture.num_layers
    for pipeline in _doublings(parallel.pipeline, run.num_gpus):
        for split in find_splits(num_layers, pipeline, parallel.virtual_pipeline):
            yield {"pipeline": pipeline, **EVEN, **split}


def _text(config: Config, values: dict[str, Any]) -> str:
    """Return the overrides of `parallel` that set these values."""
    changed = {k: v for k, v in values.items() if v != getattr(config.parallel, k)}
    return " ".join(f"parallel.{key}={yaml_value(value)}" for key, value in changed.items())


def _doublings(number: int, largest: int) -> list[int]:
    return [n for n in (number * 2**k for k in range(1, 11)) if n <= largest]


def _halvings(number: int) -> list[int]:
    return [number // 2**k for k in range(1, number.bit_length())]


def yaml_value(value: Any) -> str:
    """Format a value as in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    # A layout has characters of the shell.
    return shlex.quote(str(value))


def sweep(run: PlannedRun) -> list[Estimate]:
    """Return every layout of the job's GPUs that fits, by step time, then by peak memory."""
    fitting = []
    for layout, recompute, micro_batch_size in product(
        _layouts(run), get_args(Recompute), _micro_batch_sizes(run.config)
    ):
        training = {"recompute": recompute, "micro_batch_size": micro_batch_size}
        try:
            setup = run.setup(parallel=layout, training=training)
        except ValueError:  # heads or batch do not divide; experts on tensor ranks without SP
            continue
        memory = worst_stage(setup)
        if run.fits(memory):
            fitting.append(Estimate(setup, memory, step_time(setup)))
    return sorted(fitting, key=lambda e: (e.mean_total, e.memory.peak))


def _layouts(run: PlannedRun) -> Iterator[dict[str, Any]]:
    """Yield values of section `parallel` that divide GPUs, layers and experts."""
    gpus, num_layers = run.num_gpus, run.architecture.num_layers
    node_sizes = _powers(run.gpus_per_node)
    for pipeline in range(1, min(gpus, num_layers) + 1):
        if gpus % pipeline:
            continue
        for tensor, context, stages, expert in product(
            node_sizes, node_sizes, _splits(num_layers, pipeline), _expert_sizes(run)
        ):
            if gpus % (tensor * pipeline * context) or gpus // pipeline % expert:
                continue
            for sequence in (False, True) if tensor > 1 else (False,):
                yield {
                    "tensor": tensor,
                    "pipeline": pipeline,
                    **stages,
                    "context": context,
                    "expert": expert,
                    "sequence": sequence,
                }


def _splits(num_layers: int, pipeline: int) -> list[dict[str, Any]]:
    """Return values of virtual_pipeline, with uneven splits where the layers do not divide."""
    if pipeline == 1:
        return [EVEN | {"virtual_pipeline": 1}]
    most = num_layers // pipeline
    if num_layers % pipeline == 0:
        return [EVEN | {"virtual_pipeline": chunks} for chunks in _divisors(most)]
    splits = [(chunks, find_splits(num_layers, pipeline, chunks)) for chunks in (1, 2)]
    return [EVEN | {"virtual_pipeline": chunks} | found[-1] for chunks, found in splits if found]


def _expert_sizes(run: PlannedRun) -> list[int]:
    routing = run.architecture.routing
    return _divisors(routing.num_experts if routing else 1)


def _micro_batch_sizes(config: Config) -> list[int]:
    """Return the sizes that the sweep tries; with a budget of tokens, only the configured one."""
    training = config.training
    if training.max_tokens_per_microbatch is not None:
        return [training.micro_batch_size]
    responses = training.global_batch_size
    return [n for n in _powers(min(responses, 32)) if responses % n == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _powers(largest: int) -> list[int]:
    return [2**k for k in range(largest.bit_length())]


def _changed(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    """Apply changes without validation: values are valid, and `build_setup` checks layouts."""
    sections = {
        section: values if section == "teachers" else _section(config, section, values)
        for section, values in changes.items()
    }
    return config.model_copy(update=sections)


def _section(config: Config, name: str, values: dict[str, Any]) -> Section:
    return getattr(config, name).model_copy(update=values)
