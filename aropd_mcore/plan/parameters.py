"""Numbers of parameters on each pipeline stage of a tensor and expert rank."""

from collections.abc import Iterator
from dataclasses import dataclass

from aropd_mcore.convert.adapter import ADAPTED_KINDS
from aropd_mcore.convert.mapping import FINAL_NORM, Kind, TableRow
from aropd_mcore.convert.tensors import padded_vocab_size
from aropd_mcore.plan.setup import Setup


@dataclass(frozen=True)
class Parameters:
    """Number of parameters of one rank, split by the ranks that shard their optimizer state."""

    shared: int
    """Parameters that all ranks of an expert-parallel group hold."""
    experts: int = 0
    """Parameters of experts, which only one rank of an expert-parallel group holds."""

    @property
    def total(self) -> int:
        return self.shared + self.experts

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.shared + other.shared, self.experts + other.experts)

    def times(self, number: int) -> "Parameters":
        return Parameters(self.shared * number, self.experts * number)


def rank_parameters(setup: Setup, stage: int) -> Parameters:
    """Count the parameters of each rank of a pipeline stage.

    The vocabulary is padded. A tied embedding is on the first stage and again on the last.
    """
    architecture, is_last = setup.architecture, stage == setup.pipeline - 1
    num_dense = _num_dense_layers(setup, stage)
    parameters = layer_parameters(setup).times(setup.stage_layers[stage] - num_dense)
    parameters += layer_parameters(setup, experts=False).times(num_dense)
    vocabulary = Parameters(vocabulary_parameters(setup))
    if stage == 0:
        parameters += vocabulary
    if is_last:
        parameters += Parameters(architecture.row_elements(FINAL_NORM))
        if setup.has_head and not (architecture.tied_embeddings and stage == 0):
            parameters += vocabulary
    return parameters


def trained_parameters(setup: Setup, stage: int) -> Parameters:
    """Count the parameters of each rank of a stage that the optimizer updates: the adapter's, or
    all."""
    if setup.adapter is None:
        return rank_parameters(setup, stage)
    num_dense = _num_dense_layers(setup, stage)
    has_experts = setup.architecture.routing is not None
    parameters = _adapter_parameters(setup, experts=has_experts).times(
        setup.stage_layers[stage] - num_dense
    )
    return parameters + _adapter_parameters(setup, experts=False).times(num_dense)


def adapted_sizes(setup: Setup, *, experts: bool) -> Iterator[tuple[TableRow, int, int]]:
    """Yield the adapted linear layers of one transformer layer: table row, outputs and inputs."""
    assert setup.adapter is not None
    sizes = setup.architecture.sizes
    for row in setup.architecture.rows(experts=experts):
        for name, shape in row.hf.items():
            is_linear = row.kind in ADAPTED_KINDS and len(shape) == 2
            if is_linear and name.split(".")[-2] in setup.adapter.targets:
                yield row, sizes[shape[0]], sizes[shape[1]]


def _adapter_parameters(setup: Setup, *, experts: bool) -> Parameters:
    assert setup.adapter is not None
    rank, num_experts = setup.adapter.rank, setup.architecture.sizes["experts"]
    parameters = Parameters(0)
    for row, outputs, inputs in adapted_sizes(setup, experts=experts):
        if "{expert}" in row.name:
            of_all = rank * (outputs + inputs) * num_experts
            parameters += Parameters(0, of_all // setup.expert_ranks)
        elif row.kind is Kind.ROW:
            parameters += Parameters(rank * (outputs + inputs // setup.tensor))
        else:
            parameters += Parameters(rank * (outputs // setup.tensor + inputs))
    return parameters if setup.expert_ranks > 1 else Parameters(parameters.total)


def _num_dense_layers(setup: Setup, stage: int) -> int:
    """Count the layers of a stage that have a dense MLP, in a model with experts."""
    routing, num_layers = setup.architecture.routing, setup.architecture.num_layers
    dense = routing.dense_layers if routing else ()
    return sum(setup.stages.stage_of(layer, num_layers) == stage for layer in dense)


def layer_parameters(setup: Setup, *, experts: bool | None = None) -> Parameters:
    """Count the parameters of one layer on one rank.

    Args:
        experts: whether it is a layer with experts. None: it is, if the model has experts.
    """
    architecture = setup.architecture
    has_experts = architecture.routing is not None if experts is None else experts
    elements = architecture.layer_elements[has_experts]
    shared = elements.whole + elements.split // setup.tensor
    parameters = Parameters(shared, elements.experts // setup.expert_ranks)
    # Without expert parallelism, experts are sharded like all other parameters.
    return parameters if setup.expert_ranks > 1 else Parameters(parameters.total)


def vocabulary_parameters(setup: Setup) -> int:
    """Count the parameters of an embedding or a head on one rank."""
    return vocabulary_columns(setup) * setup.architecture.hidden_size


def vocabulary_columns(setup: Setup) -> int:
    """Return the padded columns of one tensor rank's shard of the vocabulary."""
    return padded_vocab_size(setup.architecture.vocab_size, setup.tensor) // setup.tensor


def largest_weight(setup: Setup, stage: int) -> int:
    """Count the parameters of the largest tensor of a rank."""
    rows = []
    architecture = setup.architecture
    kinds = {architecture.has_experts(layer) for layer in range(architecture.num_layers)}
    for row in (row for experts in kinds for row in architecture.rows(experts=experts)):
        ranks = setup.expert_tensor if "{expert}" in row.name else setup.tensor
        cut = 1 if row.kind is Kind.REPLICATED else ranks
        rows.append(architecture.row_elements(row) // cut)
    has_vocabulary = stage in (0, setup.pipeline - 1)
    return max(*rows, vocabulary_parameters(setup) if has_vocabulary else 0)
