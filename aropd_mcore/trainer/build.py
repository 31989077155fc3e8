"""From a configuration to the parts of a run."""

from dataclasses import dataclass
from pathlib import Path

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.convert.architecture import check_layout, read_architecture
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.records import DataError
from aropd_mcore.data.tokenizer import eos_token_ids, load_tokenizer
from aropd_mcore.data.views import PromptTooLong, ViewBuilder
from aropd_mcore.mcore.model import HiddenStateGPT, build_model
from aropd_mcore.mcore.optim import Optimizer
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.student import Student
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.mcore.weights import load_hf_weights
from aropd_mcore.rollout.native import NativeEngine
from aropd_mcore.trainer.step import Run


@dataclass(frozen=True)
class Layout:
    """How a job's processes share the model and the batch."""

    world_size: int
    tensor: int
    pipeline: int
    data: int
    microbatches_per_step: int
    """On each data-parallel rank."""
    num_parameters: int


def plan(config: Config, world_size: int) -> Layout:
    """Check that the model and the batch can be shared by `world_size` processes.

    Needs no process group: `aropd train --dry-run` calls it as it is.

    Raises:
        ValueError: what does not divide, and what would.
    """
    parallel, training = config.parallel, config.training
    architecture = read_architecture(config.model.path)
    check_layout(architecture, tensor=parallel.tensor, pipeline=parallel.pipeline)
    model_size = parallel.tensor * parallel.pipeline
    if world_size % model_size:
        raise ConfigError(
            f"{world_size} processes are not a multiple of parallel.tensor {parallel.tensor} x "
            f"parallel.pipeline {parallel.pipeline} = {model_size}"
        )
    data = world_size // model_size
    num_microbatches, rest = divmod(training.global_batch_size, data * training.micro_batch_size)
    if rest:
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of "
            f"{data} data-parallel ranks x training.micro_batch_size {training.micro_batch_size}"
        )
    if config.prompts_per_step % data:
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size} / "
            f"rollout.rollouts_per_prompt {config.rollout.rollouts_per_prompt} = "
            f"{config.prompts_per_step} prompts a step are not a multiple of {data} data-parallel "
            "ranks"
        )
    return Layout(
        world_size,
        parallel.tensor,
        parallel.pipeline,
        data,
        num_microbatches,
        architecture.num_parameters,
    )


def build_run(config: Config, runtime: Runtime) -> Run:
    """Read the data, load the models and join them into a run at its start.

    Collectives: those of the model's and the optimizer's construction; every rank must call it.
    """
    plan(config, runtime.world_size)
    tokenizer = load_tokenizer(config.model.path)
    view_builder = ViewBuilder(tokenizer, config.views)
    dataset = usable_rows(
        RowDataset.load(config.data.train, on_bad_row=config.data.on_bad_row), view_builder, config
    )
    num_steps = config.training.num_steps or _steps_of_epochs(config, len(dataset))

    model = load_model(config, runtime)
    distills = config.objective.name == "aropd"
    teacher = None
    if distills:
        own = None if config.teacher.kind == "live" else load_model(config, runtime)
        teacher = Teacher(config.teacher, student=model, model=own)
    optimizer = Optimizer(model, config.optimizer, num_steps=num_steps)
    engine = None
    if distills:
        engine = NativeEngine(
            model,
            runtime,
            eos_token_ids=eos_token_ids(config.model.path, tokenizer),
            batch_size=config.rollout.batch_size,
        )
    return Run(
        config=config,
        runtime=runtime,
        num_steps=num_steps,
        dataset=dataset,
        view_builder=view_builder,
        student=Student(model, optimizer, config.objective, runtime),
        teacher=teacher,
        engine=engine,
        # Any token serves: padding stands behind everything that could see it.
        pad_token_id=view_builder.end_id,
    )


def load_model(config: Config, runtime: Runtime) -> HiddenStateGPT:
    """This rank's shard of the model at config.model.path, with its HF weights."""
    model = build_model(config.model.path, runtime, dtype=runtime.dtype(config.model.dtype))
    load_hf_weights(model, config.model.path, runtime)
    return model


def usable_rows(dataset: RowDataset, view_builder: ViewBuilder, config: Config) -> RowDataset:
    """The rows whose prompts fit, so that no row can stop the run later on.

    A row that does not fit is left out, and is among the result's bad_rows, with
    views.on_long_prompt "drop" or data.on_bad_row "skip".

    Raises:
        DataError: a row does not fit and neither setting lets it go.
    """
    rows, bad_rows = [], list(dataset.bad_rows)
    lenient = config.views.on_long_prompt == "drop" or config.data.on_bad_row == "skip"
    for row in dataset:
        try:
            view_builder.build(row)
            rows.append(row)
        except PromptTooLong as error:
            if not lenient:
                raise
            bad_rows.append(error)
    if not rows:
        raise DataError(str(Path(config.data.train[0])), "no row's prompts fit", str(bad_rows[0]))
    return RowDataset(rows, bad_rows)


def _steps_of_epochs(config: Config, num_rows: int) -> int:
    assert config.training.num_epochs is not None
    num_steps = config.training.num_epochs * num_rows // config.prompts_per_step
    if num_steps == 0:
        raise ConfigError(
            f"{config.training.num_epochs} epochs of {num_rows} rows are less than one step of "
            f"{config.prompts_per_step} prompts; lower training.global_batch_size"
        )
    return num_steps
