"""One class for each way in which parameters live on several ranks: what is kept where, and what a step sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.distributed import state_dict
from asgo.distributed.collectives import all_gather, all_reduce_and, all_reduce_norm, all_reduce_sum, all_to_all
from asgo.distributed.placement import (
    Placement,
    ShardSpec,
    entries_of,
    gradient,
    local,
    sent_numbers,
    sizes,
    whole,
    within,
)
from asgo.distributed.planned_part import FAILURE_BYTES, STATE_BYTES, PlannedPart
from asgo.parts import Due, ParameterPart, StackedParts, Strategy, Wait
from asgo.state_keys import PARAMETER_KEYS, is_own, split_key
from asgo.structures import OneCall, Structure

ROOT_PRODUCTS = 20.0
"""Products of k x k matrices that a root counts for beside an owner's other work; only the balance depends on it."""


class Placed(Strategy):
    """Every rank holds all of the parameter and does all of its work; the parameter may be a `DTensor`.

    Args:
        placement: where its entries are.
    """

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement.view)
        self.placement, self.ranks, self.group_rank = placement, placement.ranks, placement.group_rank

    def held(self, tensor: Tensor) -> Tensor:
        """The local tensor of a `DTensor`, else the tensor itself."""
        return local(tensor)

    def gradient(self, param: Tensor) -> Tensor:
        """The local gradient, placed as the parameter is."""
        return gradient(param)

    def export(self, state: State, param: Tensor, owners: Sequence[int | None]) -> State:
        """A `DTensor` of the global shape for each tensor that this rank holds a part of."""
        return {
            key: self._exported(key, tensor, param, owners) if is_own(key) else tensor for key, tensor in state.items()
        }

    def _exported(self, key: str, tensor: Tensor, param: Tensor, owners: Sequence[int | None]) -> Tensor:
        if key == "step":
            return tensor
        if key in PARAMETER_KEYS:  # an entry for each of the parameter's
            return state_dict.like_param(key, tensor, param, self.placement)
        return self.export_part(*split_key(key), tensor, param, owners)

    def export_part(self, name: str, index: int, tensor: Tensor, param: Tensor, owners: Sequence[int | None]) -> Tensor:
        """A tensor of one part's state, with the shape that it has on a single process."""
        return tensor

    # ---- in a plan

    @classmethod
    def kept(cls, part: PlannedPart) -> dict[str, Tensor]:
        """The share that every rank keeps of each kind of state in `PlannedPart.state`: all."""
        return dict.fromkeys(part.state, part.everywhere)

    @classmethod
    def sent(cls, part: PlannedPart, itemsize: int) -> Tensor:
        """The flow of every step, with parameters and gradients of this many bytes each: nothing is sent."""
        return part.nothing()

    @classmethod
    def sent_roots(cls, part: PlannedPart) -> Tensor:
        """What a step sends beside, if it refreshes the part's roots: nothing."""
        return part.nothing()


class Elementwise(Placed):
    """AdamW: every rank updates the entries that it holds, or with ZeRO-1 a run of rows, which it then sends."""

    kind: ClassVar[str] = "elementwise"
    counts_all: ClassVar[bool] = False

    def entries(self, param: Tensor, tensor: Tensor) -> Tensor:
        """Those that this rank holds or, of replicated ones, its rows."""
        return entries_of(param, self.placement, tensor)

    def keep_own(self, state: State, param: Tensor, owners: Sequence[int | None]) -> None:
        """Keep the moments of this rank's rows."""
        for key in ("exp_avg", "exp_avg_sq", "residual") if self.placement.rows else ():
            if key in state:
                state[key] = state[key][within(self.placement.box, whole(param))].clone()

    def export_part(self, name: str, index: int, tensor: Tensor, param: Tensor, owners: Sequence[int | None]) -> Tensor:
        """Moments have an entry for each of the parameter's."""
        if not name.startswith("exp_avg"):
            return tensor
        return state_dict.like_param(name, tensor, param, self.placement)

    def all_agree(self, flags: Tensor, strategies: Sequence[Strategy]) -> Tensor:
        """All-reduce one flag for each parameter."""
        return all_reduce_and(flags, [strategy.ranks for strategy in strategies])

    def exchange_entries(self, params: Sequence[Tensor], strategies: Sequence[Strategy]) -> list[Wait]:
        """Exchange updated rows (ZeRO-1): one collective for each dtype and device."""
        sorts: dict[tuple[object, ...], list[tuple[Tensor, Placement]]] = {}
        for param, strategy in zip(params, strategies, strict=True):
            if isinstance(strategy, Elementwise) and strategy.placement.rows:
                key = (strategy.ranks, param.dtype, param.device)
                sorts.setdefault(key, []).append((local(param.detach()), strategy.placement))
        return [_exchange_rows(alike) for alike in sorts.values()]

    @classmethod
    def kept(cls, part: PlannedPart) -> dict[str, Tensor]:
        """The moments of what it updates."""
        return {"adamw": part.updated.double() / max(part.numel, 1)}

    @classmethod
    def sent(cls, part: PlannedPart, itemsize: int) -> Tensor:
        """With ZeRO-1 every rank sends all others its rows."""
        if part.rows is None:
            return part.nothing()
        own = part.updated * itemsize
        return torch.stack([own * (part.copies - 1), own.sum() - own])


def _exchange_rows(alike: Sequence[tuple[Tensor, Placement]]) -> Wait:
    like, (ranks, me) = alike[0][0], (alike[0][1].ranks, alike[0][1].group_rank)
    rows = [
        [param[within(placement.boxes[rank], whole(param))] for param, placement in alike] for rank in range(len(ranks))
    ]
    outgoing = [rows[me] if rank != me else [] for rank in range(len(ranks))]
    rows[me] = []
    return all_to_all(ranks, me, outgoing, rows, like)


class RootSharing(Placed):
    """All ranks hold everything; each refreshes the roots of some parts and sends them to the others."""

    kind: ClassVar[str] = "root_sharing"
    shares_roots: ClassVar[bool] = True
    extra_keys: ClassVar[tuple[str, ...]] = ("failures",)
    """Keys that are sent with the roots."""

    def bucket_key(self, param: Tensor) -> tuple[object, ...]:
        """One dtype: collectives send one."""
        return self.kind, self.ranks, param.dtype

    @staticmethod
    def has_owners(structure: Structure) -> bool:
        """Where there are roots, or updates that make them."""
        return bool(structure.root_keys) or isinstance(structure, OneCall)

    @staticmethod
    def owner_cost(structure: Structure, shape: tuple[int, int, int]) -> float:
        """Multiplications of its roots."""
        b, m, n = shape
        return b * structure.root_flops(m, n)

    def broadcast_roots(self, bucket: StackedParts, due: Due, keys: Sequence[str]) -> Wait | None:
        """Broadcast the roots due this step from their owners."""
        found = [(i, part) for i, part in enumerate(bucket.parts) if due(part)]
        if not found or not keys or found[0][1].owner is None:
            return None
        return self._from_owners(bucket, found, [bucket.state[key] for key in (*keys, *self.extra_keys)])

    def broadcast_updates(self, bucket: StackedParts, update: Stack) -> Wait | None:
        """Broadcast the updates of all parts from their owners, and all of their state but the momentum."""
        state = [tensor for key, tensor in bucket.state.items() if key != "exp_avg"]
        return self._from_owners(bucket, list(enumerate(bucket.parts)), [update, *state])

    def _from_owners(
        self, bucket: StackedParts, found: Sequence[tuple[int, ParameterPart]], tensors: Sequence[Tensor]
    ) -> Wait:
        """Send some parts' rows of these tensors from their owners to all."""
        outgoing, incoming = per_rank(self.ranks), per_rank(self.ranks)
        for i, part in found:
            rows = slice(i * bucket.matrices_per_param, (i + 1) * bucket.matrices_per_param)
            held = [tensor[rows].view(-1).view(torch.uint8) for tensor in tensors]
            for rank in range(len(self.ranks)) if part.is_owner else ():
                outgoing[rank] += held
            incoming[part.owner or 0] += held
        like = torch.empty(0, dtype=torch.uint8, device=bucket.state["failures"].device)
        outgoing[self.group_rank], incoming[self.group_rank] = [], []
        return all_to_all(self.ranks, self.group_rank, outgoing, incoming, like)

    @classmethod
    def sent(cls, part: PlannedPart, itemsize: int) -> Tensor:
        """The owner of an update that makes its own root sends it, with all of its state but the momentum."""
        if not isinstance(part.structure, OneCall):
            return part.nothing()
        state = sum(size for kind, size in part.state.items() if kind != "momentum")
        return part.from_owner(part.numel * STATE_BYTES + state)

    @classmethod
    def sent_roots(cls, part: PlannedPart) -> Tensor:
        """The owner sends roots, ``k^2`` numbers or packed ``k (k + 1) / 2``, and their counts of failures."""
        failures = part.stack[0] * FAILURE_BYTES if cls.extra_keys else 0
        return part.from_owner(part.state["roots"] + failures) if part.state["roots"] else part.nothing()


class PartialSums(RootSharing):
    """Every rank holds some rows, or some columns, of each matrix and steps those; statistics are sums over ranks.

    The statistic of a structure with roots is with the owner of a matrix alone: ranks send it their shares, which it
    sums, and it sends them roots when they are due. Without roots, statistics are all-reduced.
    """

    kind: ClassVar[str] = "partial_sums"
    counts_all: ClassVar[bool] = False
    sums_statistics: ClassVar[bool] = True
    extra_keys = ()

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement)
        self.cut: ShardSpec = placement.cut  # pyright: ignore[reportAttributeAccessIssue]
        self.owner_keys = self.cut.owner_keys

    def bucket_key(self, param: Tensor) -> tuple[object, ...]:
        """Kind, ranks and dtype, and shards of one shape."""
        return *super().bucket_key(param), self.placement.boxes

    def stacks(self, param: Tensor) -> list[tuple[int, int, int]]:
        """Shapes of whole matrices, from the global shape."""
        return self.matrix_view.shapes(param.shape)

    def shards(self) -> int:
        """One for each rank along the cut."""
        return len(self.cut.ranks)

    @staticmethod
    def has_owners(structure: Structure) -> bool:
        """Where there are roots."""
        return bool(structure.root_keys)

    @staticmethod
    def owner_cost(structure: Structure, shape: tuple[int, int, int]) -> float:
        """Its roots, beside work that all ranks share."""
        b, m, n = shape
        return b * structure.root_flops(m, n) * ROOT_PRODUCTS

    def local_structure(self, structure: Structure, m: int, n: int) -> Structure:
        """With the side that it takes for whole matrices, so that every shard agrees."""
        return structure.with_side_of(m, n)

    def initial(self, state: State, owner: int | None) -> State:
        """Statistics of matrices that another rank owns have length 0."""
        if owner in (None, self.group_rank):
            return state
        return state | {key: state[key][:0].clone() for key in self.owner_keys}

    def export_part(self, name: str, index: int, tensor: Tensor, param: Tensor, owners: Sequence[int | None]) -> Tensor:
        """Shards of what is cut, replicas of roots, and statistics on their owners."""
        stack = self.stacks(param)[index]
        if name in self.owner_keys:
            return state_dict.on_owner(tensor, param, self.ranks[owners[index] or 0], stack[0])
        return state_dict.shard(name, tensor, param, self.cut, stack)

    def broadcast_updates(self, bucket: StackedParts, update: Stack) -> Wait | None:
        """No-op: every rank computes the update of its shards."""
        return None

    def reduce_norms(self, norms: Tensor) -> Wait | None:
        """All-reduce shard norms to matrix norms."""
        return all_reduce_norm(norms, self.cut.ranks)

    def reduce_statistics(self, bucket: StackedParts, statistic: Tensor) -> Wait | None:
        """Reduce the statistics of this rank's own matrices here or, without owners, all of them everywhere."""
        if bucket.all_parts[0].owner is None:
            return all_reduce_sum(statistic, self.cut.ranks)
        me, ranks = self.group_rank, self.ranks
        near = [place for place, rank in enumerate(ranks) if rank in self.cut.ranks and place != me]
        outgoing, incoming = per_rank(ranks), per_rank(ranks)
        for part, piece in zip(bucket.all_parts, statistic.split(bucket.matrices_per_param), strict=True):
            if part.owner in near:
                outgoing[part.owner].append(piece)
        own = statistic[bucket.own]
        arrived = own.new_empty(len(near), *own.shape)
        for place, piece in zip(near, arrived, strict=True):
            incoming[place].append(piece)
        wait = all_to_all(ranks, me, outgoing, incoming, statistic)

        def arrive() -> None:
            wait()
            own.add_(arrived.sum(0))

        return arrive

    @classmethod
    def kept(cls, part: PlannedPart) -> dict[str, Tensor]:
        """Shards, roots on every rank, and statistics on their owner; all have those if there is none."""
        share, everywhere = part.share, part.everywhere
        statistics = everywhere if part.owner is None else part.is_owner
        kept = {"momentum": share, "sharded": share, "statistics": statistics, "failures": statistics}
        return kept | {"roots": everywhere}

    @classmethod
    def sent(cls, part: PlannedPart, itemsize: int) -> Tensor:
        """The statistics of shards to their owner, or of all to all without one, and norms between shards."""
        if part.structure is None:
            return part.nothing()
        b, m, n = part.stack
        norms, statistics = part.between_shards(b * part.norms * STATE_BYTES), sent_numbers(part.structure, m, n)[0]
        if part.owner is None:
            return norms + part.all_reduced(b * statistics * STATE_BYTES)
        return norms + part.to_owner(torch.full(part.ranks, b * statistics * STATE_BYTES))


class WholeSlices(Placed):
    """Every rank holds whole matrices and steps them by itself; only a size that spans all of them is shared."""

    kind: ClassVar[str] = "whole_slices"
    counts_all: ClassVar[bool] = False

    def bucket_key(self, param: Tensor) -> tuple[object, ...]:
        """Kind, ranks and dtype, and slices of one shape."""
        return self.kind, self.ranks, param.dtype, self.placement.boxes

    def export_part(self, name: str, index: int, tensor: Tensor, param: Tensor, owners: Sequence[int | None]) -> Tensor:
        """Shards along the axis of matrices."""
        return state_dict.slices(tensor, param, self.placement)

    def all_norms(self, bucket: StackedParts, norms: Tensor) -> Tensor:
        """One norm per matrix, from every rank."""
        held = [torch.Size(sizes(box)).numel() for box in self.placement.boxes]
        most = bucket.matrices_per_param * max(held) // held[self.group_rank]
        return all_gather(norms, self.ranks, most)

    @classmethod
    def kept(cls, part: PlannedPart) -> dict[str, Tensor]:
        """That of its matrices."""
        return dict.fromkeys(part.state, part.share)

    @classmethod
    def sent(cls, part: PlannedPart, itemsize: int) -> Tensor:
        """One norm per matrix, with room for those of the shard that has most."""
        return part.between_shards(max(part.matrices) * STATE_BYTES)


def per_rank(ranks: Sequence[int]) -> list[list[Tensor]]:
    """An empty list for each rank of a group, for what goes to it or comes from it."""
    return [[] for _ in ranks]
