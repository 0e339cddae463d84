"""What ranks hold, keep and send for a part of a parameter, from numbers alone: no process group, no memory.

Counts for ranks are tensors ``(copies, shards)``: along the first axis ranks hold the same entries, along the second
different ones. A flow has two of them, bytes sent and bytes received. Each strategy says what its ranks keep and send
(`Placed.kept`, `Placed.sent`, `Placed.sent_roots`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from asgo.distributed.placement import Kind, Region, kind_of_shards, overlap, part_regions, rank_regions, sizes
from asgo.structures import OneSided, Packed, Structure
from asgo.views import View

STATE_BYTES = 4
"""Of a number of the state, of a root, and of an update on its way."""
FAILURE_BYTES = 8
"""Of the count of failures that goes with a root."""
SIZES = ("replicate", "fsdp", "tp")
"""The axes of a `Mesh`."""


class Mesh(NamedTuple):
    """``replicate x fsdp x tp`` ranks. Without shards all hold whole parameters: plain data parallel."""

    replicate: int = 1  # copies of the shard group of ``fsdp x tp`` ranks
    fsdp: int = 1  # ranks over which rows are cut (``fully_shard``)
    tp: int = 1  # ranks over which the rows or columns of a Linear are cut before (tensor parallel)
    zero1: bool = False  # of plain data parallel: the owner alone keeps momentum, statistic and root

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(replicate, fsdp, tp)``."""
        return self.replicate, self.fsdp, self.tp

    @property
    def ranks(self) -> int:
        """All of them."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds whole parameters."""
        return self.fsdp * self.tp == 1

    def __str__(self) -> str:
        if self.is_whole:
            return "zero1" if self.zero1 else "ddp"
        sizes = [(name, size) for name, size in zip(SIZES, self.shape, strict=True) if size > 1]
        return sizes[0][0] if len(sizes) == 1 else ",".join(f"{name}={size}" for name, size in sizes)


@dataclass(frozen=True, kw_only=True)
class PlannedPart:
    """One part of a parameter, or all of one on AdamW, on ranks that need not exist.

    Args:
        name: of the parameter.
        shape: of the parameter.
        view: how it is read; None is AdamW.
        structure: how its statistic is kept; None without a view.
        index: its number among the parts of a split.
        stack: ``(b, m, n)`` of its matrices.
        state: bytes of all of its state: ``momentum``, ``statistics``, ``roots``, ``sharded`` (what is cut as the
            matrices are) and ``failures``, or without a view ``adamw``.
        counter: bytes of what every rank has for the parameter, its count of steps.
        tp_dim: the axis that tensor parallel cuts; None: every rank has all of it.
        kind: of its placement.
        copies: ranks that hold the same shard.
        held: how many of its numbers each shard has.
        across: over how many ranks tensor parallel cuts it, which are neighbours among the shards.
        rows: how many of its numbers each copy updates, where all hold the whole (ZeRO-1 on AdamW); None: all.
        interval: steps between refreshes of its roots.
        refresh_phase: the step of an interval at which they are refreshed.
        owner: the place among the ranks of the one that keeps its state, or refreshes its roots; None: there is none.
    """

    name: str
    shape: tuple[int, ...]
    view: View | None
    structure: Structure | None
    index: int = 0
    stack: tuple[int, int, int]
    state: Mapping[str, int]
    counter: int
    tp_dim: int | None
    kind: Kind = "local"
    copies: int = 1
    held: tuple[int, ...] = ()
    across: int = 1
    rows: tuple[int, ...] | None = None
    interval: int = 1
    refresh_phase: int = 0
    owner: int | None = None

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.stack)

    @property
    def ranks(self) -> tuple[int, int]:
        """``(copies, shards)`` of those that step it together."""
        return self.copies, len(self.held)

    @property
    def on_ranks(self) -> Tensor:
        """How many of its numbers each rank holds."""
        return torch.tensor(self.held).expand(self.ranks)

    @property
    def share(self) -> Tensor:
        """The same, as a share of all its numbers."""
        return self.on_ranks.double() / max(self.numel, 1)

    @property
    def everywhere(self) -> Tensor:
        """1 for every rank."""
        return torch.ones(self.ranks, dtype=torch.int64)

    @property
    def is_owner(self) -> Tensor:
        """1 for the owner, else 0."""
        one = torch.zeros(self.ranks, dtype=torch.int64)
        one.view(-1)[self.owner or 0] = 1
        return one

    @property
    def updated(self) -> Tensor:
        """How many of its numbers each rank updates by itself, if it has no view."""
        return self.on_ranks if self.rows is None else torch.tensor(self.rows)[:, None]

    @property
    def matrices(self) -> tuple[int, ...]:
        """How many whole matrices each shard has, if it has whole ones."""
        return tuple(held * self.stack[0] // self.numel for held in self.held)

    @property
    def norms(self) -> int:
        """Norms that shards of each matrix tell each other: two, and where roots grow old one for each of its rows, or
        else one more where a part of its state is cut.
        """
        inner = self.structure.inner if isinstance(self.structure, Packed) else self.structure
        if isinstance(inner, OneSided) and self.interval > 1:
            return 2 + self.stack[1 if inner.left(*self.stack[1:]) else 2]
        return 3 if self.state["sharded"] else 2

    def nothing(self) -> Tensor:
        """The flow of a step in which nothing is sent."""
        return torch.zeros(2, *self.ranks, dtype=torch.int64)

    def to_owner(self, each: Tensor) -> Tensor:
        """The flow where the shards of one copy send the owner their bytes: its own copy if it holds any, else the
        first.
        """
        copy, shard = divmod(self.owner or 0, len(self.held))
        source, flow = copy if each[copy, shard] else 0, self.nothing()
        flow[0, source] = each[source]
        flow[0, copy, shard] = 0
        flow[1, copy, shard] = flow[0].sum()
        return flow

    def from_owner(self, each: Tensor | int) -> Tensor:
        """The flow where the owner sends every other rank its bytes."""
        received = each * (1 - self.is_owner)
        return torch.stack([self.is_owner * received.sum(), received])

    def between_shards(self, each: int) -> Tensor:
        """The flow where every rank sends these bytes to all other shards of its copy."""
        return torch.full((2, *self.ranks), each * (len(self.held) - 1))

    def all_reduced(self, each: int) -> Tensor:
        """The flow where the shards of a copy add up these bytes of each, by a ring."""
        shards = len(self.held)
        return torch.full((2, *self.ranks), 2 * each * (shards - 1) // shards)

    def on_mesh(self, counts: Tensor, mesh: Mesh) -> Tensor:
        """Counts ``(..., copies, shards)`` as ``(..., replicate, fsdp, tp)``: where tensor parallel does not cut the
        part, several groups of ranks step it alike.
        """
        counts = counts.unflatten(-1, (mesh.fsdp, self.across))
        return counts.expand(*counts.shape[:-3], *mesh.shape)


def on_shards(part: PlannedPart, mesh: Mesh) -> PlannedPart:
    """A part as `torch` shards its parameter over a mesh, with the kind of placement that the optimizer finds there."""
    across = mesh.tp if part.tp_dim is not None else 1
    placed = replace(part, copies=mesh.replicate, held=(part.numel,) * mesh.fsdp * across, across=across)
    if not part.shape or mesh.ranks == 1:
        return placed
    # Import it only now: it imports all of DTensor.
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if mesh.is_whole and part.view is None and mesh.zero1:
        boxes = rank_regions(part.shape, (mesh.ranks,), (Shard(0),))
        return replace(placed, kind="elementwise", rows=tuple(math.prod(sizes(box)) for box in boxes))
    if mesh.is_whole:
        return placed if part.view is None else replace(placed, kind="owner_computes" if mesh.zero1 else "root_sharing")
    # Tensor parallel cuts first, then `fully_shard` cuts the rows of each piece.
    rows = _StridedShard(0, split_factor=across) if part.tp_dim == 0 and across > 1 else Shard(0)
    cuts = ((mesh.fsdp, rows), (across, Shard(part.tp_dim or 0)))
    boxes = rank_regions(part.shape, (mesh.fsdp, across), tuple(placement for _, placement in cuts))
    if len(boxes) == 1:
        return placed
    several = [(size, placement) for size, placement in cuts if size > 1]
    kind = kind_of_shards(part.shape, part.view, part.structure, several, boxes)
    return replace(placed, kind=kind, held=_held(boxes, part_regions(part.view, part.shape)[part.index]))


@lru_cache(maxsize=4096)
def _held(boxes: tuple[Region, ...], region: tuple[Region, ...]) -> tuple[int, ...]:
    """How many entries of a region are in each box."""
    shared = ([overlap(box, piece) for piece in region] for box in boxes)
    return tuple(sum(math.prod(sizes(both)) for both in some if both is not None) for some in shared)
