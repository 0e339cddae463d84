"""Buckets whose work several ranks share. Each says what travels; the step is the same for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.distributed.collectives import Wait, all_gather, all_reduce_norm, all_reduce_sum, all_to_all
from asgo.distributed.placement import Region, ShardSpec, gradient, overlap, part_regions, pieces, sizes, within
from asgo.optimizer.bucket import Bucket, Member, view_here
from asgo.optimizer.rounding import Rounding
from asgo.structures import Structure


class Shared(Bucket):
    """All ranks hold everything; each refreshes the roots of some members and sends them to the others.

    Attributes:
        extra_keys: what goes with the roots.
    """

    extra_keys: ClassVar[tuple[str, ...]] = ("failures",)

    def __init__(self, all_parts: Sequence[Member], states: Sequence[State], keys: Sequence[str]) -> None:
        super().__init__(all_parts, states, keys)
        self.root_retry.retries = not self.root_retry.deferred

    def share(self, due: Callable[[Member], bool], keys: Sequence[str]) -> Wait | None:
        """Start to bring the roots of the members whose turn it is from their owners here: their bytes, once each."""
        found = [(i, member) for i, member in enumerate(self.members) if due(member)]
        if not found or not keys or found[0][1].owner is None:
            return None
        return self._from_owners(found, [self.state[key] for key in (*keys, *self.extra_keys)])

    def bring(self, update: Stack) -> Wait | None:
        """Start to bring the updates of all members from their owners here, and all of their state but the momentum."""
        state = [tensor for key, tensor in self.state.items() if key != "exp_avg"]
        return self._from_owners(list(enumerate(self.members)), [update, *state])

    def _from_owners(self, found: Sequence[tuple[int, Member]], tensors: Sequence[Tensor]) -> Wait:
        """Start to bring some members' rows of these tensors from their owners here."""
        outgoing: list[list[Tensor]] = [[] for _ in self.placement.ranks]
        incoming: list[list[Tensor]] = [[] for _ in self.placement.ranks]
        for i, member in found:
            rows = slice(i * self.slices, (i + 1) * self.slices)
            held = [tensor[rows].view(-1).view(torch.uint8) for tensor in tensors]
            for rank in range(len(self.placement.ranks)) if member.is_owner else ():
                outgoing[rank] += held
            incoming[member.owner or 0] += held
        like = torch.empty(0, dtype=torch.uint8, device=self.state["failures"].device)
        me = self.placement.group_rank
        outgoing[me], incoming[me] = [], []
        return all_to_all(self.placement.ranks, me, outgoing, incoming, like)


class Summed(Shared):
    """Every rank holds some rows, or some columns, of each matrix and steps those; statistics are sums over ranks.

    The memory of a structure with roots is with the owner of a matrix alone: ranks send it their measurements, which it
    adds up, and it sends them roots when they are due. Without roots, measurements are added up on all ranks, which
    remember alike.
    """

    extra_keys = ()

    def __init__(self, all_parts: Sequence[Member], states: Sequence[State], keys: Sequence[str]) -> None:
        super().__init__(all_parts, states, keys)
        mine = [
            i for i, member in enumerate(all_parts) if member.is_owner
        ]  # side by side, as `make_buckets` sorts them
        start = mine[0] if mine else 0
        self.own = slice(start * self.slices, (start + len(mine)) * self.slices)
        self.cut: ShardSpec = self.placement.cut  # pyright: ignore[reportAttributeAccessIssue]
        self.memory = {key: x if key in self.cut.owner_keys else x[self.own] for key, x in self.state.items()}

    def with_side_of(self, structure: Structure) -> Structure:
        """With what it chooses for whole matrices."""
        first = self.all_parts[0]
        return structure.with_side_of(*self.view.shapes(first.param.shape)[self.part][1:])

    def all_reduce_norm(self, norms: Tensor) -> Wait | None:
        """Start to make them those of whole matrices, in place."""
        return all_reduce_norm(norms, self.cut.ranks)

    def sum(self, measurement: Tensor) -> Wait | None:
        """Start to bring the measurements of this rank's own matrices here, where they are added up in place."""
        if self.all_parts[0].owner is None:
            return all_reduce_sum(measurement, self.cut.ranks)
        me, ranks = self.placement.group_rank, self.placement.ranks
        near = [place for place, rank in enumerate(ranks) if rank in self.cut.ranks and place != me]
        outgoing: list[list[Tensor]] = [[] for _ in ranks]
        incoming: list[list[Tensor]] = [[] for _ in ranks]
        for member, piece in zip(self.all_parts, measurement.split(self.slices), strict=True):
            if member.owner in near:
                outgoing[member.owner].append(piece)
        own = measurement[self.own]
        arrived = own.new_empty(len(near), *own.shape)
        for place, piece in zip(near, arrived, strict=True):
            incoming[place].append(piece)
        wait = all_to_all(ranks, me, outgoing, incoming, measurement)

        def arrive() -> None:
            wait()
            own.add_(arrived.sum(0))

        return arrive

    def precondition(self, structure: Structure, direction: Stack) -> Stack:
        """The shards of the direction, rescaled."""
        return structure.precondition_shard(self.state, direction, self.whole)


class Aligned(Bucket):
    """Every rank holds whole matrices and steps them by itself; only a size that spans all of them is shared."""

    def everywhere(self, norms: Tensor) -> Tensor:
        """One number per matrix, from every rank."""
        held = [torch.Size(sizes(box)).numel() for box in self.placement.boxes]
        most = self.slices * max(held) // held[self.placement.group_rank]
        return all_gather(norms, self.placement.ranks, most)


class Owned(Bucket):
    """Members are in boxes on several ranks; for each of them one rank keeps the state and computes the update.

    It gathers the gradients of its members, does with them what a single process does with all, and sends every rank
    its box of the updates: two collectives a bucket. What it holds meanwhile are whole gradients of its own members.
    """

    def __init__(self, all_parts: Sequence[Member], states: Sequence[State], keys: Sequence[str]) -> None:
        super().__init__(all_parts, states, keys)
        self._arrived: list[Tensor] = []
        self._places = [_places(member) for member in all_parts]
        self._moves = any(
            source != member.owner
            for member, places in zip(all_parts, self._places, strict=True)
            for place in places
            for source in place.sources.values()
        )

    def gather(self) -> Wait | None:
        """Start to bring the gradients of this rank's members here: every entry from one rank that holds it."""
        me, ranks = self.placement.group_rank, self.placement.ranks
        outgoing: list[list[Tensor]] = [[] for _ in ranks]
        incoming: list[list[Tensor]] = [[] for _ in ranks]
        grads = [gradient(member.param) for member in self.all_parts]
        self._arrived = [grads[0].new_empty(self.shape) for _ in self.members]
        targets = iter(self._arrived)
        for member, places, grad in zip(self.all_parts, self._places, grads, strict=True):
            wanted = pieces(self.view, next(targets)) if member.is_owner else [None] * len(places)
            for place, target in zip(places, wanted, strict=True):
                for box, source in place.sources.items():
                    if source == me:
                        outgoing[member.owner or 0].append(grad[within(box, member.placement.box)])
                    if target is not None:
                        incoming[source].append(target[within(box, place.box)])
        if self._moves:
            return all_to_all(ranks, me, outgoing, incoming, grads[0])
        for mine, target in zip(outgoing[me], incoming[me], strict=True):
            target.copy_(mine)
        return None

    def gradients(self) -> Stack:
        """What `gather` brought, as one stack."""
        arrived, self._arrived = self._arrived, []
        return self.view.stack_all(self.part, arrived).to(self.dtype)

    def add(self, update: Stack | None, decay: float | Tensor, rounding: Rounding) -> Wait | None:
        """Start to send every rank its boxes of the update; with them come those of the other members."""
        me, ranks = self.placement.group_rank, self.placement.ranks
        outgoing: list[list[Tensor]] = [[] for _ in ranks]
        incoming: list[list[Tensor]] = [[] for _ in ranks]
        updates, written, buffers = iter(self._pieces(update)), [], []
        like = torch.empty(0, dtype=self.dtype, device=self.all_parts[0].param.device)
        for member, places in zip(self.all_parts, self._places, strict=True):
            given = pieces(self.view, next(updates)) if member.is_owner else [None] * len(places)
            for place, piece in zip(places, given, strict=True):
                for rank, box in place.holders.items() if piece is not None else ():
                    outgoing[rank].append(piece[within(box, place.box)])  # pyright: ignore[reportOptionalSubscript]
                if me in place.holders:
                    written.append((member, partial(_at, within(place.holders[me], member.placement.box))))
                    buffers.append(like.new_empty(sizes(place.holders[me])))
                    incoming[member.owner or 0].append(buffers[-1])
        wait = all_to_all(ranks, me, outgoing, incoming, like)

        def arrive() -> None:
            wait()
            self.write(written, buffers, decay, rounding)

        return arrive


def _at(index: tuple[slice, ...], tensor: Tensor) -> Tensor:
    return tensor[index]


def _places(member: Member) -> list[_Piece]:
    boxes = part_regions(view_here(member), tuple(member.param.shape))[member.part]
    return [_Piece.of(member, box) for box in boxes]


@dataclass(frozen=True)
class _Piece:
    """A box of a member's part.

    Args:
        box: its entries in the parameter.
        holders: which ranks hold entries of it, and which.
        sources: the rank that sends each box: the owner if it holds it, else the one of the owner's replica.
    """

    box: Region
    holders: dict[int, Region]
    sources: dict[Region, int]

    @staticmethod
    def of(member: Member, box: Region) -> _Piece:
        """The box of this member's part with the ranks that hold it."""
        found = {rank: overlap(held, box) for rank, held in enumerate(member.placement.boxes)}
        holders = {rank: held for rank, held in found.items() if held is not None}
        return _Piece(box, holders, _sources(member, holders))


def _sources(member: Member, held: dict[int, Region]) -> dict[Region, int]:
    by_box: dict[Region, list[int]] = {}
    for rank, box in held.items():
        by_box.setdefault(box, []).append(rank)
    twins = by_box[held[member.owner]] if member.owner in held else []
    replica = twins.index(member.owner) if twins else 0  # pyright: ignore[reportArgumentType]
    return {box: ranks[replica % len(ranks)] for box, ranks in by_box.items()}


KINDS: dict[str, type[Bucket]] = {
    "local": Bucket,
    "root_sharing": Shared,
    "whole_slices": Aligned,
    "partial_sums": Summed,
    "owner_computes": Owned,
}
"""The bucket of every kind of placement with a view."""


def pause(coming: Wait | None) -> Iterator[None]:
    """Let others go on until something has arrived, if anything is on its way."""
    if coming is not None:
        yield
        coming()


def interleave(tasks: Iterable[Iterator[None]]) -> None:
    """Run generators to their ends in order; while one waits where it yields, those after it go on.

    Every round begins one more of them, then takes each that is under way one yield further, the youngest first: so
    what a bucket needs from other ranks travels while the bucket before it computes. One that never yields is done
    before the next begins.
    """
    under_way: deque[Iterator[None]] = deque()
    for task in tasks:
        under_way.appendleft(task)
        _further(under_way)
    while under_way:
        _further(under_way)


def _further(under_way: deque[Iterator[None]]) -> None:
    ended = object()
    for task in list(under_way):
        if next(task, ended) is ended:
            under_way.remove(task)
