"""From a configuration to the parts of a run."""

from datetime import timedelta
from pathlib import Path

from aropd_mcore.config import Config, ConfigError, PrecisionConfig
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.records import DataError
from aropd_mcore.data.tokenizer import eos_token_ids, load_tokenizer
from aropd_mcore.data.views import PromptTooLong, ViewBuilder
from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.mcore.dynamic import check_dynamic
from aropd_mcore.mcore.fp8 import check_fp8
from aropd_mcore.mcore.model import StageModel, build_model
from aropd_mcore.mcore.optim import Optimizer
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.student import Student
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.mcore.weights import load_hf_weights
from aropd_mcore.plan.layout import plan
from aropd_mcore.rollout.model_engine import model_engine
from aropd_mcore.rollout.vllm import VllmEngine
from aropd_mcore.rollout.vllm_process import serving_of
from aropd_mcore.trainer.changes import describe_run
from aropd_mcore.trainer.guards import Guards
from aropd_mcore.trainer.kept_rollouts import KeptRollouts
from aropd_mcore.trainer.step import Run
from aropd_mcore.trainer.stop import Stops

_PROBE_TOKENS = 128


def start_runtime(config: Config) -> Runtime:
    """Join the job's processes in the layout that the config asks for; as `mcore.runtime.start`.

    Raises:
        ConfigError: also for products in fp8, or Megatron's engine, where this machine has none.
    """
    check_fp8(config.precision)
    if config.objective.name == "aropd" and config.rollout.engine == "megatron":
        check_dynamic()
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
    Collectives: those of the model's and the optimizer's construction; every rank must call it.
    """
    plan(config, runtime.world_size)
    stops = stops or Stops()
    tokenizer = load_tokenizer(config.model.path)
    view_builder = ViewBuilder(tokenizer, config.views)
    dataset = usable_rows(
        RowDataset.load(config.data.train, on_bad_row=config.data.on_bad_row), view_builder, config
    )
    num_steps = config.training.num_steps or _steps_of_epochs(config, len(dataset))

    model = load_model(config, runtime, config.precision)
    teacher = engine = None
    if config.objective.name == "aropd":
        own = None
        if config.teacher.kind != "live":
            own = load_model(config, runtime, config.precision.of_teacher)
        teacher = Teacher(config.teacher, runtime, student=model, model=own)
        ends = eos_token_ids(config.model.path, tokenizer)
        if config.rollout.engine == "vllm":
            longest = config.views.max_prompt_tokens + config.rollout.max_response_tokens
            probe = probe_ids(dataset, view_builder, min(longest, _PROBE_TOKENS))
            engine = VllmEngine(
                model,
                runtime,
                serving_of(config),
                eos_token_ids=ends,
                probe_ids=probe,
                should_stop=stops.is_wanted,
            )
        else:
            engine = model_engine(
                config.rollout, model, runtime, eos_token_ids=ends, should_stop=stops.is_wanted
            )
    optimizer = Optimizer(
        model,
        config.optimizer,
        num_steps=num_steps,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    about, kept = describe_run(config, dataset), None
    if engine is not None and config.checkpoint.save_rollouts:
        kept = KeptRollouts(config.output_dir / "rollouts", about["config_hash"], runtime)
    return Run(
        config=config,
        runtime=runtime,
        num_steps=num_steps,
        dataset=dataset,
        view_builder=view_builder,
        student=Student(model, optimizer, config.objective, config.rollout, runtime),
        teacher=teacher,
        engine=engine,
        # Any token serves: padding stands behind everything that could see it.
        pad_token_id=view_builder.end_id,
        guards=Guards(config.guards, max_skipped_steps=config.training.max_skipped_steps),
        stops=stops,
        about=about,
        kept_rollouts=kept,
    )


def load_model(config: Config, runtime: Runtime, precision: PrecisionConfig) -> StageModel:
    """This rank's shard of the model at config.model.path, with its HF weights."""
    model = build_model(
        config.model.path,
        runtime,
        dtype=runtime.dtype(config.model.dtype),
        recompute=config.training.recompute,
        precision=precision,
    )
    load_hf_weights(model, config.model.path, runtime)
    return model


def probe_ids(dataset: RowDataset, view_builder: ViewBuilder, num_tokens: int) -> tuple[int, ...]:
    """A real sequence for the proof that an engine has the trainer's weights: the end of a prompt,
    and its oracle's response; no more than num_tokens."""
    row = dataset[0]
    prompt = view_builder.build(row).student_ids[-(num_tokens // 2) :]
    return (prompt + view_builder.oracle_response_ids(row))[:num_tokens]


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
