"""Scoring of the student's views by a teacher in another layout of the same ranks.

The layouts have different replicas, so a teacher's replica scores views of several replicas of the
student, or several of the teacher's replicas score those of one:

    views of each student replica  ->  whole batch on every rank (token ids, on the CPU)
    equal shares of the batch      ->  hidden states on the last stage of each teacher replica
    hidden states at loss tokens   ->  last stage of the student replica that has the view

Shape letters: B samples of a microbatch, S padded sequence, T loss tokens of a view, H hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from aropd_mcore.data.context_parallel import whole_view
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.types import ViewBatch


class _Request(NamedTuple):
    """A view of one student replica."""

    view: ViewBatch
    num_tokens: tuple[int, ...]
    """Number of loss tokens of each of the replica's context ranks. The view has them in order."""


class _Reader(NamedTuple):
    """A rank of the student's last stage, which computes the loss."""

    rank: int
    replica: int
    context: int


class _Transfer(NamedTuple):
    sender: int
    """Rank of the last stage of the teacher's replica that has scored the request."""
    reader: _Reader
    request: int
    """Index among the requests of the whole batch."""


class ViewExchange:
    """Exchange of views and hidden states between the replicas of a student and of a teacher."""

    def __init__(
        self,
        student: Runtime,
        teacher: Runtime,
        hidden_size: int,
        dtype: torch.dtype,
        keep: Callable[[Tensor], Tensor],
    ):
        """
        Args:
            student, teacher: the two layouts.
            hidden_size, dtype: width and dtype of the teacher's hidden states.
            keep: returns a received tensor where it is kept until the loss.
        Collectives: one gather of objects over the job.
        """
        self._student, self._teacher = student, teacher
        self._hidden_size, self._dtype, self._keep = hidden_size, dtype, keep
        places: list[tuple[Any, Any]] = student.gather(
            (
                student.is_last_stage and (student.dp_rank, student.cp_rank),
                teacher.is_last_stage and (teacher.dp_rank,),
            )
        )
        self._readers = [_Reader(r, *own) for r, (own, _) in enumerate(places) if own]
        self._scorers: list[list[int]] = [[] for _ in range(teacher.dp_size)]
        """Ranks of the last stage of each of the teacher's replicas."""
        for rank, (_, of_teacher) in enumerate(places):
            if of_teacher:
                self._scorers[of_teacher[0]].append(rank)

    def score(
        self,
        views: Sequence[ViewBatch],
        compute: Callable[[Sequence[ViewBatch]], list[Tensor]],
    ) -> list[Tensor]:
        """Return the teacher's hidden states at the loss tokens of this rank's views.

        Args:
            views: privileged views, the same number on every rank. Context ranks have shares.
            compute: computes the hidden states [T, H] of the views that this rank's replica of the
                teacher scores. Returns [] before the teacher's last stage.
        Returns:
            [T, H] for each view, on the student's last stage. On other stages [].
        Collectives: an exchange of the views, as objects on the CPU. Those of `compute`. One
            all-to-all over the job for each view of a replica, unless all hidden states are already
            where they are needed.
        """
        requests = self._student.concatenate_over_data(self._requests(views))
        size = -(-len(requests) // self._teacher.dp_size)
        if self._teacher.vp_size > 1:  # the interleaved schedule takes groups of this size
            size += -size % self._teacher.pp_size
        first = self._teacher.dp_rank * size
        share = [request.view for request in requests[first : first + size]]
        share += [_empty(requests[0].view)] * (size - len(share))
        multiple, device = self._teacher.length_multiple, self._teacher.device
        hidden = compute([_padded(view, multiple).to(device) for view in share])
        return self._deliver(requests, dict(enumerate(hidden)), size)

    def _requests(self, views: Sequence[ViewBatch]) -> list[_Request]:
        own = [view.to(torch.device("cpu")) for view in views]
        torch.cuda.current_stream().synchronize()  # the copies are asynchronous
        of_ranks = [own]
        if self._student.cp_size > 1:
            of_ranks = [[] for _ in range(self._student.cp_size)]
            dist.all_gather_object(of_ranks, own, group=self._student.cp_objects_group)
        return [
            _Request(
                shares[0] if len(shares) == 1 else whole_view(shares),
                tuple(share.hidden_index_T.numel() for share in shares),
            )
            for shares in zip(*of_ranks, strict=True)
        ]

    def _deliver(
        self, requests: Sequence[_Request], hidden: dict[int, Tensor], size: int
    ) -> list[Tensor]:
        """Send hidden states to the ranks that need them, one view of each replica at a time.

        Args:
            hidden: hidden states of this rank's share of the requests, by index in the share. They
                are removed when they have been sent, so that their memory is free.
            size: number of requests of a share.
        """
        rank, received = self._student.rank, list[Tensor]()
        num_views = len(requests) // self._student.dp_size
        for number in range(num_views):
            transfers = list(self._transfers(number, num_views, size))
            sent, expected = dict[int, Tensor](), dict[int, int]()
            for sender, reader, index in transfers:
                num_tokens = requests[index].num_tokens
                if sender == rank:
                    part_TH = hidden[index % size].split(num_tokens)[reader.context]
                    # A part would keep the memory of the whole.
                    sent[reader.rank] = part_TH if len(num_tokens) == 1 else part_TH.clone()
                if reader.rank == rank:
                    expected[sender] = num_tokens[reader.context]
            if all(sender == reader.rank for sender, reader, _ in transfers):
                received += sent.values()
            else:
                received += self._all_to_all(sent, expected)
            for _, _, index in transfers:
                if rank in self._scorers[index // size]:
                    hidden.pop(index % size, None)
        return received

    def _transfers(self, number: int, num_views: int, size: int) -> Iterator[_Transfer]:
        """Yield the transfers of one view of each student replica. A reader has one transfer.

        A rank that has scored the view keeps its own hidden states.
        """
        for place, reader in enumerate(self._readers):
            index = reader.replica * num_views + number
            scorers = self._scorers[index // size]
            is_near = reader.rank in scorers
            yield _Transfer(
                reader.rank if is_near else scorers[place % len(scorers)], reader, index
            )

    def _all_to_all(self, sent: dict[int, Tensor], expected: dict[int, int]) -> list[Tensor]:
        """Exchange hidden states over the job.

        Args:
            sent: hidden states by receiving rank.
            expected: number of rows by sending rank, of which there is at most one.
        Returns:
            The received hidden states, [] if none are expected.
        """
        ranks, device = range(self._student.world_size), self._student.device
        empty = torch.empty(0, self._hidden_size, dtype=self._dtype, device=device)
        rows_H = torch.cat([empty, *(sent[r].to(device) for r in ranks if r in sent)])
        received_TH = empty.new_empty(sum(expected.values()), self._hidden_size)
        dist.all_to_all_single(
            received_TH,
            rows_H,
            [expected.get(r, 0) for r in ranks],
            [len(sent[r]) if r in sent else 0 for r in ranks],
        )
        return [self._keep(received_TH)] if expected else []


def _padded(view: ViewBatch, multiple: int) -> ViewBatch:
    """Pad the sequences on the right to a multiple of a length.

    Any token works: attention is causal, and padding comes last.
    """
    num_missing = -view.tokens_BS.size(1) % multiple
    view = view._replace(tokens_BS=functional.pad(view.tokens_BS, (0, num_missing)))
    if view.bounds is None:
        return view
    bounds = view.bounds.clone()
    bounds[-1] += num_missing
    return view._replace(bounds=bounds, longest=int(bounds.diff().max()))


def _empty(view: ViewBatch) -> ViewBatch:
    """Return one padding token without loss, packed if `view` is."""
    bounds = None if view.bounds is None else torch.tensor([0, 1], dtype=torch.int32)
    return ViewBatch(
        view.tokens_BS[:1, :1], view.hidden_index_T[:0], bounds, int(bounds is not None)
    )
