"""Exchange of views and hidden states between two layouts, with a teacher that copies tokens.

Whole steps with teachers in other layouts are cases of tests/trainer/test_step.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aropd_mcore.data.collate import collate
from aropd_mcore.data.context_parallel import share_of_rank
from aropd_mcore.stages import Stages
from aropd_mcore.types import Microbatch, Sample, ViewBatch
from tests.support.ranks import run_ranks

LAYOUTS = [
    # Tensor, pipeline and context of the student; tensor, pipeline and virtual pipeline of the
    # teacher.
    ((2, 2, 1), (4, 1, 1)),
    ((4, 1, 1), (2, 2, 1)),
    ((1, 1, 1), (1, 2, 1)),
    ((1, 4, 1), (1, 1, 1)),
    ((1, 4, 1), (1, 2, 2)),
    ((1, 2, 2), (4, 1, 1)),
    ((1, 1, 4), (1, 2, 1)),
    ((2, 1, 1), (2, 1, 1)),
    ((1, 1, 2), (1, 1, 1)),
]
NUM_MICROBATCHES = 3


def test_every_rank_gets_the_hidden_states_of_its_own_tokens():
    """Replicas nest or cut across each other, and shares of views need padding."""
    run_ranks(exchange_in_every_layout, 4)


def exchange_in_every_layout() -> None:
    from aropd_mcore.mcore import runtime

    for sizes, of_teacher in LAYOUTS:
        tensor, pipeline, context = sizes
        student = runtime.start(tensor=tensor, pipeline=pipeline, context=context)
        for is_packed in (False, True):
            for sequence in (False, True) if of_teacher[0] > 1 else (False,):
                teacher = runtime.add_layout(
                    student,
                    Stages(of_teacher[1], of_teacher[2]),
                    tensor=of_teacher[0],
                    expert=1,
                    expert_tensor=1,
                    sequence_parallel=sequence,
                )
                check_exchange(student, teacher, is_packed)
        runtime.stop()


def check_exchange(student, teacher, is_packed: bool) -> None:
    from megatron.core import parallel_state

    from aropd_mcore.mcore.view_exchange import ViewExchange

    sent = []

    def keep(hidden_TH: Tensor) -> Tensor:
        sent.append(hidden_TH)
        return hidden_TH

    whole = microbatches(student, is_packed)
    shares = [share_of_rank(m, student.cp_size, student.cp_rank) for m in whole]
    exchange = ViewExchange(student, teacher, 2, torch.float64, keep)
    num_computed = []

    def compute(views: Sequence[ViewBatch]) -> list[Tensor]:
        with teacher.active():
            size = parallel_state.get_tensor_model_parallel_world_size()
        assert size == teacher.tp_size
        num_computed.append(len(views))
        assert all(v.tokens_BS.size(1) % teacher.length_multiple == 0 for v in views)
        assert not is_packed or all(v.bounds[-1] == v.tokens_BS.size(1) for v in views)
        return [copied(view) for view in views] if teacher.is_last_stage else []

    hidden = exchange.score([view for m in shares for view in (m.partial, m.full)], compute)
    assert parallel_state.get_tensor_model_parallel_world_size() == student.tp_size
    num_views = -(-2 * NUM_MICROBATCHES * student.dp_size // teacher.dp_size)
    if teacher.vp_size > 1:
        num_views += num_views % teacher.pp_size
    assert num_computed == [num_views]
    if not student.is_last_stage:
        assert hidden == []
        return
    expected = [
        copied(view)[is_in_share(m, share)]
        for m, share in zip(whole, shares, strict=True)
        for view in (m.partial, m.full)
    ]
    assert len(hidden) == len(expected)
    for found_TH, expected_TH in zip(hidden, expected, strict=True):
        assert found_TH.equal(expected_TH)
    if teacher.tp_size == student.world_size:
        assert not sent, "every rank has all hidden states"


def microbatches(student, is_packed: bool) -> list[Microbatch]:
    """Build this replica's microbatches of samples of different lengths, one without samples."""
    draw = torch.Generator().manual_seed(student.dp_rank)

    def ids() -> tuple[int, ...]:
        number = int(torch.randint(1, 12, (), generator=draw))
        return tuple(torch.randint(1, 1000, (number,), generator=draw).tolist())

    samples = [Sample(ids(), ids(), ids(), ids(), 1.0) for _ in range(4)]
    return collate(
        samples,
        [[0, 1], [2, 3], []],
        pad_token_id=0,
        length_multiple=student.length_multiple,
        segment_multiple=student.segment_multiple if is_packed else None,
    )


def copied(view: ViewBatch) -> Tensor:
    """Return token and position of each loss token, [T, 2]."""
    positions_T = view.hidden_index_T // len(view.tokens_BS)
    tokens_T = view.tokens_BS.T.flatten()[view.hidden_index_T]
    return torch.stack([tokens_T, positions_T], dim=1).double()


def is_in_share(whole: Microbatch, share: Microbatch) -> Tensor:
    """Return which loss tokens of a microbatch a context rank has, bool [T]."""
    own = set(zip(share.sample_T.tolist(), share.offset_T.tolist(), strict=True))
    tokens = zip(whole.sample_T.tolist(), whole.offset_T.tolist(), strict=True)
    return torch.tensor([token in own for token in tokens], dtype=torch.bool)
