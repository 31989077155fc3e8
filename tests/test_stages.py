"""Splits of layers into pipeline stages: numbers, errors, and agreement with Megatron's parser."""

import pytest

from aropd_mcore.config import ConfigError, ParallelConfig
from aropd_mcore.config_file import validated
from aropd_mcore.stages import Stages, find_splits, layout_text


@pytest.mark.parametrize(
    "stages, num_layers, chunks",
    [
        (Stages(), 5, (5,)),
        (Stages(2, 2), 8, (2, 2, 2, 2)),
        (Stages(4, layers_in_first_stage=3, layers_in_last_stage=1), 14, (3, 5, 5, 1)),
        (Stages(2, 2, layers_in_last_stage=2), 8, (3, 1, 3, 1)),
        (Stages(4, pipeline_layout="E,t*3|(t*4|)*2t*3L"), 14, (3, 4, 4, 3)),
        (Stages(2, 2, pipeline_layout="E|tt|t|L"), 3, (0, 2, 1, 0)),
    ],
)
def test_layers_are_split_over_chunks(stages: Stages, num_layers: int, chunks: tuple):
    assert stages.chunk_layers(num_layers) == chunks
    per_stage = [sum(chunks[stage :: stages.pipeline]) for stage in range(stages.pipeline)]
    assert stages.stage_layers(num_layers) == tuple(per_stage)
    expected = [c % stages.pipeline for c, number in enumerate(chunks) for _ in range(number)]
    assert [stages.stage_of(layer, num_layers) for layer in range(num_layers)] == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"pipeline": 2, "layers_in_first_stage": 1, "pipeline_layout": "Et|tL"},
            "pipeline_layout 'Et|tL' and layers_in_first_stage 1: expected only one of the two",
        ),
        (
            {"layers_in_last_stage": 1},
            "layers_in_last_stage 1 and pipeline 1: expected pipeline > 1",
        ),
        (
            {"pipeline": 2, "virtual_pipeline": 2, "layers_in_first_stage": 3},
            "layers_in_first_stage 3: expected a multiple of virtual_pipeline 2",
        ),
        (
            {"pipeline": 4, "pipeline_layout": "Et|tL"},
            "'Et|tL': found 2 parts, Et|tL; expected 4 (pipeline 4 x virtual_pipeline 1)",
        ),
        ({"pipeline": 2, "pipeline_layout": "t|tL"}, "such as Et|tL for a model of 2 layers"),
        ({"pipeline": 3, "pipeline_layout": "Et||tL"}, "and no empty part"),
        ({"pipeline": 2, "pipeline_layout": "Et|mL"}, "found 2 parts, Et|mL; expected 2"),
    ],
)
def test_config_refuses_splits_that_contradict_each_other(settings: dict, message: str):
    with pytest.raises(ConfigError) as raised:
        validated(ParallelConfig, settings, "run.yaml")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "stages, message",
    [
        (
            Stages(4),
            "size 4 does not divide the model's 94 layers; sizes that divide: 1, 2, 47, 94; with "
            "parallel.pipeline 4, parallel.layers_in_first_stage 23 and "
            "parallel.layers_in_last_stage 23 would work",
        ),
        (
            Stages(4, layers_in_last_stage=20),
            "with parallel.layers_in_last_stage 20: found 74 of the model's 94 layers left for the "
            "other stages (3), expected a positive multiple of 3",
        ),
        (
            Stages(2, layers_in_first_stage=40, layers_in_last_stage=40),
            "found 14 of the model's 94 layers left for the other stages (0), expected none",
        ),
        (
            Stages(2, pipeline_layout="Et*3|t*4L"),
            "parallel.pipeline_layout 'Et*3|t*4L': found 7 layers (t), expected the model's 94",
        ),
    ],
)
def test_model_refuses_splits_of_another_number_of_layers(stages: Stages, message: str):
    with pytest.raises(ValueError) as raised:
        stages.chunk_layers(94)
    assert message in str(raised.value)


@pytest.mark.parametrize("num_layers", [5, 28, 61, 94])
def test_found_splits_are_valid_and_have_the_smallest_largest_stage(num_layers: int):
    for pipeline in range(1, num_layers + 1):
        for virtual in (1, 2, 3) if pipeline > 1 else (1,):
            splits = find_splits(num_layers, pipeline, virtual)
            most = -(-num_layers // (pipeline * virtual))
            assert splits or most == 1
            for split in splits:
                stages = Stages(pipeline, virtual, **split)  # pyright: ignore[reportArgumentType]
                chunks = stages.chunk_layers(num_layers)
                assert sum(chunks) == num_layers and min(chunks) > 0
                assert max(chunks) == most
                assert (not split) == (num_layers % (pipeline * virtual) == 0)
                again = Stages(pipeline, virtual, pipeline_layout=layout_text(chunks))
                assert again.chunk_layers(num_layers) == chunks


@pytest.mark.parametrize(
    ("stages", "num_layers", "chunks"),
    [
        (Stages(2, layers_in_first_stage=3), 4, (3, 1)),  # fits
        (Stages(2, layers_in_first_stage=3), 3, (2, 1)),
        (Stages(2, layers_in_first_stage=7), 64, (7, 57)),
        (Stages(4, layers_in_first_stage=6), 64, (16, 16, 16, 16)),
        (Stages(2, 2, pipeline_layout="Et|t|t|tL"), 6, (2, 1, 2, 1)),
    ],
)
def test_stages_are_fitted_to_a_second_model(stages: Stages, num_layers: int, chunks):
    assert stages.fitted(num_layers).chunk_layers(num_layers) == chunks
    with pytest.raises(ValueError, match=r"model's 1(;| layers)"):
        stages.fitted(1)


def test_megatron_reads_the_same_layouts():
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    from aropd_mcore.mcore import runtime  # noqa: F401 # installs the CPU mode before Megatron

    for chunks in ([3, 4, 4, 3], [1, 2, 2, 2, 2, 1], [0, 1, 5, 0], [23, *[24] * 6, 22]):
        text = layout_text(chunks)
        parsed = PipelineParallelLayerLayout.parse_str_to_list(text)
        numbers = [sum(layer.name == "decoder" for layer in part) for part in parsed]
        assert (
            numbers
            == chunks
            == list(Stages(len(chunks), pipeline_layout=text).chunk_layers(sum(chunks)))
        )
