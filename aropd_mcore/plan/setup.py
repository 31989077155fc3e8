"""The planner's description of a job, from which memory and time are computed."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from aropd_mcore.config import Config, MemorySpace, Recompute, split_task
from aropd_mcore.convert.adapter import AdapterSpec
from aropd_mcore.convert.architecture import Architecture, read_architecture
from aropd_mcore.data.records import read_records
from aropd_mcore.plan.layout import (
    Layout,
    build_adapter_spec,
    plan,
    read_teacher_architectures,
)
from aropd_mcore.plan.teacher_models import TeacherModelPlan, plan_teacher_models
from aropd_mcore.stages import Stages

Device = Literal["gpu", "cpu"]
"""`gpu`: Transformer Engine's layers, NCCL. `cpu`: Megatron's local layers, gloo."""

Sync = Literal["disk", "nccl", "adapter"]
"""`adapter`: a PEFT folder on the disk, in place of whole weights."""

KEYS_PER_BUCKET = 256
"""While the model decodes, attention reads the keys of a multiple of this number of positions, and
a row of the KV cache has room for such a multiple."""


@dataclass(frozen=True)
class Setup:
    """A model, its layout and its step. Every sequence has full length, for an upper bound."""

    architecture: Architecture
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks on each stage."""
    layers_in_first_stage: int | None = None
    layers_in_last_stage: int | None = None
    pipeline_layout: str | None = None
    """Split of the layers into stages, as in config.ParallelConfig."""
    context: int = 1
    expert: int = 1
    """Ranks of a stage that its experts are split over."""
    expert_tensor: int = 1
    """Ranks of a stage that each expert's matrices are split over."""
    data: int = 1
    sequence: bool = False
    recompute: Recompute = "none"
    micro_batch_size: int = 1
    num_microbatches: int = 1
    """Microbatches per step on each data-parallel rank."""
    teacher: Literal["ema", "frozen", "live", "model"] | None = "ema"
    """Kind of teacher; None for `sft`."""
    teacher_models: tuple[TeacherModelPlan, ...] = ()
    """Teachers of kind `model`."""
    num_views: int = 2
    """Teacher views that the objective reads; 0 for `sft`."""
    views_are_equal: bool = False
    """Whether these views are one prompt, which the teacher scores once (teacher.views `none`)."""
    adapter: AdapterSpec | None = None
    """Adapter that is trained in place of the weights."""
    fp32_master: bool = True
    """Whether the teacher's moving average is kept in fp32."""
    dtype_bytes: int = 2
    fp8: bool = False
    """Whether the student's matrix products run in FP8. Weights stay in bf16."""
    teacher_fp8: bool = False
    size_multiple: int = 1
    """Number that a rank's tokens are padded to a multiple of, for FP8."""
    prompt_tokens: int = 1024
    response_tokens: int = 1024
    prompt_loss: bool = False
    """Whether the loss counts prompt tokens, too."""
    samples: bool = True
    """Whether the model itself samples. False: servers do, which are not planned."""
    sync: Sync | None = None
    """Path of the weights to the servers; None without servers."""
    validation_responses: int = 0
    """Responses per validation on each data-parallel rank, if the model itself samples them."""
    validation_tokens: int = 0
    """Largest number of tokens of each of these responses."""
    rollout_batch_size: int = 32
    kv_cache_tokens: int | None = None
    cuda_graphs: bool = False
    chunk_tokens: int | Literal["auto"] = "auto"
    max_tokens_per_microbatch: int | None = None
    """Tokens of a packed microbatch; None without packing."""
    teacher_hidden_states: MemorySpace = "device"
    teacher_weights: MemorySpace = "device"
    """Location of the weights. `host`: all but the output head are on the device only while the
    teacher scores."""
    overlap_grad_reduce: bool = False
    has_head: bool = True
    """Whether the model has its output layer. A teacher in another layout than the student's has
    none: the student's last stage has the teacher's output layer besides its own."""
    device: Device = field(default="gpu", kw_only=True)
    gpus_per_node: int = field(default=8, kw_only=True)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def hosts_weights(self) -> bool:
        """Whether the teacher's weights are on the host. On a CPU, host and device are the same."""
        return self.teacher_weights == "host" and self.device == "gpu"

    @property
    def expert_ranks(self) -> int:
        """Ranks that the experts of a layer are split over."""
        return self.expert * self.expert_tensor

    @property
    def sequence_size(self) -> int:
        """Ranks that split the tokens between matrix products (sequence parallelism)."""
        return self.tensor if self.sequence else 1

    @property
    def has_teacher_weights(self) -> bool:
        """Whether the teacher has weights of its own. Beside an adapter it is a version of it."""
        is_copy = self.teacher in ("ema", "frozen") and self.adapter is None
        return self.teacher == "model" or is_copy

    @property
    def num_scored_views(self) -> int:
        """Views that the teacher scores."""
        return min(self.num_views, 1) if self.views_are_equal else self.num_views

    @cached_property
    def of_teachers(self) -> tuple["Setup", ...]:
        """The setup with each teacher as its model: this one, unless teachers are other models.

        Responses are assumed to be spread evenly over the teachers.
        """
        if not self.teacher_models:
            return (self,)
        return tuple(self._with_model(teacher) for teacher in self.teacher_models)

    def _with_model(self, teacher: TeacherModelPlan) -> "Setup":
        architecture = replace(teacher.architecture, vocab_size=self.architecture.vocab_size)
        setup = replace(
            self,
            architecture=architecture,
            teacher_models=(),
            adapter=None,
            teacher_weights=teacher.weights,
            teacher_hidden_states=teacher.hidden_states,
        )
        own = teacher.parallel
        if own is None:
            return replace(setup, **asdict(self.stages.fitted(architecture.num_layers)))
        data = self.world_size // (own.tensor * own.pipeline)
        return replace(
            setup,
            **asdict(own.stages),
            tensor=own.tensor,
            context=1,
            expert=own.expert,
            expert_tensor=own.expert_tensor,
            sequence=own.sequence,
            data=data,
            num_microbatches=-(-self.num_microbatches * self.data // data),
            has_head=False,
        )

    def teacher_stages(self, teacher: "Setup", stage: int) -> range:
        """Return the stages of a teacher that the ranks of a stage hold.

        Args:
            teacher: one of of_teachers.
        """
        end = -(-(stage + 1) * teacher.pipeline // self.pipeline)
        return range(stage * teacher.pipeline // self.pipeline, end)

    @cached_property
    def stages(self) -> Stages:
        return Stages.of(self)

    @cached_property
    def stage_layers(self) -> tuple[int, ...]:
        """Number of layers of each stage."""
        return self.stages.stage_layers(self.architecture.num_layers)

    @cached_property
    def distinct_stages(self) -> list[int]:
        """The first stage, the last one, and the earliest of the others with the same chunks, which
        has the most activations in flight."""
        last = self.pipeline - 1

        def chunks_of_all(stage: int) -> tuple[Any, ...]:
            of_teachers = []
            for teacher in self.of_teachers:
                held = self.teacher_stages(teacher, stage)
                is_end = held.start == 0, held.stop == teacher.pipeline
                of_teachers.append((is_end, *(teacher.chunks_of(s) for s in held)))
            return self.chunks_of(stage), *of_teachers

        earliest = {chunks_of_all(stage): stage for stage in reversed(range(1, last))}
        return list(dict.fromkeys([0, last, *earliest.values()]))

    def chunks_of(self, stage: int) -> tuple[int, ...]:
        """Return the number of layers of each chunk of a stage."""
        return self.stages.chunk_layers(self.architecture.num_layers)[stage :: self.pipeline]

    @property
    def sequence_tokens(self) -> int:
        """Tokens of prompt and response, padded for context and tensor ranks and for FP8."""
        rank_multiple = math.lcm(
            self.size_multiple, 2 if self.context > 1 else 1
        )  # data.context_parallel
        multiple = rank_multiple * self.context * self.sequence_size
        return -(-(self.prompt_tokens + self.response_tokens) // multiple) * multiple

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of a microbatch on one context rank."""
        tokens = self.max_tokens_per_microbatch or self.micro_batch_size * self.sequence_tokens
        return tokens // self.context

    @property
    def microbatch_sequences(self) -> float:
        """Number of responses in a microbatch, if all have full length."""
        if self.max_tokens_per_microbatch is None:
            return self.micro_batch_size
        return self.max_tokens_per_microbatch / self.sequence_tokens

    @property
    def loss_tokens(self) -> int:
        """Loss tokens of a microbatch on one context rank, if they are spread evenly."""
        counted = self.response_tokens + (self.prompt_tokens - 1 if self.prompt_loss else 0)
        return round(self.microbatch_sequences * counted) // self.context

    @property
    def num_responses(self) -> int:
        """Responses per step on each data-parallel rank, if all have full length."""
        return self.num_microbatches * max(1, int(self.microbatch_sequences))

    @property
    def decoded_together(self) -> int:
        """Rows of the KV cache that are in use during a step's rollouts."""
        return self.rows_of(self.num_responses, self.response_tokens)

    @property
    def cached_tokens(self) -> int:
        """Tokens that the KV cache of a replica has room for; 0 if the model itself never samples.

        A row's length is rounded up to KEYS_PER_BUCKET.
        """
        tokens = [0]
        batches = [(self.validation_responses, self.validation_tokens)]
        if self.samples:
            batches.append((self.num_responses, self.response_tokens))
        for num_responses, response_tokens in batches:
            length = self.prompt_tokens + response_tokens
            length = -(-length // KEYS_PER_BUCKET) * KEYS_PER_BUCKET
            tokens.append(self.rows_of(num_responses, response_tokens) * length)
        return min(max(tokens), self.kv_cache_tokens or max(tokens))

    @property
    def captures_decoding(self) -> bool:
        """Whether CUDA graphs decode (rollout.graphs.can_capture)."""
        is_alone = self.tensor * self.pipeline == 1
        is_plain = self.architecture.routing is None and not self.fp8
        is_used = self.device == "gpu" and self.samples and self.cuda_graphs
        return is_used and is_alone and is_plain

    def rows_of(self, num_responses: int, response_tokens: int) -> int:
        """Return the rows of the KV cache for responses of a length. Context ranks split them."""
        rows = min(self.rollout_batch_size, -(-num_responses // self.context))
        if self.kv_cache_tokens is not None:
            rows = min(rows, self.kv_cache_tokens // (self.prompt_tokens + response_tokens))
        return rows


def build_setup(
    config: Config,
    world_size: int,
    *,
    gpus_per_node: int = 8,
    device: Device = "gpu",
    architecture: Architecture | None = None,
    teachers: Mapping[str, Architecture] | None = None,
) -> Setup:
    """Derive the planner's description of a run on `world_size` processes.

    Args:
        architecture: the architecture of config.model.path, if it has been read already.
        teachers: those of config.teacher_models, if they have been read already.
    Raises:
        ValueError: as `layout.plan`.
    """
    architecture = architecture or read_architecture(config.model.path)
    teachers = teachers or read_teacher_architectures(config)
    layout = plan(config, world_size, architecture, teachers)
    parallel, training, precision = config.parallel, config.training, config.precision
    dtype = config.model.dtype
    is_fp32 = dtype == "fp32" or (dtype == "auto" and device == "cpu")
    num_views = len(config.objective.views)
    return Setup(
        architecture,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        layers_in_first_stage=parallel.layers_in_first_stage,
        layers_in_last_stage=parallel.layers_in_last_stage,
        pipeline_layout=parallel.pipeline_layout,
        context=layout.context,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        data=layout.data,
        sequence=parallel.sequence,
        recompute=training.recompute,
        micro_batch_size=training.micro_batch_size,
        max_tokens_per_microbatch=config.packed_tokens,
        num_microbatches=layout.microbatches_per_step or _num_packed(config, layout),
        teacher=("model" if config.teachers else config.teacher.kind) if num_views else None,
        teacher_models=plan_teacher_models(config, teachers),
        num_views=num_views,
        views_are_equal=not config.has_privileged_views,
        adapter=build_adapter_spec(config, architecture),
        fp32_master=config.teacher.fp32_master,
        teacher_hidden_states=config.teacher.hidden_states,
        teacher_weights=config.teacher.weights,
        dtype_bytes=4 if is_fp32 else 2,
        fp8=precision.fp8 is not None,
        teacher_fp8=num_views > 0 and precision.for_teacher.fp8 is not None,
        size_multiple=precision.size_multiple,
        prompt_tokens=config.views.max_prompt_tokens,
        response_tokens=config.rollout.max_response_tokens,
        prompt_loss=config.objective.has_prompt_loss,
        samples=num_views > 0 and config.rollout.model_samples,
        sync=_sync(config, device) if num_views else None,
        validation_responses=-(-_count_validation_responses(config) // layout.data),
        validation_tokens=config.validation.max_response_tokens
        or config.rollout.max_response_tokens,
        rollout_batch_size=config.rollout.batch_size,
        kv_cache_tokens=config.rollout.kv_cache_tokens,
        cuda_graphs=config.rollout.cuda_graphs,
        chunk_tokens=config.objective.chunk_tokens,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        device=device,
        gpus_per_node=gpus_per_node,
    )


def _sync(config: Config, device: Device) -> Sync | None:
    if config.rollout.model_samples:
        return None
    if config.adapter is not None:
        return "adapter"
    return config.rollout.vllm.sync_on("cuda" if device == "gpu" else "cpu")


def _count_validation_responses(config: Config) -> int:
    """Count the responses of one validation that the native engine samples.

    Raises:
        DataError: a file cannot be read.
    """
    settings = config.validation
    files = [Path(split_task(text)[2]) for text in settings.tasks]
    in_tasks = sum(_count_records(path, settings.limit) for path in files)
    num_rows = sum(_count_records(path, None) for path in settings.rows)
    num_rows = min(num_rows, settings.limit or num_rows)
    is_native = config.rollout.model_samples or config.objective.name == "sft"
    num_problems = (in_tasks + num_rows) * is_native
    for view in settings.teacher_views:
        num_problems += num_rows + in_tasks * (view == "student")
    return num_problems * settings.samples


def _count_records(path: Path, limit: int | None) -> int:
    return sum(1 for _ in islice(read_records(path), limit))


def _num_packed(config: Config, layout: Layout) -> int:
    """Return the number of packed microbatches per data-parallel rank, at full length."""
    budget, longest = config.packed_tokens, config.longest_sequence
    assert budget is not None and longest <= budget
    responses = config.training.global_batch_size // layout.data
    count = -(-responses // (budget // longest))
    # The interleaved schedule takes groups of as many microbatches as there are stages.
    multiple = layout.pipeline if config.parallel.virtual_pipeline > 1 else 1
    return count + -count % multiple
