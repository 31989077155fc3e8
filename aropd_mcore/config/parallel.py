"""Section `parallel`: the layout of the ranks."""

from typing import Self

from pydantic import model_validator

from aropd_mcore.config.section import Positive, Section
from aropd_mcore.stages import Stages


class ModelLayoutConfig(Section):
    """Layout of a model that reads whole sequences."""

    tensor: Positive = 1
    """Tensor-parallel size (TP): number of ranks that each layer's weight matrices are split
    over."""
    pipeline: Positive = 1
    """Pipeline-parallel size (PP): number of stages that the layers are split into."""
    virtual_pipeline: Positive = 1
    """Number of model chunks on each pipeline stage (VPP), interleaved over the layers. More chunks
    give a smaller pipeline bubble and more communication between stages."""
    layers_in_first_stage: Positive | None = None
    """Number of layers on the first pipeline stage, over all its chunks. The other stages share the
    remaining layers evenly. null: as many as on the other stages."""
    layers_in_last_stage: Positive | None = None
    """Number of layers on the last pipeline stage, which also computes the loss. As
    parallel.layers_in_first_stage."""
    pipeline_layout: str | None = None
    """Layers of every pipeline stage, as Megatron's `pipeline_model_parallel_layout`: E is the
    embedding, t a layer, L the loss, and | ends a stage. `x*n` and `(...)*n` repeat. Example for 14
    layers on 4 stages: `Et*3|(t*4|)*2t*3L`. With parallel.virtual_pipeline the parts are chunks:
    chunk 0 of every stage, then chunk 1 of every stage, and so on. null: an even split, or that of
    parallel.layers_in_first_stage and parallel.layers_in_last_stage."""
    expert: Positive = 1
    """Expert-parallel size (EP): number of ranks that the experts of each layer are split over. The
    ranks belong to one pipeline stage: tensor-parallel ranks first, then data-parallel ones."""
    expert_tensor: Positive = 1
    """Expert tensor-parallel size (ETP): number of consecutive ranks that the matrices of each
    expert are split over. Use it for experts that are too large for one rank. Otherwise
    parallel.expert moves less data."""
    sequence: bool = False
    """Sequence parallelism (SP): tensor-parallel ranks split the tokens in the parts of a layer
    whose weights are not split. It saves activation memory. Mixture-of-experts models with
    parallel.tensor > 1 require it."""

    @model_validator(mode="after")
    def _check_split_sizes(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "sequence is true and tensor is 1: expected tensor > 1, since sequence splits "
                "tokens over tensor-parallel ranks; set sequence to false or raise tensor"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline {self.virtual_pipeline} and pipeline 1: expected pipeline > 1, "
                "since virtual_pipeline interleaves over stages; set virtual_pipeline to 1 or "
                "raise pipeline"
            )
        _ = self.stages
        return self

    @property
    def stages(self) -> Stages:
        """The split of layers into stages.

        Raises:
            ValueError: the settings contradict each other.
        """
        return Stages.of(self)


class ParallelConfig(ModelLayoutConfig):
    """Layout of the ranks. The data-parallel size is the number of processes divided by
    tensor x pipeline x context."""

    context: Positive = 1
    """Context-parallel size (CP): number of ranks that the positions of each sequence are split
    over."""
    overlap_grad_reduce: bool = False
    """Overlap of gradient reduction with the backward pass: gradients are summed over data-parallel
    ranks bucket by bucket while the backward pass runs."""
