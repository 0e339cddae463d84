"""Which ranks of a mesh hold a part, who keeps its state and what is sent for it, by the optimizer's own planner.

Arrays have a number for each rank, ``(replicate, fsdp, tp)``. The rules are those of `asgo.distributed`; here they are
asked for all ranks at once, with no process group and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from asgo.distributed.ownership import Unit, cost, owners, turns
from asgo.distributed.placement import Box, Kind, _aligned, _boxes, overlap, part_boxes, sizes
from asgo.distributed.summing import most_shards
from asgo.lab.plan.mesh import Mesh
from asgo.lab.plan.parts import Part

Ranks: TypeAlias = NDArray[np.int64]

HAVE_ROOT_OWNERS = ("shared", "summed")
"""Kinds whose roots are refreshed by one rank."""

FAILURE_COUNT = 8
"""Bytes of the count of failures that goes with each root."""


@dataclass(frozen=True)
class Placed:
    """A part on a mesh.

    Args:
        part: which.
        mesh: where.
        kind: as of `asgo.distributed.placement.Placement`.
        held: how many of its numbers each rank of a shard group holds, ``(fsdp, across)``.
        across: ranks of tensor parallel that cut it: 1 or the mesh's ``tp``.
        owner: its place among ``replicate x fsdp x across`` ranks; None: there is none.
        phase: the step of an interval at which its roots are refreshed.
        interval: steps between refreshes.
    """

    part: Part
    mesh: Mesh
    kind: Kind
    held: tuple[int, ...]
    across: int
    owner: int | None = None
    phase: int = 0
    interval: int = 1

    @property
    def team(self) -> tuple[int, int, int]:
        """Ranks that step it together; with tensor parallel that does not cut it there are several such teams."""
        return self.mesh.replicate, self.mesh.fsdp, self.across

    @property
    def has_owner(self) -> bool:
        """Whether one rank keeps the part's state, or refreshes its roots for all."""
        return self.kind == "owned" or (self.kind in HAVE_ROOT_OWNERS and bool(self.part.root_keys))

    @property
    def on_ranks(self) -> Ranks:
        """How many of its numbers each rank of the team holds."""
        one = np.array(self.held, dtype=np.int64).reshape(1, self.mesh.fsdp, self.across)
        return np.broadcast_to(one, self.team)

    @property
    def is_owner(self) -> Ranks:
        """1 for the owner, else 0."""
        one = np.zeros(self.team, dtype=np.int64)
        one.flat[self.owner or 0] = 1
        return one

    @property
    def matrices(self) -> tuple[int, ...]:
        """How many whole matrices each rank of a shard group holds, if it holds whole ones."""
        return tuple(held * self.part.stack[0] // self.part.numel for held in self.held)

    def everywhere(self, values: NDArray[Any]) -> NDArray[Any]:
        """The same numbers in every team."""
        return np.broadcast_to(values, self.mesh.shape)


def place(parts: Sequence[Part], mesh: Mesh, interval: int) -> list[Placed]:
    """The parts on a mesh, with the owners and refresh phases that the optimizer chooses.

    Args:
        parts: of all parameters.
        mesh: the ranks.
        interval: steps between refreshes of a root.
    """
    found = [_place(part, mesh) for part in parts]
    stacks = [i for i, placed in enumerate(found) if placed.part.structure is not None]
    costs = [b * s.cost(m, n) for i in stacks if (s := parts[i].structure) for b, m, n in [parts[i].stack]]
    for i, phase in zip(stacks, turns(costs, interval), strict=True):
        found[i] = replace(found[i], phase=phase, interval=interval)
    owned = [i for i in stacks if found[i].has_owner]
    units = [_unit(found[i], interval) for i in owned]
    for i, owner in zip(owned, owners(units), strict=True):
        found[i] = replace(found[i], owner=owner)
    return found


def _unit(placed: Placed, interval: int) -> Unit:
    structure = placed.part.structure
    price = 0.0 if structure is None else cost(structure, placed.kind, placed.part.stack)
    return Unit(price, tuple(range(math.prod(placed.team))), (interval, placed.phase))


def _place(part: Part, mesh: Mesh) -> Placed:
    across = mesh.tp if part.tp_dim is not None else 1
    if mesh.is_whole or not part.shape:
        kind = _kind_of_copies(part, mesh)
        return Placed(part, mesh, kind, (part.numel,) * mesh.fsdp * across, across)
    boxes = _boxes(part.shape, *_cuts(mesh.fsdp, across, part.tp_dim))
    return Placed(part, mesh, _kind_of_shards(part, mesh, across, boxes), _held(boxes, _region(part)), across)


def _cuts(fsdp: int, across: int, tp_dim: int | None) -> tuple[tuple[int, int], tuple[TorchPlacement, TorchPlacement]]:
    """Tensor parallel cuts first, then `fully_shard` cuts the rows of each piece."""
    rows = _StridedShard(0, split_factor=across) if tp_dim == 0 and across > 1 else Shard(0)
    return (fsdp, across), (rows, Shard(tp_dim or 0))


def _kind_of_copies(part: Part, mesh: Mesh) -> Kind:
    if part.view is None:
        return "entries" if mesh.zero1 and part.shape else "alone"
    return "alone" if mesh.ranks == 1 else "owned" if mesh.zero1 else "shared"


def _kind_of_shards(part: Part, mesh: Mesh, across: int, boxes: tuple[Box, ...]) -> Kind:
    if len(boxes) == 1:
        return "alone"
    if part.view is None or part.structure is None:
        return "entries"
    dim = 0 if mesh.fsdp > 1 else part.tp_dim
    if min(mesh.fsdp, across) > 1 or dim is None:
        return "owned"
    if _aligned(part.view, part.shape, dim, boxes, 0) is not None:
        return "aligned"
    return "summed" if len(boxes) <= most_shards(part.view, part.shape, dim, part.structure) else "owned"


def _region(part: Part) -> Box:
    """What of the parameter belongs to the part."""
    return (
        tuple((0, length) for length in part.shape)
        if part.view is None
        else part_boxes(part.view, part.shape)[part.index]
    )


@lru_cache(maxsize=4096)
def _held(boxes: tuple[Box, ...], region: Box) -> tuple[int, ...]:
    both = (overlap(box, region) for box in boxes)
    return tuple(0 if found is None else math.prod(sizes(found)) for found in both)


# ---- memory --------------------------------------------------------------------------------------

MEMORY = ("params", "gradients", "momentum", "statistics", "roots", "adamw", "rest")


def memory(placed: Sequence[Placed], mesh: Mesh, itemsize: int) -> dict[str, Ranks]:
    """Bytes that every rank keeps, by the names of `MEMORY`; activations and temporaries are not among them.

    Args:
        placed: all parts.
        mesh: the ranks.
        itemsize: bytes of a number of a parameter and of its gradient.
    """
    found = {name: np.zeros(mesh.shape) for name in MEMORY}
    for p in placed:
        for name in ("params", "gradients"):
            found[name] += p.everywhere(p.on_ranks) * itemsize
        found["rest"] += p.part.counter
        if p.part.structure is None:
            found["adamw"] += p.everywhere(updated_entries(p)) / max(p.part.numel, 1) * sum(p.part.sizes.values())
            continue
        share = _share(p)
        kept = (
            p.is_owner if p.kind == "summed" and p.part.root_keys else np.ones(p.team) if p.kind == "summed" else share
        )
        roots = np.ones(p.team) if p.kind == "summed" else share
        found["momentum"] += p.everywhere(share) * p.part.sizes["exp_avg"]
        found["statistics"] += p.everywhere(kept) * p.part.bytes_of(p.part.statistic_keys)
        found["roots"] += p.everywhere(roots) * p.part.bytes_of(p.part.root_keys)
        found["rest"] += p.everywhere(share) * p.part.bytes_of(p.part.sharded_keys)
        found["rest"] += p.everywhere(kept) * p.part.sizes["failures"]
    return {name: ranks.round().astype(np.int64) for name, ranks in found.items()}


def _share(placed: Placed) -> NDArray[np.float64]:
    """The share of a part's momentum that each rank of its team keeps."""
    if placed.kind in ("alone", "shared"):
        return np.ones(placed.team)
    if placed.kind == "owned":
        return placed.is_owner.astype(np.float64)
    return placed.on_ranks / placed.part.numel


def updated_entries(placed: Placed) -> Ranks:
    """How many numbers of a parameter on AdamW each rank of the team updates and keeps the moments of."""
    if not (placed.kind == "entries" and placed.mesh.is_whole):
        return placed.on_ranks
    (boxes, width) = _boxes((placed.part.shape[0],), (placed.mesh.ranks,), (Shard(0),)), placed.part.shape[1:]
    return np.array([math.prod((*sizes(box), *width)) for box in boxes], dtype=np.int64).reshape(placed.team)


# ---- links ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that every rank sends to others and receives from others in one step, once each."""

    sent: Ranks
    received: Ranks

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.received + other.received)


def step_traffic(placed: Sequence[Placed], mesh: Mesh, phase: int, itemsize: int) -> Traffic:
    """What the optimizer sends in the step of an interval at which the roots of that phase are refreshed.

    What gradients cost on the way to their ranks is the same for every optimizer, and not in it.

    Args:
        placed: all parts.
        mesh: the ranks.
        phase: the step of the interval.
        itemsize: bytes of a number of a parameter and of its gradient.
    """
    found = fixed_traffic(placed, mesh, itemsize)
    return sum((root_traffic(p) for p in placed if p.phase == phase), found)


def fixed_traffic(placed: Sequence[Placed], mesh: Mesh, itemsize: int) -> Traffic:
    """What every step sends, whichever roots are refreshed; arguments as of `step_traffic`."""
    nothing = Traffic(np.zeros(mesh.shape, np.int64), np.zeros(mesh.shape, np.int64))
    return sum((_sent_always(p, itemsize) for p in placed if p.kind in SENDERS), nothing)


SENDERS = ("owned", "aligned", "summed", "entries")
STATE = 4
"""Bytes of a number of the state, of roots, and of updates on their way."""


def root_traffic(placed: Placed) -> Traffic:
    """The owner of a part sends its refreshed roots to all others that apply them.

    ``b (k^2 itemsize + 8)`` bytes to each of ``N - 1`` ranks; where statistics are summed over shards, without the
    count of failures. Packed, ``k (k + 1) / 2`` in place of ``k^2``.
    """
    size = placed.part.bytes_of(placed.part.root_keys) if placed.kind in HAVE_ROOT_OWNERS else 0
    if placed.kind == "shared" and size:
        size += placed.part.stack[0] * FAILURE_COUNT
    return _broadcast(placed, np.full(placed.team, size, dtype=np.int64))


def _sent_always(placed: Placed, itemsize: int) -> Traffic:
    part, others = placed.part, len(placed.held) - 1
    if placed.kind == "owned":
        return _to_owner(placed, placed.on_ranks * itemsize) + _broadcast(placed, placed.on_ranks * STATE)
    if placed.kind == "aligned":
        return _all_gathered(placed, max(placed.matrices) * STATE * others)
    if placed.kind == "summed":
        norms = part.stack[0] * (2 + part.lengths(placed.interval))
        statistics = np.full(placed.team, part.sent_statistic * STATE, dtype=np.int64)
        return _to_owner(placed, statistics) + _all_gathered(placed, norms * STATE * others)
    own = updated_entries(placed) * itemsize if placed.mesh.is_whole else np.zeros(placed.team, np.int64)
    return Traffic(placed.everywhere(own * (placed.mesh.ranks - 1)), placed.everywhere(own.sum() - own))


def _to_owner(placed: Placed, own: Ranks) -> Traffic:
    """The ranks of the owner's replica send theirs to it; those of the first replica if the owner holds nothing."""
    owner = np.unravel_index(placed.owner or 0, placed.team)
    replica = owner[0] if placed.on_ranks[owner] or placed.kind == "summed" else 0
    sent, received = np.zeros(placed.team, np.int64), np.zeros(placed.team, np.int64)
    sent[replica] = own[replica]
    sent[owner] = 0
    received[owner] = sent.sum()
    return Traffic(placed.everywhere(sent), placed.everywhere(received))


def _broadcast(placed: Placed, each: Ranks) -> Traffic:
    """The owner sends every other rank of the team its own number of bytes."""
    received = each * (1 - placed.is_owner)
    return Traffic(placed.everywhere(placed.is_owner * received.sum()), placed.everywhere(received))


def _all_gathered(placed: Placed, size: int) -> Traffic:
    """Every rank sends and receives as much."""
    every = np.full(placed.mesh.shape, size, dtype=np.int64)
    return Traffic(every, every)


def gradient_bytes(numbers: int, mesh: Mesh, itemsize: int) -> float:
    """What each rank sends for the gradients, whatever the optimizer: a ring's all-reduce or reduce-scatter.

    ``2 (N - 1)/N`` of the bytes for copies, ``(F - 1)/F`` for shards and then the copies of a shard.

    Args:
        numbers: of the whole model.
        mesh: the ranks.
        itemsize: bytes of a number of a gradient.
    """
    local = numbers * itemsize / mesh.tp
    scattered = local * (mesh.fsdp - 1) / mesh.fsdp
    return scattered + 2 * local / mesh.fsdp * (mesh.replicate - 1) / mesh.replicate
