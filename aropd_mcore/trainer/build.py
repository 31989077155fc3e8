"""Construction of a run's parts from its configuration."""

from dataclasses import asdict
from datetime import timedelta
from functools import partial

from aropd_mcore.config import Config, ParallelConfig, PrecisionConfig, TeacherConfig
from aropd_mcore.convert.source import Source
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.mcore.adapter import attach_adapters
from aropd_mcore.mcore.cached_attention import KVCache
from aropd_mcore.mcore.fp8 import check_fp8
from aropd_mcore.mcore.model import StageModel, build_model
from aropd_mcore.mcore.optim import Optimizer
from aropd_mcore.mcore.runtime import Runtime, add_layout
from aropd_mcore.mcore.student import Student
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.mcore.teachers import Teachers
from aropd_mcore.mcore.weights import load_head, load_weights
from aropd_mcore.plan.layout import plan
from aropd_mcore.rollout.engines import PROBE_TOKENS, build_engine, build_native
from aropd_mcore.rollout.sources import StepPrompts, build_source
from aropd_mcore.rollout.vllm_process import Serving
from aropd_mcore.stages import Stages
from aropd_mcore.trainer.guards import Guards
from aropd_mcore.trainer.hooks import DeviceUse
from aropd_mcore.trainer.preflight import Inputs, check_packages, open_inputs
from aropd_mcore.trainer.row_groups import metric_groups
from aropd_mcore.trainer.step import Run
from aropd_mcore.trainer.stop import Stops
from aropd_mcore.trainer.teacher_model import TeacherModel


def start_runtime(config: Config) -> Runtime:
    """Start the distributed runtime in the layout of the config; see `mcore.runtime.start`.

    Raises:
        ConfigError: the layout does not fit the job, or precision requests FP8 products that this
            machine lacks.
    """
    check_fp8(config.precision)
    parallel = config.parallel
    return mcore_runtime.start(
        tensor=parallel.tensor,
        **asdict(parallel.stages),
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        sequence_parallel=parallel.sequence,
        token_multiple=config.precision.size_multiple,
        seed=config.training.seed,
        timeout=_timeout(config),
    )


def _timeout(config: Config) -> timedelta:
    return timedelta(minutes=config.limits.collective_timeout_minutes)


def build_run(config: Config, runtime: Runtime, stops: Stops | None = None) -> Run:
    """Read the data and load the models of a run, in its state before the first step.

    Args:
        stops: signals and time limit that stop the run. None: no early stop.
    Raises:
        ValueError: an input is invalid; see trainer.preflight.check_packages and open_inputs.
    Collectives: those of open_inputs and of the construction of model and optimizer. Every rank
        must call it.
    """
    plan(config, runtime.world_size)
    stops = stops or Stops()
    if runtime.rank == 0:  # rank 0 logs and starts servers
        check_packages(config)
    inputs = open_inputs(config, runtime)
    dataset, view_builder, ends = inputs.dataset, inputs.view_builder, inputs.eos_token_ids

    model = load_model(config, runtime, config.precision, inputs.source)
    if inputs.adapter is not None:
        attach_adapters(
            model,
            inputs.adapter.spec,
            runtime,
            seed=config.training.seed,
            tensors=inputs.adapter.tensors,
        )
    optimizer = Optimizer(
        model,
        config.optimizer,
        num_steps=inputs.num_steps,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        shares_gpu=config.rollout.is_colocated,
    )
    teachers = engine = None
    cache = KVCache()  # of all native engines, which never sample at the same time
    if config.objective.name == "aropd":
        teachers = build_teachers(config, runtime, inputs, model, optimizer)
        engine = build_engine(
            Serving.from_config(config, runtime.world_size),
            model,
            runtime,
            eos_token_ids=ends,
            probe_ids=probe_ids(dataset, view_builder, min(config.longest_sequence, PROBE_TOKENS)),
            cache=cache,
            should_stop=stops.is_wanted,
        )
    source = build_source(
        config,
        runtime,
        StepPrompts(config, runtime, dataset, view_builder),
        engine,
        num_steps=inputs.num_steps,
        run_hash=inputs.about["config_hash"],
        check_stop=partial(stops.check, runtime),
    )
    native = partial(
        build_native,
        config.rollout,
        runtime=runtime,
        eos_token_ids=ends,
        cache=cache,
        should_stop=stops.is_wanted,
    )
    return Run(
        config=config,
        runtime=runtime,
        num_steps=inputs.num_steps,
        dataset=dataset,
        view_builder=view_builder,
        student=Student.from_config(
            config, model, optimizer, teachers, runtime, metric_groups(config, dataset)
        ),
        teachers=teachers,
        source=source,
        engine=engine,
        # Any token works: attention is causal, and padding comes last.
        pad_token_id=view_builder.end_id,
        guards=Guards(config.guards, max_skipped_steps=config.training.max_skipped_steps),
        stops=stops,
        about=inputs.about,
        notes=inputs.notes,
        problems=inputs.problems,
        validation_engine=engine or native(model=model),
        teacher_engine=native(model=teachers.single.model)
        if teachers and teachers.single and config.validation.teacher_views
        else None,
        hooks=[DeviceUse(runtime)] if runtime.device.type == "cuda" else [],
    )


def build_teachers(
    config: Config, runtime: Runtime, inputs: Inputs, student: StageModel, optimizer: Optimizer
) -> Teachers:
    """Build the teachers with their initial weights. Equal settings give one teacher.

    Collectives: those of load_model, of Teacher, and of add_layout for each further layout.
    """
    precision = config.precision.for_teacher
    runtimes: dict[ParallelConfig, Runtime] = {}
    runtimes[config.parallel] = runtime
    by_settings: dict[TeacherConfig, Teacher] = {}
    for name, settings in config.named_teachers.items():
        if settings in by_settings:
            continue
        if name in inputs.teachers:
            layout = config.layout_of(settings)
            if layout not in runtimes:
                runtimes[layout] = add_teacher_layout(config, settings, runtime)
            by_settings[settings] = _build_teacher_model(
                config, settings, inputs.teachers[name], runtimes[layout], runtime, student
            )
            continue
        model = None
        if settings.kind != "live" and inputs.adapter is None:
            model = load_model(config, runtime, precision, inputs.source)
        by_settings[settings] = Teacher(
            settings, runtime, student=student, model=model, optimizer=optimizer
        )
    return Teachers({name: by_settings[s] for name, s in config.named_teachers.items()})


def add_teacher_layout(config: Config, settings: TeacherConfig, runtime: Runtime) -> Runtime:
    """Add the layout of a teacher to the ranks of the job.

    Collectives: those of add_layout.
    """
    layout = config.layout_of(settings)
    return add_layout(
        runtime,
        layout.stages,
        tensor=layout.tensor,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        sequence_parallel=layout.sequence,
        timeout=_timeout(config),
    )


def _build_teacher_model(
    config: Config,
    settings: TeacherConfig,
    opened: TeacherModel,
    runtime: Runtime,
    student_runtime: Runtime,
    student: StageModel,
) -> Teacher:
    """Build a teacher of kind `model` with its weights.

    Args:
        runtime: the teacher's layout. It may be student_runtime itself.
    """
    source, has_own_layout = opened.source, runtime is not student_runtime
    model = load_model(
        config,
        runtime,
        config.precision.for_teacher,
        source,
        stages=config.stages_of(settings, source.architecture.num_layers),
        has_head=not has_own_layout,
    )
    model.vocab_size = opened.vocab_size
    if not has_own_layout:
        return Teacher(settings, runtime, student=student, model=model)
    return Teacher(
        settings,
        runtime,
        student=student,
        model=model,
        student_runtime=student_runtime,
        head=load_head(source, student_runtime, model.config.params_dtype),
    )


def load_model(
    config: Config,
    runtime: Runtime,
    precision: PrecisionConfig,
    source: Source,
    stages: Stages | None = None,
    *,
    has_head: bool = True,
) -> StageModel:
    """Build this rank's shard of a model, and load its weights.

    Args:
        stages, has_head: see mcore.model.build_model.
    """
    model = build_model(
        source.architecture,
        runtime,
        dtype=runtime.dtype(config.model.dtype),
        recompute=config.training.recompute,
        precision=precision,
        stages=stages,
        has_head=has_head,
    )
    load_weights(model, source, runtime)
    return model


def probe_ids(dataset: RowDataset, view_builder: ViewBuilder, num_tokens: int) -> tuple[int, ...]:
    """Return a real sequence of up to num_tokens ids, which shows whether an engine has the current
    weights: the end of a prompt, then its reference response."""
    row = dataset[0]
    prompt = view_builder.build(row).student_ids[-(num_tokens // 2) :]
    return (prompt + view_builder.oracle_response_ids(row))[:num_tokens]
