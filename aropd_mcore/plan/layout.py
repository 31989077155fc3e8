"""Split of model and batch over a job's processes, without process groups or Megatron."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from aropd_mcore.config import Config, ConfigError, ParallelConfig, teacher_section
from aropd_mcore.convert.adapter import AdapterSpec, adapted_modules, resolve_targets
from aropd_mcore.convert.architecture import Architecture, check_layout, read_architecture
from aropd_mcore.convert.source import find_hf_folder
from aropd_mcore.plan.vllm_adapter import served_adapter
from aropd_mcore.stages import Stages


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from a configuration and a number of processes."""

    world_size: int
    tensor: int
    pipeline: int
    context: int
    data: int
    microbatches_per_step: int | None
    """Number of microbatches per step on each data-parallel rank; None with packing, where it
    varies."""
    num_parameters: int


class ParallelSizes(Protocol):
    """Sizes that config.ParallelConfig and plan.setup.Setup both have."""

    @property
    def tensor(self) -> int: ...
    @property
    def sequence(self) -> bool: ...
    @property
    def pipeline(self) -> int: ...
    @property
    def virtual_pipeline(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def expert(self) -> int: ...
    @property
    def expert_tensor(self) -> int: ...


def replica_size(sizes: ParallelSizes) -> int:
    """Return the number of processes of the smallest job.

    It has one model replica, or several that share its experts.
    """
    stage_size = math.lcm(sizes.tensor * sizes.context, sizes.expert * sizes.expert_tensor)
    return stage_size * sizes.pipeline


def describe(sizes: ParallelSizes, data: int) -> str:
    """Format a layout, such as `TP 4 + SP x PP 2 x VPP 2 x DP 2, EP 8`.

    CP, VPP, EP and ETP of 1 are left out.
    """
    parts = [f"TP {sizes.tensor}{' + SP' if sizes.sequence else ''}", f"PP {sizes.pipeline}"]
    if sizes.virtual_pipeline > 1:
        parts.append(f"VPP {sizes.virtual_pipeline}")
    if sizes.context > 1:
        parts.append(f"CP {sizes.context}")
    parts.append(f"DP {data}")
    experts = [f"EP {sizes.expert}"] if sizes.expert > 1 else []
    if sizes.expert_tensor > 1:
        experts.append(f"ETP {sizes.expert_tensor}")
    return " x ".join(parts) + (f", {' x '.join(experts)}" if experts else "")


def plan(
    config: Config,
    world_size: int,
    architecture: Architecture | None = None,
    teachers: Mapping[str, Architecture] | None = None,
) -> Layout:
    """Check that the model and the batch can be split over `world_size` processes.

    The command line calls this before it starts any process.

    Args:
        architecture: the architecture of config.model.path, if it has been read already.
        teachers: those of config.teacher_models, if they have been read already.
    Raises:
        ValueError: a size does not divide another one, sequences are longer than the model's
            positions, or the model cannot be trained with these settings.
    """
    parallel, training = config.parallel, config.training
    architecture = architecture or read_architecture(config.model.path)
    teachers = teachers or read_teacher_architectures(config)
    # Experts of a teacher in the student's layout need ranks that a dense student leaves unused.
    can_be_dense = any(
        teacher.routing is not None and config.teacher_models[name].parallel is None
        for name, teacher in teachers.items()
    )
    _check_division(config, architecture, parallel.stages, can_be_dense=can_be_dense)
    _check_experts(config, architecture)
    _check_lengths(config, architecture)
    _check_fp8(config, architecture)
    _check_adapter(config, architecture)
    data = _data_size(parallel, world_size)
    for name, teacher in teachers.items():
        _check_teacher(config, name, teacher, world_size)
    num_microbatches = None
    if not training.packing:
        num_microbatches = _num_microbatches(config, data)
    if config.prompts_per_step % data:
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size} / "
            f"rollout.rollouts_per_prompt {config.rollout.rollouts_per_prompt} = "
            f"{config.prompts_per_step} prompts per step: expected a multiple of {data} "
            "data-parallel ranks; change training.global_batch_size or the layout"
        )
    return Layout(
        world_size,
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        data,
        num_microbatches,
        architecture.num_parameters,
    )


def _data_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return the data-parallel size of a layout.

    Raises:
        ConfigError: the layout does not divide the processes.
    """
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    if parallel.context > 1:
        sizes["context"] = parallel.context
    model_size = math.prod(sizes.values())
    if world_size % model_size:
        raise ConfigError(
            f"{world_size} processes: expected a multiple of "
            f"{' x '.join(f'parallel.{name} {size}' for name, size in sizes.items())} "
            f"= {model_size}; change the number of processes or these settings"
        )
    sharing = {"expert": parallel.expert, "expert_tensor": parallel.expert_tensor}
    if world_size // parallel.pipeline % math.prod(sharing.values()):
        named = " x ".join(f"parallel.{n} {size}" for n, size in sharing.items() if size > 1)
        raise ConfigError(
            f"{world_size // parallel.pipeline} processes per pipeline stage: expected a multiple "
            f"of {named}, the ranks that share the experts; change the number of processes or "
            f"{'these settings' if min(sharing.values()) > 1 else 'this setting'}"
        )
    return world_size // model_size


def build_adapter_spec(config: Config, architecture: Architecture) -> AdapterSpec | None:
    """Return the sizes of the run's adapter. None if all weights are trained.

    Raises:
        ConfigError: a target matches no layer, or the model cannot have an adapter.
    """
    adapter = config.adapter
    if adapter is None:
        return None
    try:
        targets = resolve_targets(architecture, adapter.targets)
    except ValueError as error:
        raise ConfigError(f"adapter.targets: {error}") from error
    return AdapterSpec(adapter.rank, adapter.alpha, targets)


def _check_adapter(config: Config, architecture: Architecture) -> None:
    """Check that every rank has a part of the adapter to train, and that vLLM serves it."""
    spec, parallel = build_adapter_spec(config, architecture), config.parallel
    if spec is None:
        return
    if config.rollout.engine == "vllm":
        try:
            served_adapter(spec, architecture)
        except ValueError as error:
            raise ConfigError(f"rollout.engine vllm: {error}") from error
    adapted = [w for w in architecture.weights() if adapted_modules(w, spec.targets)]
    of_experts = [w for w in adapted if w.expert is not None]
    if of_experts and parallel.expert_tensor > 1:
        raise ConfigError(
            f"adapter.targets {', '.join(spec.targets)}: experts' layers with "
            f"parallel.expert_tensor {parallel.expert_tensor}: expected 1, since adapters of "
            "experts are not split; set parallel.expert_tensor to 1 or choose other targets"
        )
    # Experts that are split over ranks have an optimizer of their own. The other one needs tensors.
    layers = {w.layer for w in adapted if w.expert is None or parallel.expert == 1}
    first = 0
    for chunk, size in enumerate(parallel.stages.chunk_layers(architecture.num_layers)):
        if layers.isdisjoint(range(first, first + size)):
            raise ConfigError(
                f"adapter.targets {', '.join(spec.targets)}: the {size} layers of stage "
                f"{chunk % parallel.pipeline} (chunk {chunk // parallel.pipeline}) have no such "
                "layer outside of split experts; expected one in every chunk: add targets of "
                "attention, or change the split of the layers"
            )
        first += size


def read_teacher_architectures(config: Config) -> dict[str, Architecture]:
    """Read the architectures of the teachers of kind `model`, by name.

    Raises:
        ConfigError: there is no checkpoint at a teacher's path, or its config.json cannot be used.
    """
    architectures = {}
    for name, teacher in config.teacher_models.items():
        assert teacher.path is not None
        try:
            architectures[name] = read_architecture(find_hf_folder(teacher.path))
        except ValueError as error:
            raise ConfigError(f"{teacher_section(name)}.path: {error}") from error
    return architectures


def _check_teacher(config: Config, name: str, teacher: Architecture, world_size: int) -> None:
    """Check that a teacher of kind `model` fits into its layout, the student's or its own."""
    settings, section = config.teacher_models[name], teacher_section(name)
    parallel, has_own = config.layout_of(settings), settings.parallel is not None
    layout = f"{section}.parallel" if has_own else "section parallel"
    in_layout = config.model_copy(update={"parallel": parallel})
    try:
        stages = config.stages_of(settings, teacher.num_layers)
        _check_division(in_layout, teacher, stages, can_be_dense=not has_own)
        _check_sequence_parallel(in_layout, teacher)
        _check_positions(in_layout, teacher)
        if config.precision.for_teacher.fp8 is not None:
            _check_fp8(in_layout, teacher)
        _data_size(parallel, world_size)
    except ValueError as error:
        # The checks name settings of section `parallel`.
        problem = re.sub(r"\bparallel\.", f"{section}.parallel.", str(error)) if has_own else error
        raise ConfigError(
            f"{section}.path {settings.path}, in the layout of {layout}: {problem}"
        ) from error


def _check_division(
    config: Config, architecture: Architecture, stages: Stages, *, can_be_dense: bool
) -> None:
    """Check that the layout divides a model; see `check_layout`."""
    parallel = config.parallel
    check_layout(
        architecture,
        tensor=parallel.tensor,
        stages=stages,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        can_be_dense=can_be_dense,
    )


def _num_microbatches(config: Config, data: int) -> int:
    parallel, training = config.parallel, config.training
    num_microbatches, rest = divmod(training.global_batch_size, data * training.micro_batch_size)
    if rest:
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size}: expected a multiple of "
            f"{data} data-parallel ranks x training.micro_batch_size {training.micro_batch_size}; "
            "change one of the two sizes or the layout"
        )
    if parallel.virtual_pipeline > 1 and num_microbatches % parallel.pipeline:
        raise ConfigError(
            f"{num_microbatches} microbatches per step and data-parallel rank: expected a multiple "
            f"of parallel.pipeline {parallel.pipeline}, as parallel.virtual_pipeline "
            f"{parallel.virtual_pipeline} requires; change training.global_batch_size or "
            "training.micro_batch_size"
        )
    return num_microbatches


def _check_experts(config: Config, architecture: Architecture) -> None:
    objective = config.objective
    if objective.has_router_losses and (refusal := _without_router_losses(architecture)):
        kind, reason = refusal
        raise ConfigError(
            f"objective.router_aux_loss_coeff {objective.router_aux_loss_coeff:g} and "
            f"objective.router_z_loss_coeff {objective.router_z_loss_coeff:g}: expected 0 and 0 "
            f"for {kind} ({architecture.family.architecture}){reason}; set both to 0"
        )
    if architecture.elements and config.rollout.engine == "vllm":
        raise ConfigError(
            "rollout.engine vllm: expected native for "
            f"{architecture.family.architecture}, whose HF tensors have all experts of a layer. "
            "The weight updates of vLLM servers do not support such tensors yet; set "
            "rollout.engine to native"
        )
    _check_sequence_parallel(config, architecture)


def _without_router_losses(architecture: Architecture) -> tuple[str, str] | None:
    """Return the kind of a model that has no router losses, and the reason. None if it has them."""
    routing = architecture.routing
    if routing is None:
        return "a model without experts", ""
    if routing.scores == "sigmoid":
        reason = "both losses are defined for the softmax of its logits"
        return "a router with sigmoid scores", f", since {reason}"
    if routing.groups:
        reason = "the losses count choices among all experts"
        return "a router with groups of experts", f", since {reason}"
    return None


def _check_sequence_parallel(config: Config, architecture: Architecture) -> None:
    # On several tensor ranks, Megatron trains experts only with sequence parallelism
    # (transformer/moe/moe_layer.py, MoELayer.forward).
    if architecture.routing and config.parallel.tensor > 1 and not config.parallel.sequence:
        raise ConfigError(
            f"parallel.tensor {config.parallel.tensor} without sequence parallelism: expected "
            "parallel.sequence true for a mixture-of-experts model "
            f"({architecture.family.architecture}); set it to true, or parallel.tensor to 1"
        )


def _check_fp8(config: Config, architecture: Architecture) -> None:
    """Check that a rank's dimensions of all matrix products are multiples of FP8's block size."""
    precision, tensor = config.precision, config.parallel.tensor
    multiple, named = precision.size_multiple, architecture.sizes
    routing = architecture.routing
    sizes = {
        "hidden_size": named["hidden"],
        f"query columns / parallel.tensor {tensor}": named["q"] // tensor,
        f"key columns / parallel.tensor {tensor}": named["kv"] // tensor,
    }
    if architecture.latent:
        sizes |= {
            "q_lora_rank": named["q_latent"],
            "kv_lora_rank": named["kv_latent"],
            "kv_lora_rank + qk_rope_head_dim": named["kv_down"],
            f"value columns / parallel.tensor {tensor}": named["values"] // tensor,
        }
    if routing:
        cut = config.parallel.expert_tensor
        name = f"columns of an expert / parallel.expert_tensor {cut}"
        sizes[name] = routing.ffn_hidden_size // cut
        shared = f"columns of shared experts / parallel.tensor {tensor}"
        sizes[shared] = named["shared_ffn"] // tensor
    if architecture.num_expert_layers < architecture.num_layers:
        sizes[f"intermediate_size / parallel.tensor {tensor}"] = named["ffn"] // tensor
    for name, size in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"{name} = {size}: expected a multiple of {multiple} for products in FP8 "
                f"(precision.fp8_recipe {precision.fp8_recipe}); change the layout, or set "
                "precision.fp8 and precision.teacher_fp8 to null"
            )
    stage_layers = architecture.num_layers // config.parallel.pipeline
    for name in ("bf16_first_layers", "bf16_last_layers"):
        if getattr(precision, name) > stage_layers:
            raise ConfigError(
                f"precision.{name} {getattr(precision, name)}: expected at most {stage_layers}, "
                f"the layers of an average pipeline stage; lower precision.{name}"
            )


def _check_positions(config: Config, architecture: Architecture) -> None:
    """Check that a model can read the longest prompt of any view with a response."""
    prompt, response = config.views.max_prompt_tokens, config.rollout.max_response_tokens
    context = config.parallel.context
    most = architecture.max_tokens(context)
    if prompt + response > most:
        is_window = most < architecture.max_position_embeddings
        raise ConfigError(
            f"views.max_prompt_tokens {prompt} + rollout.max_response_tokens {response} = "
            f"{prompt + response} tokens: expected at most {most}, the model's "
            + (
                f"sliding_window in its config.json, since parallel.context {context} computes "
                "full attention; lower one of the two settings, or set parallel.context to 1"
                if is_window
                else "max_position_embeddings in its config.json; lower one of the two settings"
            )
        )


def _check_lengths(config: Config, architecture: Architecture) -> None:
    """Check the length of the longest sequence: the longest prompt of any view, and a response."""
    _check_positions(config, architecture)
    prompt, response = config.views.max_prompt_tokens, config.rollout.max_response_tokens
    cached = config.rollout.kv_cache_tokens
    if cached is not None and prompt + response > cached:
        raise ConfigError(
            f"rollout.kv_cache_tokens {cached}: expected at least the longest sequence, "
            f"views.max_prompt_tokens {prompt} + rollout.max_response_tokens {response}; raise it "
            "or lower one of the two"
        )
    budget, rounding = config.packed_tokens, config.packed_padding
    if budget is not None and prompt + response + rounding > budget:
        raise ConfigError(
            f"training.max_tokens_per_microbatch {budget}: expected at least the longest sequence, "
            f"views.max_prompt_tokens {prompt} + rollout.max_response_tokens {response}, and "
            f"{rounding} of padding; raise it or lower one of the two"
        )
