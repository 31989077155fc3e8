"""How many parameters lie where: on each pipeline stage of each tensor and expert rank."""

from dataclasses import dataclass
from math import prod

from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.convert.mapping import FINAL_NORM, Kind, TableRow
from aropd_mcore.convert.tensors import padded_vocab_size
from aropd_mcore.plan.setup import Setup


@dataclass(frozen=True)
class Parameters:
    """Of one rank, by what its optimizer state is shared with.

    `shared` lies on every one of the ranks that share out experts, `experts` on one of them alone.
    """

    shared: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.shared + self.experts

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.shared + other.shared, self.experts + other.experts)

    def times(self, number: int) -> "Parameters":
        return Parameters(self.shared * number, self.experts * number)


def rank_parameters(setup: Setup, stage: int) -> Parameters:
    """Of each rank of a pipeline stage, embedding and head counted where they lie.

    The vocabulary is padded. A tied embedding lies on the first stage and again on the last.
    """
    architecture, is_last = setup.architecture, stage == setup.pipeline - 1
    found = layer_parameters(setup).times(setup.layers_per_stage)
    vocabulary = Parameters(vocabulary_parameters(setup))
    if stage == 0:
        found += vocabulary
    if is_last:
        found += Parameters(_size(FINAL_NORM, architecture))
        if not (architecture.tied_embeddings and stage == 0):
            found += vocabulary
    return found


def layer_parameters(setup: Setup) -> Parameters:
    """Of one layer, on one rank."""
    found = Parameters(0)
    for row in setup.architecture.family.layer_rows:
        size = _size(row, setup.architecture)
        if "{expert}" in row.name:
            found += Parameters(0, size * setup.architecture.sizes["experts"] // setup.expert_ranks)
        else:
            found += Parameters(size if row.kind is Kind.REPLICATED else size // setup.tensor)
    # On one rank, experts are parameters like any others.
    return found if setup.expert_ranks > 1 else Parameters(found.total)


def vocabulary_parameters(setup: Setup) -> int:
    """Of an embedding or a head, on one rank."""
    return vocabulary_columns(setup) * setup.architecture.hidden_size


def vocabulary_columns(setup: Setup) -> int:
    """Padded columns of one tensor rank's shard of the vocabulary."""
    return padded_vocab_size(setup.architecture.vocab_size, setup.tensor) // setup.tensor


def largest_weight(setup: Setup, stage: int) -> int:
    """Parameters of the largest single tensor of a rank."""
    rows = []
    for row in setup.architecture.family.layer_rows:
        ranks = setup.expert_tensor if "{expert}" in row.name else setup.tensor
        cut = 1 if row.kind is Kind.REPLICATED else ranks
        rows.append(_size(row, setup.architecture) // cut)
    has_vocabulary = stage in (0, setup.pipeline - 1)
    return max(*rows, vocabulary_parameters(setup) if has_vocabulary else 0)


def _size(row: TableRow, architecture: Architecture) -> int:
    return sum(prod(architecture.sizes[name] for name in shape) for shape in row.hf.values())
