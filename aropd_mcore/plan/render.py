"""Text and tables of `aropd plan`."""

from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table

from aropd_mcore.config import Config
from aropd_mcore.plan.constants import constants
from aropd_mcore.plan.fit import EVEN, Estimate, PlannedRun, Remedy, remedies, sweep, yaml_value
from aropd_mcore.plan.host_memory import host_memory
from aropd_mcore.plan.layout import describe
from aropd_mcore.plan.parameters import rank_parameters
from aropd_mcore.plan.rates import FASTEST, SLOWEST
from aropd_mcore.plan.saves import save_time
from aropd_mcore.plan.setup import Setup, Sync
from aropd_mcore.plan.sync import sync_cost, sync_seconds

GB = 1e9
SWEEP_ROWS = 20


def render_plan(run: PlannedRun) -> RenderableType:
    """Render parameters, memory, time and bubbles of a job, and changes if it does not fit."""
    estimate = run.estimate()
    parts: list[RenderableType] = [_headline(estimate), _memory_table(estimate)]
    parts += [_verdict(run, estimate), ""]
    if estimate.setup.device == "gpu":
        parts.append(_host_table(estimate.setup))
    parts += [_time_table(estimate), _assumptions(estimate.setup)]
    if estimate.setup.sync is not None:
        parts.append(_sync_text(estimate.setup, estimate.setup.sync))
    if not run.fits(estimate.memory):
        parts += ["", *_fitting_changes(run, remedies(run))]
    return Group(*parts)


def render_sweep(run: PlannedRun) -> RenderableType:
    """Render the layouts that fit, by step time."""
    fitting = sweep(run)
    if not fitting:
        return f"no layout of {run.num_gpus} GPUs fits into {run.memory_bytes / GB:g} GB per GPU"
    table = Table(
        title=f"{len(fitting)} layouts fit; the {SWEEP_ROWS} with the shortest step",
        collapse_padding=True,  # for 80 columns
        pad_edge=False,
    )
    shown = fitting[:SWEEP_ROWS]
    setups = [estimate.setup for estimate in shown]
    columns = {
        "TP": [setup.tensor for setup in setups],
        "PP": [setup.pipeline for setup in setups],
        "VPP": [setup.virtual_pipeline for setup in setups],
        "layers\nfirst\n/last": [_ends(setup) for setup in setups],
        "CP": [setup.context for setup in setups],
        "EP": [setup.expert for setup in setups],
        "DP": [setup.data for setup in setups],
        "SP": ["yes" if setup.sequence else "no" for setup in setups],
        "recompute": [setup.recompute for setup in setups],
        "micro\nbatch": [setup.micro_batch_size for setup in setups],
        "peak\nGB": [f"{estimate.memory.peak / GB:.1f}" for estimate in shown],
        "peak\nphase": [estimate.memory.peak_phase for estimate in shown],
        "step\ns": [f"{e.shortest.total:.1f} – {e.time.total:.1f}" for e in shown],
    }
    for name, usual in (("VPP", 1), ("EP", 1), ("layers\nfirst\n/last", "")):
        if set(columns[name]) == {usual}:
            del columns[name]
    for name in columns:
        table.add_column(name, justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(str, row))
    return Group(table, _assumptions(fitting[0].setup))


def _ends(setup: Setup) -> str:
    """Format the layers of the first and the last stage, such as `11/11`. Even stages: an empty
    text."""
    layers = setup.stage_layers
    return f"{layers[0]}/{layers[-1]}" if len(set(layers)) > 1 else ""


def _split(setup: Setup) -> str:
    """Format the layers of uneven stages, such as `23, 2 x 24, 23`. Even stages: an empty text."""
    layers = setup.stage_layers
    if len(set(layers)) == 1:
        return ""
    runs = [(number, len(list(stages))) for number, stages in groupby(layers)]
    return ", ".join(str(number) if n == 1 else f"{n} x {number}" for number, n in runs)


def _headline(estimate: Estimate) -> str:
    setup, memory = estimate.setup, estimate.memory
    architecture = setup.architecture
    size = str(setup.micro_batch_size)
    if setup.max_tokens_per_microbatch is not None:
        size = f"up to {setup.max_tokens_per_microbatch} tokens per view"
    return (
        f"{setup.world_size} GPUs: {describe(setup, setup.data)}; "
        f"{setup.num_microbatches} microbatches of {size}, recompute {setup.recompute}\n"
        f"{f'layers of the stages: {split}{chr(10)}' if (split := _split(setup)) else ''}"
        f"{architecture.num_parameters:,} parameters, {memory.parameters.total:,} of them on each "
        f"rank of stage {memory.stage}, which has the largest peak"
        f"{''.join(_teacher_lines(setup, memory.stage))}"
    )


def _teacher_lines(setup: Setup, stage: int) -> Iterator[str]:
    """Format the parameters of each teacher that is another model."""
    if not setup.teacher_models:
        return
    for model, teacher in zip(setup.teacher_models, setup.of_teachers, strict=True):
        held = setup.teacher_stages(teacher, stage)
        on_rank = max(rank_parameters(teacher, s).total for s in held)
        layout = f" in {describe(teacher, teacher.data)}" if model.parallel else ""
        split = f", layers of its stages: {text}" if (text := _split(teacher)) else ""
        yield (
            f"\nteacher{f' {model.name}' * bool(model.name)}{layout}: "
            f"{model.architecture.num_parameters:,} parameters, "
            f"{'up to ' * (len(held) > 1)}{on_rank:,} of them on each of these ranks{split}"
        )


def _memory_table(estimate: Estimate) -> Table:
    memory = estimate.memory
    table = Table(title=f"Memory per GPU of stage {memory.stage}, GB")
    table.add_column("phase")
    table.add_column("part")
    table.add_column("GB", justify="right")
    table.add_column("with state", justify="right")
    for part, size in memory.state.items():
        table.add_row("always", part, f"{size / GB:.2f}", "")
    table.add_row("", "state", "", f"{sum(memory.state.values()) / GB:.1f}", end_section=True)
    for phase, parts in memory.phases.items():
        for part, size in parts.items():
            table.add_row(phase, part, f"{size / GB:.2f}", "")
        mark = "  peak" if phase == memory.peak_phase else ""
        table.add_row(phase, "total", "", f"{memory.at(phase) / GB:.1f}{mark}", end_section=True)
    return table


def _host_table(setup: Setup) -> Table:
    ranks = min(setup.gpus_per_node, setup.world_size)
    table = Table(title="Host memory without the processes, GB")
    table.add_column("phase")
    table.add_column("part")
    table.add_column("per rank", justify="right")
    table.add_column(f"per node of {ranks}", justify="right")
    phases, total = host_memory(setup), 0.0
    for phase, parts in phases.items():
        for part, size in parts.items():
            table.add_row(phase, part, f"{size / GB:.1f}", f"{ranks * size / GB:.0f}")
            total += size
    table.add_row("save", "total", f"{total / GB:.1f}", f"{ranks * total / GB:.0f}")
    return table


def _verdict(run: PlannedRun, estimate: Estimate) -> str:
    peak, room = estimate.memory.peak / GB, run.memory_bytes / GB
    verdict = "fits" if run.fits(estimate.memory) else "does not fit"
    return (
        f"{verdict} into {room:g} GB: the peak is {peak:.1f} GB, in phase "
        f"{estimate.memory.peak_phase!r} on stage {estimate.memory.stage}"
    )


def _time_table(estimate: Estimate) -> Table:
    shortest, longest = estimate.shortest, estimate.time
    table = Table(title="Time of a step, seconds")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("bubble", justify="right")
    for name in ("rollout", "teacher", "student", "optimizer", "communication"):
        bubble = getattr(longest, f"{name}_bubble", None)
        shown = "" if bubble is None else f"{bubble:.1%}"
        table.add_row(name, _range(getattr(shortest, name), getattr(longest, name)), shown)
    table.add_row("step", _range(shortest.total, longest.total), "", end_section=True)
    if longest.validation:
        table.add_row("one validation", _range(shortest.validation, longest.validation), "")
    saves = [save_time(estimate.setup, rates) for rates in (FASTEST, SLOWEST)]
    for name, part in (
        ("one save, training waits", "waits"),
        ("one save, written in the background", "writes"),
        ("one resume, reading", "reads"),
    ):
        table.add_row(name, _range(*(getattr(save, part) for save in saves)), "")
    return table


def _range(shortest: float, longest: float) -> str:
    low, high = f"{shortest:.2f}", f"{longest:.2f}"
    return low if low == high else f"{low} – {high}"


def _assumptions(setup: Setup) -> str:
    peaks = SLOWEST
    return (
        f"Upper bound: every prompt has {setup.prompt_tokens} tokens "
        f"(views.max_prompt_tokens) and every response {setup.response_tokens} "
        "(rollout.max_response_tokens). Tokens are spread evenly over experts."
        f"{' Responses are spread evenly over teachers.' if len(setup.teacher_models) > 1 else ''}"
        f"{'' if setup.samples or setup.teacher is None else ' vLLM servers are not included.'}\n"
        "Times are estimates for an H100 SXM, from the shortest to the longest. They divide by its "
        f"peak rates ({peaks.bf16_flops / 1e12:g} TFLOP/s dense bf16, {peaks.fp8_flops / 1e12:g} "
        f"FP8, {peaks.memory_bytes / 1e12:g} TB/s memory, per GPU {peaks.nvlink_bytes / 1e9:g} "
        f"GB/s NVLink, {peaks.network_bytes / 1e9:g} GB/s network, {peaks.host_bytes / 1e9:g} GB/s "
        "to the host) times efficiencies. Communication is assumed not to overlap with "
        "computation.\n"
        "Constants, from aropd_mcore/plan/constants.yaml:\n"
        + "\n".join(f"  {line}" for line in _constant_lines())
    )


def _constant_lines() -> list[str]:
    """Format each constant with its range and where its ends come from."""
    lines = []
    for name, constant in constants().items():
        ends = []
        for value in (constant.low, constant.high):
            number = f"{value.number * 1e3:g} ms" if name.endswith("_seconds") else ""
            if name.endswith("bytes") and value.number > 1e6:
                number = f"{value.number / 1e9:g} GB"
            source = f"measured on {value.machine}" if value.machine else "assumed"
            ends.append((number or f"{value.number:g}", source))
        (low, low_source), (high, high_source) = ends
        sources = low_source if low_source == high_source else f"{low_source}; {high_source}"
        lines.append(f"{name} {low} – {high} ({sources})")
    return lines


def _sync_text(setup: Setup, path: Sync) -> str:
    cost = sync_cost(setup, path)
    low, high = (sync_seconds(setup, cost, rates) for rates in (FASTEST, SLOWEST))
    gathers = f"{cost.gathers + cost.sends} gathers and sends on the busiest rank"
    if path == "disk":
        writers = f"{cost.num_owners} ranks, up to {cost.busiest_bytes / GB:.1f} GB each"
        work = f"written by {writers}, after {gathers}, and read by every server"
    elif path == "nccl":
        work = f"in {cost.broadcasts} broadcasts by {cost.num_owners} ranks, after {gathers}"
    else:
        work = f"received by rank 0 in {cost.sends} sends, written, and read by every server"
    return (
        f"{'Adapter' if path == 'adapter' else 'Weights'} to the servers ({path}), after each step "
        f"and not in its time: {cost.num_bytes / GB:.2f} GB {work}; {low:.1f} – {high:.1f} s."
    )


def _fitting_changes(run: PlannedRun, single_changes: list[Remedy]) -> list[str]:
    if single_changes:
        return ["Each of these changes makes it fit:"] + [
            f"  {remedy.change}  (peak {remedy.peak / GB:.1f} GB)" for remedy in single_changes
        ]
    layouts = sweep(run)
    if not layouts:
        return [f"No single change makes it fit, and no layout of {run.num_gpus} GPUs fits."]
    best = layouts[0]
    return [
        "No single change makes it fit. The fitting layout with the shortest step:",
        f"  {' '.join(_changes(run.config, best.setup))}  (peak {best.memory.peak / GB:.1f} GB)",
    ]


def _changes(config: Config, setup: Setup) -> list[str]:
    """Return the overrides that turn the configuration into this setup."""
    changes = []
    for name, section, keys in (
        (
            "parallel",
            config.parallel,
            ("tensor", "pipeline", "virtual_pipeline", *EVEN, "context", "expert", "sequence"),
        ),
        ("training", config.training, ("recompute", "micro_batch_size")),
    ):
        for key in keys:
            value = getattr(setup, key)
            if value != getattr(section, key):
                changes.append(f"{name}.{key}={yaml_value(value)}")
    return changes
