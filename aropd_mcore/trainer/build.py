"""From a configuration to the parts of a run."""

from datetime import timedelta
from functools import partial

from aropd_mcore.config import Config, PrecisionConfig
from aropd_mcore.convert.source import HFSource
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.mcore.fp8 import check_fp8
from aropd_mcore.mcore.model import StageModel, build_model
from aropd_mcore.mcore.optim import Optimizer
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.student import Student
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.mcore.weights import load_weights
from aropd_mcore.plan.layout import plan
from aropd_mcore.rollout.engines import PROBE_TOKENS, build_engine
from aropd_mcore.rollout.sources import StepPrompts, build_source
from aropd_mcore.rollout.vllm_process import Serving
from aropd_mcore.trainer.guards import Guards
from aropd_mcore.trainer.hooks import DeviceUse
from aropd_mcore.trainer.preflight import check_packages, open_inputs
from aropd_mcore.trainer.step import Run
from aropd_mcore.trainer.stop import Stops


def start_runtime(config: Config) -> Runtime:
    """Join the job's processes in the layout that the config asks for; as `mcore.runtime.start`.

    Raises:
        ConfigError: also for products in fp8 where this machine has none.
    """
    check_fp8(config.precision)
    parallel = config.parallel
    return mcore_runtime.start(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        sequence_parallel=parallel.sequence,
        token_multiple=config.precision.size_multiple,
        seed=config.training.seed,
        timeout=timedelta(minutes=config.limits.collective_timeout_minutes),
    )


def build_run(config: Config, runtime: Runtime, stops: Stops | None = None) -> Run:
    """Read the data, load the models and join them into a run at its start.

    Args:
        stops: what the run may be stopped by; None: nothing.
    Raises:
        ValueError: as trainer.preflight's functions.
    Collectives: those of the model's and the optimizer's construction; every rank must call it.
    """
    plan(config, runtime.world_size)
    stops = stops or Stops()
    if runtime.rank == 0:  # which logs, and starts servers
        check_packages(config)
    inputs = open_inputs(config)
    dataset, view_builder, ends = inputs.dataset, inputs.view_builder, inputs.eos_token_ids

    model = load_model(config, runtime, config.precision, inputs.source)
    teacher = engine = None
    if config.objective.name == "aropd":
        own = None
        if config.teacher.kind != "live":
            own = load_model(config, runtime, config.precision.of_teacher, inputs.source)
        teacher = Teacher(config.teacher, runtime, student=model, model=own)
        longest = config.views.max_prompt_tokens + config.rollout.max_response_tokens
        engine = build_engine(
            Serving.from_config(config),
            model,
            runtime,
            eos_token_ids=ends,
            probe_ids=probe_ids(dataset, view_builder, min(longest, PROBE_TOKENS)),
            should_stop=stops.is_wanted,
        )
    optimizer = Optimizer(
        model,
        config.optimizer,
        num_steps=inputs.num_steps,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
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
    return Run(
        config=config,
        runtime=runtime,
        num_steps=inputs.num_steps,
        dataset=dataset,
        view_builder=view_builder,
        student=Student.from_config(config, model, optimizer, teacher, runtime),
        teacher=teacher,
        source=source,
        engine=engine,
        # Any token serves: padding stands behind everything that could see it.
        pad_token_id=view_builder.end_id,
        guards=Guards(config.guards, max_skipped_steps=config.training.max_skipped_steps),
        stops=stops,
        about=inputs.about,
        notes=inputs.notes,
        hooks=[DeviceUse(runtime)] if runtime.device.type == "cuda" else [],
    )


def load_model(
    config: Config, runtime: Runtime, precision: PrecisionConfig, source: HFSource
) -> StageModel:
    """Build this rank's shard of the model at config.model.path, and load its weights."""
    model = build_model(
        config.model.path,
        runtime,
        dtype=runtime.dtype(config.model.dtype),
        recompute=config.training.recompute,
        precision=precision,
    )
    load_weights(model, source, runtime)
    return model


def probe_ids(dataset: RowDataset, view_builder: ViewBuilder, num_tokens: int) -> tuple[int, ...]:
    """A real sequence for the proof that an engine has the trainer's weights: the end of a prompt,
    and its oracle's response; no more than num_tokens."""
    row = dataset[0]
    prompt = view_builder.build(row).student_ids[-(num_tokens // 2) :]
    return (prompt + view_builder.oracle_response_ids(row))[:num_tokens]
