"""Memory of one rank, by part and by phase.

State is resident all the time. The phases of a step follow one another, and each needs further
memory. A rank's peak is its state plus its largest phase.

    rollout     forward of the prompts, logits of the sampler
    teacher     forward of a layer, and the hidden states that are kept for the loss
    student     these hidden states, activations in flight, and the larger of the loss's buffers and
                a layer's backward
    optimizer   copies made by the update and the moving average

A save needs no memory of the device: its tensors are copied to the host (host_memory.py).
"""

from dataclasses import dataclass

from aropd_mcore.numerics.chunks import even_chunk, logits_bytes
from aropd_mcore.numerics.passes import BLOCK_ELEMENTS
from aropd_mcore.plan.activations import (
    backward_working_set,
    forward_working_set,
    layer_input,
    saved_by_layer,
    saved_without_recompute,
)
from aropd_mcore.plan.constants import used
from aropd_mcore.plan.parameters import (
    Parameters,
    largest_weight,
    layer_parameters,
    rank_parameters,
    trained_parameters,
    vocabulary_columns,
    vocabulary_parameters,
)
from aropd_mcore.plan.setup import Setup

FP32 = 4

GATHERED_ELEMENTS = 1 << 26
"""Number of the teacher's weights that mcore.average gathers at once."""

GPU_OVERHEAD = used("gpu_overhead_bytes")
"""Bytes outside of the counted tensors: the CUDA context with its kernels, NCCL's buffers of the
job's groups, and workspaces of cuBLAS and Transformer Engine."""


@dataclass(frozen=True)
class Memory:
    """Memory of each rank of one pipeline stage, in bytes."""

    stage: int
    parameters: Parameters
    state: dict[str, float]
    """Resident bytes by part."""
    phases: dict[str, dict[str, float]]
    """Additional bytes by phase and part."""

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> float:
        return self.at(self.peak_phase)

    def at(self, phase: str) -> float:
        return sum(self.state.values()) + sum(self.phases[phase].values())


def worst_stage(setup: Setup) -> Memory:
    """Return the memory of the stage with the largest peak."""
    stages = setup.distinct_stages
    return max((stage_memory(setup, stage) for stage in stages), key=lambda m: m.peak)


def stage_memory(setup: Setup, stage: int) -> Memory:
    parameters, trained = rank_parameters(setup, stage), trained_parameters(setup, stage)
    phases: dict[str, dict[str, float]] = {}
    if setup.samples:
        phases["rollout"] = _rollout(setup, stage)
    if setup.teacher is not None:
        phases["teacher"] = _teacher(setup, stage)
    phases |= {"student": _student(setup, stage), "optimizer": _optimizer(setup, trained, stage)}
    return Memory(stage, parameters, _state(setup, parameters, trained, stage), phases)


def microbatches_in_flight(setup: Setup, stage: int) -> float:
    """Return the number of microbatches whose activations a stage holds at its peak.

    1F1B: pipeline - stage. Interleaved: Megatron's warm-up plus one, counted in model chunks and
    divided by their number (pipeline_parallel/schedules.py, get_pp_rank_microbatches).
    """
    behind, chunks = setup.pipeline - stage - 1, setup.virtual_pipeline
    if chunks == 1:
        return min(behind + 1, setup.num_microbatches)
    warm_up = 2 * behind + (chunks - 1) * setup.pipeline
    return min(warm_up + 1, setup.num_microbatches * chunks) / chunks


def sharing_ranks(setup: Setup) -> tuple[int, int]:
    """Return the numbers of ranks that shard the optimizer state: of all other parameters, and of
    experts."""
    shared = setup.data * setup.context
    return shared, max(shared * setup.tensor // setup.expert_ranks, 1)


def _state(
    setup: Setup, parameters: Parameters, trained: Parameters, stage: int
) -> dict[str, float]:
    width = setup.dtype_bytes
    shared, experts = sharing_ranks(setup)
    on_rank = trained.shared / shared + trained.experts / experts
    layers = _layers_parameters(setup, stage)
    state: dict[str, float] = {
        "weights": parameters.total * width,
        **({"adapter": trained.total * width} if setup.adapter else {}),
        # In an fp32 model the optimizer updates the parameters directly.
        "fp32 main weights": on_rank * FP32 if width < FP32 else 0,
        "gradients": trained.total * FP32,
        "optimizer moments": 2 * on_rank * FP32,
    }
    if setup.adapter and setup.teacher == "ema":
        state["teacher's adapter"] = trained.total * width
        if has_average(setup):
            state["teacher fp32 average"] = on_rank * FP32
    if setup.has_teacher_weights:
        state["teacher weights"] = width * sum(
            max(
                rank_parameters(teacher, s).total - visiting_parameters(teacher, s)
                for s in setup.teacher_stages(teacher, stage)
            )
            for teacher in setup.of_teachers
        )
        others = [teacher for teacher in setup.of_teachers if not teacher.has_head]
        if others and stage == setup.pipeline - 1:
            # In the student's layout, for the loss.
            hidden = sum(teacher.architecture.hidden_size for teacher in others)
            state["teacher output layer"] = vocabulary_columns(setup) * hidden * width
        if has_average(setup) and not setup.hosts_weights:
            state["teacher fp32 average"] = on_rank * FP32
    if setup.fp8:
        # Transformer Engine keeps each weight in FP8 twice, plain and transposed.
        state["weights in fp8"] = 2 * layers
    resident = [teacher for teacher in setup.of_teachers if not teacher.hosts_weights]
    if setup.teacher_fp8 and setup.teacher != "live" and resident:
        state["teacher weights in fp8"] = sum(
            max(_layers_parameters(t, s) for s in setup.teacher_stages(t, stage)) for t in resident
        )
    if setup.device == "cpu":
        # Megatron's local linear layers gather their input into a permanent buffer, one per layout.
        buffers = [
            t.microbatch_tokens * t.architecture.hidden_size
            for t in setup.of_teachers
            if t.sequence and not t.has_head
        ]
        if setup.sequence:
            tokens = max(setup.microbatch_tokens, _prompt_tokens(setup) if setup.samples else 0)
            same = [s for s in (setup, *setup.of_teachers) if s.has_head]
            buffers.append(tokens * max(s.architecture.hidden_size for s in same))
        if buffers:
            state["gather buffer"] = sum(buffers) * width
    sizes = setup.architecture.sizes
    kv = (sizes["kv"] + sizes["values"]) // setup.tensor
    if cached := setup.cached_tokens:
        state["KV cache"] = setup.stage_layers[stage] * cached * kv * width
    if setup.captures_decoding:
        state["CUDA graphs"] = _sampler(setup)  # memory that they use again at every replay
    if setup.device == "gpu":
        state["fixed overhead"] = GPU_OVERHEAD
    return state


def _layers_parameters(setup: Setup, stage: int) -> int:
    return layer_parameters(setup).total * setup.stage_layers[stage]


def _prompt_tokens(setup: Setup) -> int:
    """Return the prompt tokens of a rollout batch, which take one forward."""
    return setup.decoded_together * setup.prompt_tokens


def _rollout(setup: Setup, stage: int) -> dict[str, float]:
    parts = {"prompts' forward": forward_working_set(setup, _prompt_tokens(setup))}
    if stage == setup.pipeline - 1:
        parts["sampler"] = _sampler(setup)
    return parts


def _sampler(setup: Setup) -> float:
    """Return the bytes of logits, shifted logits and their exponentials in fp32, and of running
    sums in fp64."""
    return setup.decoded_together * setup.architecture.vocab_size * (3 * FP32 + 8)


def visiting_parameters(teacher: Setup, stage: int) -> int:
    """Return the number of parameters of a teacher's stage that are on the device only while it
    scores.

    With weights on the host these are all parameters but the output head.

    Args:
        teacher: one of Setup.of_teachers.
    """
    if not teacher.hosts_weights:
        return 0
    has_head = teacher.has_head and stage == teacher.pipeline - 1
    head = vocabulary_parameters(teacher) if has_head else 0
    return rank_parameters(teacher, stage).total - head


def _teacher(setup: Setup, stage: int) -> dict[str, float]:
    """Return the bytes of the phase of the teacher that needs most, with all hidden states."""
    phases = [_scoring(setup, teacher, stage) for teacher in setup.of_teachers]
    return max(phases, key=lambda parts: sum(parts.values())) | _hidden_states(setup, stage)


def _scoring(setup: Setup, teacher: Setup, stage: int) -> dict[str, float]:
    held = setup.teacher_stages(teacher, stage)
    parts = {"forward": forward_working_set(teacher, teacher.microbatch_tokens)}
    if teacher.hosts_weights:
        visiting = max(visiting_parameters(teacher, s) for s in held)
        parts["teacher weights"] = visiting * teacher.dtype_bytes
        if teacher.teacher_fp8:
            layers = max(_layers_parameters(teacher, s) for s in held)
            parts["teacher weights in fp8"] = layers
    if not teacher.has_head:
        parts["exchange of hidden states"] = _exchange(setup, teacher, stage)
    return parts


def _exchange(setup: Setup, teacher: Setup, stage: int) -> float:
    """Return the bytes that mcore.view_exchange needs besides the hidden states of the student's
    microbatches.

    These are the hidden states of the teacher's microbatches on its last stage, as far as they are
    more than those of the student's, and a copy of one view of each student replica that the
    teacher's replica has scored.
    """
    width = teacher.architecture.hidden_size * teacher.dtype_bytes
    size = setup.loss_tokens * width
    received = size if stage == setup.pipeline - 1 else 0
    if teacher.pipeline - 1 not in setup.teacher_stages(teacher, stage):
        return received
    readers = setup.tensor * setup.context * -(-setup.data // teacher.data)
    extra = 0
    if teacher.teacher_hidden_states == "device" or setup.device == "cpu":
        views = setup.num_scored_views
        scored = views * teacher.num_microbatches * teacher.loss_tokens * width
        kept = views * setup.num_microbatches * size if received else 0
        extra = max(scored - kept, 0)
    return extra + received + -(-readers // teacher.tensor) * size


def _hidden_states(setup: Setup, stage: int) -> dict[str, float]:
    """Return the bytes of the views' final hidden states at a step's loss tokens.

    Only the last stage has them. On the host, one microbatch's are on the device at a time. All
    responses of a step may be those of the teacher that needs most.
    """
    if stage < setup.pipeline - 1 or setup.teacher is None:
        return {}
    elements = []
    for teacher in setup.of_teachers:
        on_host = teacher.teacher_hidden_states == "host" and setup.device == "gpu"
        kept = 1 if on_host else setup.num_microbatches
        states = setup.num_scored_views * kept * setup.loss_tokens
        elements.append(states * teacher.architecture.hidden_size)
    return {"teacher hidden states": max(elements) * setup.dtype_bytes}


def _student(setup: Setup, stage: int) -> dict[str, float]:
    in_flight = microbatches_in_flight(setup, stage)
    is_last = stage == setup.pipeline - 1
    # Chunks in flight are counted as if each had as many layers as the largest.
    layers = max(setup.chunks_of(stage)) * setup.virtual_pipeline
    per_microbatch = layers * sum(saved_by_layer(setup).values())
    # A stage keeps the output that it sends. The last stage has the final norm instead.
    per_microbatch += layer_input(setup) * (2 if is_last and setup.device == "cpu" else 1)
    activations = in_flight * per_microbatch
    working = {"a layer's backward": backward_working_set(setup)}
    if setup.recompute == "full":
        working["a layer's activations"] = sum(saved_without_recompute(setup).values())
    choices = [(activations, working)]
    if is_last:
        choices.append((activations, _loss(setup)))
    if stage == 0 and setup.adapter is None:
        # The embedding's gradient is as large as the embedding. It is formed after the first
        # microbatch's activations have been freed.
        gradient = {"embedding's gradient": float(vocabulary_parameters(setup) * setup.dtype_bytes)}
        choices.append((activations - per_microbatch, gradient))
    activations, working = max(choices, key=lambda pair: pair[0] + sum(pair[1].values()))
    return {**_hidden_states(setup, stage), "activations": activations, **working}


def _loss(setup: Setup) -> dict[str, float]:
    """Return the bytes of numerics.chunks: a chunk's logits and their gradient, and those of the
    hidden states."""
    hidden, width, columns = (
        setup.architecture.hidden_size,
        setup.dtype_bytes,
        vocabulary_columns(setup),
    )
    tokens, chunk = setup.loss_tokens, chunk_tokens(setup)
    logits = chunk * logits_bytes(1 + setup.num_views, columns, width)
    of_teacher = max(teacher.architecture.hidden_size for teacher in setup.of_teachers)
    read = hidden + setup.num_views * of_teacher
    if setup.device == "cpu":
        rows = max(min(BLOCK_ELEMENTS["cpu"] // columns, chunk), 1)
        logits += 6 * rows * columns * FP32  # numerics.passes: temporaries
    gathered = setup.microbatch_tokens * hidden * width if setup.sequence else 0
    # The student's hidden states at the loss tokens and their gradient in fp32, for all tokens and
    # for a chunk.
    return {
        "loss chunk": logits,
        "loss hidden states": tokens * hidden * (width + FP32)
        + chunk * (read * width + hidden * FP32)
        + gathered,
    }


def chunk_tokens(setup: Setup) -> int:
    """Return the chunk size of the loss, as numerics.chunks does; at most the loss tokens."""
    chunk = setup.chunk_tokens
    if chunk == "auto":
        columns = vocabulary_columns(setup)
        token_bytes = logits_bytes(1 + setup.num_views, columns, setup.dtype_bytes)
        device = "cuda" if setup.device == "gpu" else "cpu"
        chunk = even_chunk(device, token_bytes, setup.loss_tokens)
    return max(min(chunk, setup.loss_tokens), 1)


def _optimizer(setup: Setup, parameters: Parameters, stage: int) -> dict[str, float]:
    parts: dict[str, float] = {}
    if setup.device == "cpu":
        # mcore.patches.adam computes all denominators at once. Then gloo gathers the weights into a
        # copy.
        shared, experts = sharing_ranks(setup)
        on_rank = parameters.shared / shared + parameters.experts / experts
        gathered = parameters.total * setup.dtype_bytes if shared > 1 else 0
        parts["denominators or gathered weights"] = max(on_rank * FP32, gathered)
    if has_average(setup):
        # mcore.average: a part of the new weights, of all ranks. With the average on the host, a
        # copy of this rank's part of the average, too.
        gathered = min(parameters.total, GATHERED_ELEMENTS)
        parts["teacher's gathered weights"] = gathered * setup.dtype_bytes
        if setup.hosts_weights:
            parts["teacher's fp32 copy"] = gathered / sharing_ranks(setup)[0] * FP32
    elif setup.teacher == "ema" and setup.hosts_weights:
        parts["teacher's copied weight"] = largest_weight(setup, stage) * setup.dtype_bytes
    return parts


def has_average(setup: Setup) -> bool:
    """Return whether the teacher has an fp32 average besides its weights."""
    return setup.teacher == "ema" and setup.fp32_master and setup.dtype_bytes < FP32
