"""Alignment of a response across the three views."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from aropd_mcore.data.collate import collate
from aropd_mcore.data.packing import consecutive
from aropd_mcore.types import Rollout, Sample

PAD = 999  # Not an id of any sample, so that a counted padding position is detected.
ids = st.lists(st.integers(0, 50), min_size=1, max_size=9).map(tuple)
samples = st.lists(
    st.tuples(ids, ids, ids, st.lists(st.integers(51, 99), max_size=7).map(tuple)),
    min_size=1,
    max_size=7,
)


@given(samples, st.integers(0, 4), st.integers(1, 4))
def test_every_loss_token_is_predicted_in_every_view(samples, skip, micro_batch_size):
    rollouts = [Rollout(response, (), True, 0) for *_, response in samples]
    views = [with_skipped_tokens(texts, n + 1.0, skip) for n, texts in enumerate(samples)]
    groups = consecutive(len(samples), micro_batch_size)
    microbatches = collate(views, groups, pad_token_id=PAD)

    seen = []
    for number, microbatch in enumerate(microbatches):
        start = number * micro_batch_size
        for name in ("student", "partial", "full"):
            batch = getattr(microbatch, name)
            prompts = [getattr(view, f"{name}_ids") for view in views[start:]][:micro_batch_size]
            num_samples = len(prompts)
            assert batch.tokens_BS.size(0) == num_samples
            tokens_SB = batch.tokens_BS.T
            # The hidden state of a position predicts the token at the next position.
            next_SB = torch.cat([tokens_SB[1:], torch.full((1, num_samples), -1)])
            predicted_T = next_SB.flatten()[batch.hidden_index_T]
            assert torch.equal(predicted_T, microbatch.response_ids_T)
            assert torch.equal(batch.hidden_index_T % num_samples, microbatch.sample_T)
            for b, prompt in enumerate(prompts):
                sequence = prompt + rollouts[start + b].response_ids
                padding = batch.tokens_BS.size(1) - len(sequence)
                assert batch.tokens_BS[b].tolist() == [*sequence, *[PAD] * padding]
            longest = max(
                len(prompt) + len(rollouts[start + b].response_ids)
                for b, prompt in enumerate(prompts)
            )
            assert batch.tokens_BS.size(1) == longest
        seen += [
            (start + b, j, id, weight)
            for b, j, id, weight in zip(
                microbatch.sample_T.tolist(),
                microbatch.offset_T.tolist(),
                microbatch.response_ids_T.tolist(),
                microbatch.token_weights_T.tolist(),
                strict=True,
            )
        ]
    assert seen == [
        (n, j, id, n + 1.0)
        for n, rollout in enumerate(rollouts)
        for j, id in enumerate(rollout.response_ids)
        if j >= skip
    ]


def with_skipped_tokens(texts, weight: float, skip: int) -> Sample:
    length = len(texts[-1])
    return Sample(*texts, weight, loss_range=range(min(skip, length), length))


def test_collate_without_teacher_views_and_loss_tokens():
    samples = [Sample((1, 2), (3,), (4,), (5, 6), 1.0, loss_range=range(2, 2))]
    (microbatch,) = collate(samples, [[0]], pad_token_id=PAD, views=())
    assert microbatch.partial is None and microbatch.full is None
    assert microbatch.student.tokens_BS.tolist() == [[1, 2, 5, 6]]
    for tensor in (microbatch.student.hidden_index_T, microbatch.response_ids_T):
        assert tensor.shape == (0,) and tensor.dtype == torch.int64
    assert microbatch.token_weights_T.dtype == torch.float32


def test_collate_of_one_view_equals_that_view_of_both():
    samples = [Sample((1, 2), (3,), (4, 4), (5, 6), 1.0)]
    kwargs = {"pad_token_id": PAD}
    (both,) = collate(samples, [[0]], **kwargs)
    for view, other in (("partial", "full"), ("full", "partial")):
        (single,) = collate(samples, [[0]], **kwargs, views=(view,))
        assert getattr(single, other) is None
        for value, expected in zip(getattr(single, view), getattr(both, view), strict=True):
            assert torch.equal(value, expected) if torch.is_tensor(value) else value == expected


@given(samples, st.integers(0, 4), st.integers(1, 3), st.integers(1, 3))
def test_packed_and_padded_microbatches_count_the_same_tokens(samples, skip, segment, sequence):
    members = [with_skipped_tokens(texts, n + 1.0, skip) for n, texts in enumerate(samples)]
    groups = [list(range(len(samples)))[::-1], []]
    both = [
        collate(
            members,
            groups,
            pad_token_id=PAD,
            length_multiple=segment * sequence,
            segment_multiple=multiple,
            with_padding=True,
        )
        for multiple in (None, segment)
    ]
    for padded, packed in zip(*both, strict=True):
        for name in ("response_ids_T", "sample_T", "offset_T", "token_weights_T"):
            assert torch.equal(getattr(packed, name), getattr(padded, name))
        for name in ("student", "partial", "full"):
            batch = getattr(packed, name)
            tokens_S = batch.tokens_BS.squeeze(0)
            assert len(tokens_S) % (segment * sequence) == 0
            assert torch.equal(tokens_S[batch.hidden_index_T + 1], packed.response_ids_T)
            starts, ends = batch.bounds[:-1], batch.bounds[1:]
            for t, b in enumerate(packed.sample_T):
                assert starts[b] <= batch.hidden_index_T[t] < ends[b]
            # Each packed sequence equals its padded row.
            for row, start, end in zip(getattr(padded, name).tokens_BS, starts, ends, strict=True):
                real = tokens_S[start:end]
                real = real[real != PAD]
                assert torch.equal(real, row[row != PAD])
                assert start % segment == 0 and end % segment == 0
    for microbatches in both:
        for microbatch in microbatches:
            student = microbatch.student  # no sample contains the padding id
            assert torch.equal(student.padding_BS, student.tokens_BS == PAD)
    assert both[1][1].response_ids_T.numel() == 0
