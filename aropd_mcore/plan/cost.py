"""Time of a step, from counted operations and the rates of a GPU.

FLOPs are exact for the architecture: matrix products with all weights that a token passes, and
causal attention. Rates are a GPU's peaks times efficiencies from constants.yaml, whose ends give
the shortest and the longest time. None is fitted to a run.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.convert.mapping import ATTENTION_NAME
from aropd_mcore.plan.launches import exchange_seconds, launch_seconds
from aropd_mcore.plan.memory import chunk_tokens, has_average, sharing_ranks
from aropd_mcore.plan.parameters import rank_parameters, trained_parameters, vocabulary_columns
from aropd_mcore.plan.rates import SLOWEST, Rates
from aropd_mcore.plan.setup import Setup


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. Communication is assumed not to overlap with computation."""

    rollout: float
    teacher: float
    student: float
    optimizer: float
    communication: float
    teacher_bubble: float
    """Share of the teacher's time in which a stage waits for another."""
    student_bubble: float
    """Share of the student's time in which a stage waits for another."""
    validation: float = 0.0
    """Seconds of one validation, which are not part of the total."""

    @property
    def total(self) -> float:
        return self.rollout + self.teacher + self.student + self.optimizer + self.communication


def forward_flops(architecture: Architecture, num_tokens: int) -> tuple[int, int]:
    """Count FLOPs of all layers over one sequence: matrix products, and causal attention.

    A product of [T, a] and [a, b] takes 2 T a b. Position i attends to i + 1 keys, with 2 D FLOPs
    for a score and 2 D for its value, in every head with keys and values of dimension D.
    """
    sizes, routing = architecture.sizes, architecture.routing
    hidden = sizes["hidden"]
    layers, num_experts = architecture.num_layers, architecture.num_expert_layers
    weights = layers * sum(
        sizes[rows] * sizes[columns]
        for row in architecture.rows(experts=routing is not None)
        if ATTENTION_NAME in row.name
        for rows, *others in row.hf.values()
        for columns in others
    )
    weights += (layers - num_experts) * 3 * hidden * sizes["ffn"]
    if routing:
        columns = routing.experts_per_token * routing.ffn_hidden_size + sizes["shared_ffn"]
        weights += num_experts * hidden * (routing.num_experts + 3 * columns)
    dims = architecture.head_dim + architecture.value_dim
    attention = architecture.num_heads * dims * num_tokens * (num_tokens + 1)
    return 2 * weights * num_tokens, layers * attention


def layers_flops(
    student: Architecture,
    teacher: Architecture,
    *,
    student_tokens: Iterable[int],
    teacher_tokens: Iterable[int],
    trains_adapter: bool = False,
) -> int:
    """Count the FLOPs of all layers in a step's teacher and student phases, without recomputation.

    Args:
        student, teacher: architectures of the two models.
        student_tokens: number of tokens of each sequence that goes forward and backward.
        teacher_tokens: number of tokens of each sequence that the teacher scores.
        trains_adapter: the weights have no gradient. The adapter's own products are not counted.
    """
    trained = sum(sum(forward_flops(student, tokens)) for tokens in student_tokens)
    scored = sum(sum(forward_flops(teacher, tokens)) for tokens in teacher_tokens)
    return (2 if trains_adapter else 3) * trained + scored


def head_flops(
    student: Architecture,
    teacher: Architecture,
    num_tokens: int,
    *,
    num_views: int,
    trains_adapter: bool = False,
) -> int:
    """Count the FLOPs of the output layers over num_tokens loss tokens.

    These are the logits of the student and of the teacher's views, and the student's two gradients.
    With an adapter, the output layer has no gradient.
    """
    rows = (2 if trains_adapter else 3) * student.hidden_size + num_views * teacher.hidden_size
    return 2 * num_tokens * rows * student.vocab_size


def loss_flops(setup: Setup) -> int:
    """Count FLOPs of a microbatch's loss, over all tensor and context ranks: the mean over the
    teachers."""
    num_tokens = setup.loss_tokens * setup.context
    trains_adapter = setup.adapter is not None
    of_each = [
        head_flops(
            setup.architecture,
            teacher.architecture,
            num_tokens,
            num_views=setup.num_views,
            trains_adapter=trains_adapter,
        )
        for teacher in setup.of_teachers
    ]
    return sum(of_each) // len(of_each)


def loss_bytes(setup: Setup) -> int:
    """Count the bytes that a microbatch's loss moves on one rank outside of its products.

    Passes over the logits read every stream's and write their gradient. Each chunk adds to the
    fp32 gradient of the output layer.
    """
    columns, width = vocabulary_columns(setup), setup.dtype_bytes
    passes = 3 if setup.num_views else 2  # views, target and gradient; cross-entropy has no target
    read = passes * (1 + setup.num_views) * max(width, 4)
    num_chunks = math.ceil(setup.loss_tokens / chunk_tokens(setup))
    accumulated = num_chunks * columns * setup.architecture.hidden_size * 2 * 4
    if setup.adapter:
        accumulated = 0
    return setup.loss_tokens * columns * (read + width) + accumulated


def bubble_fraction(pipeline: int, virtual_pipeline: int, num_microbatches: float) -> float:
    """Return the share of a pipelined pass in which a stage is idle.

    It is (pp - 1) / (vpp m + pp - 1), for m microbatches.
    """
    return (pipeline - 1) / (virtual_pipeline * num_microbatches + pipeline - 1)


def step_time(setup: Setup, rates: Rates = SLOWEST) -> StepTime:
    """Return the seconds of a step at the given rates, by default the longest."""
    num_microbatches = setup.num_microbatches
    student_bubble = bubble_fraction(setup.pipeline, setup.virtual_pipeline, num_microbatches)
    teacher, teacher_bubble = _teacher_seconds(setup, rates)
    forward, attention = _layer_forward(setup, rates, setup.fp8)
    # The gradient of the inputs, and that of the weights, which an adapter does not need.
    backward = forward if setup.adapter else 2 * forward
    if setup.recompute == "full":
        backward += forward
    elif setup.recompute == "selective":
        backward += attention
    # The last stage also computes the loss. All stages wait for the slowest one.
    share = setup.tensor * setup.context
    loss = loss_flops(setup) / share / (rates.bf16_flops * rates.matmul_efficiency)
    loss += loss_bytes(setup) / (rates.memory_bytes * rates.memory_efficiency)
    most, on_last = max(setup.stage_layers), setup.stage_layers[-1]
    stage = max(most * (forward + backward), on_last * (forward + backward) + loss)
    num_sampled = setup.num_responses if setup.samples else 0
    return StepTime(
        rollout=_sampling_seconds(setup, rates, num_sampled, setup.response_tokens),
        teacher=teacher,
        student=num_microbatches * stage / (1 - student_bubble),
        optimizer=_optimizer_seconds(setup, rates),
        communication=_communication_seconds(setup, rates),
        teacher_bubble=teacher_bubble,
        student_bubble=student_bubble,
        validation=_sampling_seconds(
            setup, rates, setup.validation_responses, setup.validation_tokens
        ),
    )


def _teacher_seconds(setup: Setup, rates: Rates) -> tuple[float, float]:
    """Return the seconds of the teachers' passes, one after another, and the share of bubbles."""
    if not setup.num_scored_views:
        return 0.0, 0.0
    busy = total = 0.0
    for teacher in setup.of_teachers:
        num_scored = _num_scored(setup, teacher)
        forward = _layer_forward(teacher, rates, setup.teacher_fp8)[0]
        bubble = bubble_fraction(teacher.pipeline, teacher.virtual_pipeline, num_scored)
        seconds = num_scored * max(teacher.stage_layers) * forward
        busy, total = busy + seconds, total + seconds / (1 - bubble)
    return total, 1 - busy / total


def _num_scored(setup: Setup, teacher: Setup) -> float:
    """Return the number of views that each replica of a teacher scores per step."""
    return setup.num_scored_views * teacher.num_microbatches / len(setup.of_teachers)


def _layer_forward(setup: Setup, rates: Rates, fp8: bool) -> tuple[float, float]:
    """Return the seconds of a microbatch's forward through one layer, and of its attention only."""
    products, attention = forward_flops(setup.architecture, setup.sequence_tokens)
    num_layers = setup.architecture.num_layers
    share = setup.microbatch_sequences / (setup.tensor * setup.context * num_layers)
    flops = rates.fp8_flops if fp8 else rates.bf16_flops
    attention_time = attention * share / (rates.bf16_flops * rates.attention_efficiency)
    return products * share / (flops * rates.matmul_efficiency) + attention_time, attention_time


def _sampling_seconds(
    setup: Setup, rates: Rates, num_responses: int, response_tokens: int
) -> float:
    """Return the seconds in which the native engine samples responses on a data-parallel rank.

    Batches follow one another. A batch's prompts take one forward, and then every row decodes one
    token at a time. Groups of rows take turns on the stages, as many as there are stages: in each
    turn a stage reads its touched weights and the KV cache of one group, or launches its kernels,
    whichever takes longer, and all stages wait for the slowest. Exchanges between ranks add to it.
    """
    if not num_responses:
        return 0.0
    architecture, rows = setup.architecture, setup.rows_of(num_responses, response_tokens)
    batches = -(-num_responses // (setup.context * rows))
    products, attention = forward_flops(architecture, setup.prompt_tokens)
    prompts = rows * (
        products / (rates.bf16_flops * rates.matmul_efficiency)
        + attention / (rates.bf16_flops * rates.attention_efficiency)
    )
    groups = min(setup.pipeline, rows)
    in_group = -(-rows // groups)
    cached = in_group * (setup.prompt_tokens + response_tokens / 2)
    per_token = architecture.sizes["kv"] + architecture.sizes["values"]
    keys_values = cached * per_token / setup.tensor
    read = max(
        _touched_parameters(setup, stage, in_group) + setup.stage_layers[stage] * keys_values
        for stage in setup.distinct_stages
    )
    reading = setup.pipeline * read * setup.dtype_bytes
    reading /= rates.memory_bytes * rates.memory_efficiency
    token_time = max(reading, launch_seconds(setup, rates)) + exchange_seconds(setup, rates)
    return batches * (prompts / setup.tensor + response_tokens * token_time)


def _touched_parameters(setup: Setup, stage: int, rows: int) -> float:
    """Return the number of a rank's parameters that `rows` tokens pass.

    Each token is assumed to choose its experts independently.
    """
    parameters, routing = rank_parameters(setup, stage), setup.architecture.routing
    if routing is None:
        return parameters.total
    share = setup.architecture.num_expert_layers / setup.architecture.num_layers
    per_expert = 3 * share * routing.ffn_hidden_size * setup.architecture.hidden_size
    on_rank = setup.stage_layers[stage] * per_expert * routing.num_experts // setup.expert_ranks
    untouched = (1 - routing.experts_per_token / routing.num_experts) ** rows
    return parameters.total - on_rank * untouched


def _optimizer_seconds(setup: Setup, rates: Rates) -> float:
    """Return the seconds of the update and of the teacher's average, from the bytes they move.

    The update moves gradient, main weight, two moments and weight.
    """
    parameters = max(
        (trained_parameters(setup, stage) for stage in setup.distinct_stages), key=lambda p: p.total
    )
    shared, experts = sharing_ranks(setup)
    on_rank = parameters.shared / shared + parameters.experts / experts
    num_bytes = on_rank * (4 + 8 + 16 + setup.dtype_bytes)
    num_bytes += parameters.total * 4  # computing the norm of the gradients, and zeroing them
    if has_average(setup):
        # Main weight and average, then the weights: rounded, gathered, copied.
        num_bytes += on_rank * (4 + 8) + parameters.total * 3 * setup.dtype_bytes
    elif setup.teacher == "ema":  # of the model, or of the adapter
        num_bytes += parameters.total * 3 * setup.dtype_bytes
    return num_bytes / (rates.memory_bytes * rates.memory_efficiency)


def _ring_seconds(setup: Setup, rates: Rates, num_bytes: float, ranks: int, span: int) -> float:
    """Return the seconds of an all-gather or reduce-scatter over ranks within `span`."""
    return num_bytes * (ranks - 1) / ranks / _bandwidth(setup, span, rates)


def _pass_seconds(setup: Setup, rates: Rates) -> tuple[float, float]:
    """Return the seconds of the collectives of a microbatch's forward, and of its sends between
    stages."""
    tensor, context, expert = setup.tensor, setup.context, setup.expert
    tokens, width = setup.microbatch_tokens, setup.dtype_bytes
    architecture = setup.architecture
    layer_bytes = tokens * architecture.hidden_size * width
    ring = partial(_ring_seconds, setup, rates)
    # Two all-reduces per layer, each a reduce-scatter and an all-gather.
    layer_pass = 4 * ring(layer_bytes, tensor, tensor)
    kv = (architecture.sizes["kv"] + architecture.sizes["values"]) // tensor
    layer_pass += ring(tokens * context * kv * width, context, tensor * context)
    if architecture.routing:
        sent = layer_bytes / setup.sequence_size * architecture.routing.experts_per_token
        layer_pass += 2 * ring(sent, expert, setup.expert_ranks)
        # The tensor ranks of an expert gather their inputs, and reduce-scatter their outputs.
        etp = setup.expert_tensor
        layer_pass += 2 * ring(sent * etp, etp, etp)
    if setup.pipeline == 1:
        return max(setup.stage_layers) * layer_pass, 0.0
    between = _bandwidth(setup, setup.world_size, rates)
    sends = setup.virtual_pipeline * layer_bytes / setup.sequence_size / between
    return max(setup.stage_layers) * layer_pass, sends


def _communication_seconds(setup: Setup, rates: Rates) -> float:
    """Return the seconds of all collectives and transfers of teacher, student and optimizer."""
    width = setup.dtype_bytes
    student_pass, student_sends = _pass_seconds(setup, rates)
    # Forward and backward of the student, a recomputed forward, and the teacher's views.
    seconds = (2 + (setup.recompute == "full")) * student_pass + 2 * student_sends
    seconds *= setup.num_microbatches
    for teacher in setup.of_teachers if setup.num_scored_views else ():
        seconds += _num_scored(setup, teacher) * sum(_pass_seconds(teacher, rates))
        if not teacher.has_head:
            seconds += _exchange_seconds(setup, teacher, rates)
    parameters = max(
        (trained_parameters(setup, stage) for stage in setup.distinct_stages), key=lambda p: p.total
    )
    # Gradients are summed in fp32, and weights gathered in their own dtype, also the teacher's if
    # the average is sharded.
    ranks = setup.data * setup.context
    exchanged = parameters.total * (4 + width * (1 + has_average(setup)))
    seconds += _ring_seconds(setup, rates, exchanged, ranks, setup.tensor * ranks)
    for teacher in setup.of_teachers:
        if not teacher.hosts_weights:
            continue
        # Weights to the device for scoring; the average to the device and back; new weights back.
        on_rank = max(rank_parameters(teacher, s).total for s in teacher.distinct_stages)
        moved = on_rank * width * (2 if setup.teacher == "ema" else 1)
        if has_average(setup):
            moved += parameters.total * 8 / ranks
        elif setup.teacher == "ema":
            moved += parameters.total * width
        seconds += moved / (rates.host_bytes * rates.host_efficiency)
    return seconds


def _exchange_seconds(setup: Setup, teacher: Setup, rates: Rates) -> float:
    """Return the seconds in which hidden states go from a teacher's last stage to the student's.

    A rank of the teacher sends to one rank of the student, or to several. None is assumed to have
    scored its own views.
    """
    views = setup.num_scored_views * setup.num_microbatches / len(setup.of_teachers)
    width = teacher.architecture.hidden_size * setup.dtype_bytes
    readers = setup.tensor * setup.context * setup.data
    sends = max(readers / (teacher.tensor * teacher.data), 1)
    num_bytes = views * setup.loss_tokens * width * sends
    return num_bytes / _bandwidth(setup, setup.world_size, rates)


def _bandwidth(setup: Setup, span: int, rates: Rates) -> float:
    """Return the bytes per second between neighbours among `span` consecutive ranks."""
    if span <= setup.gpus_per_node:
        return rates.nvlink_bytes * rates.nvlink_efficiency
    return rates.network_bytes * rates.network_efficiency
