"""What every rank of a mesh holds, keeps and sends for each part of a model, by the optimizer's own planner.

Which entries a rank holds, what it owns and when a root is due is asked of the functions of `asgo.distributed` that the
optimizer asks, with shapes alone: no process group, no memory. Arrays have a number for each rank, ``(replicate, fsdp,
tp)``; those of traffic have two, bytes sent and bytes received.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from asgo.distributed.ownership import WorkItem, owner_cost, owners
from asgo.distributed.placement import (
    Kind,
    Region,
    most_shards,
    overlap,
    part_regions,
    rank_regions,
    sent,
    sizes,
    whole_slices,
)
from asgo.lab.plan.mesh import Mesh
from asgo.optimizer.param_groups import names_of, with_views
from asgo.optimizer.refresh_schedule import balanced_phases
from asgo.optimizer.step import StructuredOptimizer
from asgo.state_keys import part_key
from asgo.structures import OneSided, Packed, Structure
from asgo.views import View

Ranks: TypeAlias = NDArray[Any]
STATE = 4
"""Bytes of a number of the state, of roots, and of updates on their way."""
FAILURE_COUNT = 8
"""Bytes of the count of failures that goes with each root."""
KEPT = ("params", "gradients", "momentum", "statistics", "roots", "adamw", "rest")
"""What `memory` tells apart."""


@dataclass(frozen=True)
class Part:
    """One stack of matrices of a parameter, or with `view` None a parameter on AdamW."""

    name: str  # of the parameter
    shape: tuple[int, ...]  # of the parameter
    view: View | None  # how it is read
    structure: Structure | None  # how its statistic is kept; None without a view
    index: int  # its number among the parts of a split
    stack: tuple[int, int, int]  # ``(b, m, n)``
    tp_dim: int | None  # the axis that tensor parallel cuts; None: every rank has all of it
    sizes: Mapping[str, int]  # bytes of its state: momentum, statistics, roots, sharded, failures; or adamw
    counter: int  # bytes of what every rank has for the parameter: its count of steps

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.stack)

    def norms(self, interval: int) -> int:
        """Norms that shards of a matrix tell each other: two, with old roots one of each row, else of the update."""
        structure = self.structure.inner if isinstance(self.structure, Packed) else self.structure
        if isinstance(structure, OneSided) and interval > 1:
            return 2 + self.stack[1 if structure.left(*self.stack[1:]) else 2]
        return 3 if self.sizes["sharded"] else 2


def read_parts(optimizer: StructuredOptimizer, tp_plan: Mapping[str, str]) -> list[Part]:
    """Every part of every parameter of an optimizer, by preference on the meta device, in its order."""
    found: list[Part] = []
    names = names_of(optimizer)
    for group in optimizer.param_groups:
        structure = optimizer.structure(group)
        for param, view in with_views(group):
            state, shape, name = optimizer.state[param], tuple(param.shape), names[param]
            tp_dim = tensor_parallel_dim(name, param, tp_plan)
            if view is None:
                moments = sum(tensor.nbytes for key, tensor in state.items() if key.startswith("exp_avg"))
                counter = sum(tensor.nbytes for tensor in state.values()) - moments
                found.append(
                    Part(name, shape, None, None, 0, (1, 1, param.numel()), tp_dim, {"adamw": moments}, counter)
                )
            for i, stack in enumerate(() if view is None else view.shapes(param.shape)):
                counter = state["step"].nbytes if i == 0 else 0
                found.append(Part(name, shape, view, structure, i, stack, tp_dim, _sizes(structure, state, i), counter))
    return found


def _sizes(structure: Structure, state: Mapping[str, Tensor], index: int) -> dict[str, int]:
    momentum = state[part_key("exp_avg", index)]
    found = {"momentum": momentum.nbytes, "failures": state[part_key("failures", index)].nbytes}
    found |= {"statistics": 0, "roots": 0, "sharded": 0}
    for key in structure.init(momentum):
        kind = "roots" if key in structure.root_keys else "sharded" if key in structure.sharded_keys else "statistics"
        found[kind] += state[part_key(key, index)].nbytes
    return found


def tensor_parallel_dim(name: str, param: Tensor, plan: Mapping[str, str]) -> int | None:
    """The axis along which a plan of transformers, as ``{"layers.*.mlp.up_proj": "colwise"}``, cuts a parameter."""
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
    kind = plan.get(pattern) or plan.get(pattern.rpartition(".")[0]) or ""
    if kind == "embedding_rowwise" or ("colwise" in kind and param.ndim == 1):
        return 0
    if "colwise" in kind:
        return param.ndim - 2
    return param.ndim - 1 if "rowwise" in kind and param.ndim > 1 else None


@dataclass(frozen=True)
class Placed:
    """A part on a mesh."""

    part: Part  # which
    mesh: Mesh  # where
    kind: Kind  # as of `asgo.distributed.placement.Placement`
    held: tuple[int, ...]  # how many of its numbers each rank of a shard group holds, ``(fsdp, across)``
    across: int  # ranks of tensor parallel that cut it: 1 or the mesh's ``tp``
    owner: int | None = None  # its place among ``replicate x fsdp x across`` ranks; None: there is none
    phase: int = 0  # the step of an interval at which its roots are refreshed
    interval: int = 1  # steps between refreshes

    @property
    def team(self) -> tuple[int, int, int]:
        """Ranks that step it together; with tensor parallel that does not cut it there are several such teams."""
        return self.mesh.replicate, self.mesh.fsdp, self.across

    @property
    def has_owner(self) -> bool:
        """Whether one rank keeps the part's state, or refreshes its roots for all."""
        return self.kind == "owner_computes" or (
            self.kind in ("root_sharing", "partial_sums") and bool(self.part.sizes["roots"])
        )

    @property
    def on_ranks(self) -> Ranks:
        """How many of its numbers each rank of the team holds."""
        return np.broadcast_to(np.array(self.held).reshape(1, self.mesh.fsdp, self.across), self.team)

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

    @property
    def updated(self) -> Ranks:
        """How many numbers of a parameter on AdamW each rank of the team updates and keeps the moments of."""
        if not (self.kind == "elementwise" and self.mesh.is_whole):
            return self.on_ranks
        (boxes, width) = rank_regions((self.part.shape[0],), (self.mesh.ranks,), (Shard(0),)), self.part.shape[1:]
        return np.array([math.prod((*sizes(box), *width)) for box in boxes]).reshape(self.team)


def place(parts: Sequence[Part], mesh: Mesh, interval: int) -> list[Placed]:
    """The parts on a mesh, with the owners and refresh phases that the optimizer chooses."""
    found = [_place(part, mesh) for part in parts]
    stacks = [(i, s, part.stack) for i, part in enumerate(parts) if (s := part.structure) is not None]
    phases = balanced_phases([stack[0] * s.root_flops(*stack[1:]) for _, s, stack in stacks], interval)
    units: dict[int, WorkItem] = {}
    for (i, structure, stack), phase in zip(stacks, phases, strict=True):
        found[i] = placed = replace(found[i], phase=phase, interval=interval)
        if placed.has_owner:
            price = owner_cost(structure, placed.kind, stack)
            units[i] = WorkItem(price, tuple(range(math.prod(placed.team))), (interval, phase))
    for i, owner in zip(units, owners(list(units.values())), strict=True):
        found[i] = replace(found[i], owner=owner)
    return found


def _place(part: Part, mesh: Mesh) -> Placed:
    across = mesh.tp if part.tp_dim is not None else 1
    if mesh.is_whole or not part.shape:
        if part.view is None:
            kind = "elementwise" if mesh.zero1 and part.shape else "local"
        else:
            kind = "local" if mesh.ranks == 1 else "owner_computes" if mesh.zero1 else "root_sharing"
        return Placed(part, mesh, kind, (part.numel,) * mesh.fsdp * across, across)
    # Tensor parallel cuts first, then `fully_shard` cuts the rows of each piece.
    rows = _StridedShard(0, split_factor=across) if part.tp_dim == 0 and across > 1 else Shard(0)
    boxes = rank_regions(part.shape, (mesh.fsdp, across), (rows, Shard(part.tp_dim or 0)))
    whole = tuple((0, length) for length in part.shape)
    region = (whole,) if part.view is None else part_regions(part.view, part.shape)[part.index]
    return Placed(part, mesh, _kind_of_shards(part, mesh, across, boxes), _held(boxes, region), across)


def _kind_of_shards(part: Part, mesh: Mesh, across: int, boxes: tuple[Region, ...]) -> Kind:
    if len(boxes) == 1:
        return "local"
    if part.view is None or part.structure is None:
        return "elementwise"
    dim = 0 if mesh.fsdp > 1 else part.tp_dim
    if min(mesh.fsdp, across) > 1 or dim is None:
        return "owner_computes"
    if whole_slices(part.view, part.shape, dim, boxes, 0) is not None:
        return "whole_slices"
    return "partial_sums" if len(boxes) <= most_shards(part.view, part.shape, dim, part.structure) else "owner_computes"


@lru_cache(maxsize=4096)
def _held(boxes: tuple[Region, ...], region: tuple[Region, ...]) -> tuple[int, ...]:
    return tuple(sum(_numel(overlap(box, piece)) for piece in region) for box in boxes)


def _numel(box: Region | None) -> int:
    return 0 if box is None else math.prod(sizes(box))


def memory(placed: Sequence[Placed], mesh: Mesh, itemsize: int) -> dict[str, Ranks]:
    """Bytes that every rank keeps, by the names of `KEPT`; activations and temporaries are not among them."""
    found = {name: np.zeros(mesh.shape) for name in KEPT}
    for p in placed:
        for name in ("params", "gradients"):
            found[name] += p.on_ranks * itemsize
        found["rest"] += p.part.counter
        where = _keepers(p)
        for name, size in p.part.sizes.items():
            found[name if name in KEPT else "rest"] += where[name] * size
    return {name: ranks.round().astype(np.int64) for name, ranks in found.items()}


def _keepers(p: Placed) -> dict[str, Ranks]:
    """The share of each kind of state that the ranks of the team keep."""
    if p.part.structure is None:
        return {"adamw": p.updated / max(p.part.numel, 1)}
    everywhere = np.ones(p.team)
    share = everywhere if p.kind in ("local", "root_sharing") else p.on_ranks / p.part.numel
    share = p.is_owner if p.kind == "owner_computes" else share
    statistics = roots = share
    if p.kind == "partial_sums":
        statistics, roots = (p.is_owner if p.has_owner else everywhere), everywhere
    return {"momentum": share, "sharded": share, "statistics": statistics, "failures": statistics, "roots": roots}


# ---- what is sent --------------------------------------------------------------------------------------------------


def traffic(placed: Sequence[Placed], mesh: Mesh, interval: int, itemsize: int) -> list[Ranks]:
    """Bytes that every rank sends and receives in each step of an interval, ``(2, replicate, fsdp, tp)``.

    Not in it is what gradients cost on the way to their ranks, which is the same for every optimizer.
    """
    flows = [sum((sent_always(p, itemsize) for p in placed), np.zeros((2, *mesh.shape), np.int64))] * interval
    for p in placed:
        flows[p.phase] = flows[p.phase] + sent_roots(p)
    return flows


def sent_roots(p: Placed) -> Ranks:
    """The owner of a part sends its refreshed roots to all others that apply them.

    ``b (k^2 itemsize + 8)`` bytes to each of ``N - 1`` ranks; where statistics are summed over shards, without the
    count of failures. Packed, ``k (k + 1) / 2`` in place of ``k^2``.
    """
    size = p.part.sizes["roots"] if p.kind in ("root_sharing", "partial_sums") else 0
    return _broadcast(
        p, np.full(p.team, size + p.part.stack[0] * FAILURE_COUNT * (p.kind == "root_sharing" and size > 0))
    )


def sent_always(p: Placed, itemsize: int) -> Ranks:
    """What every step sends for a part, whichever roots are refreshed."""
    part, others = p.part, len(p.held) - 1
    if p.kind == "owner_computes":
        return _to_owner(p, p.on_ranks * itemsize) + _broadcast(p, p.on_ranks * STATE)
    if p.kind == "whole_slices":
        return np.full((2, *p.mesh.shape), max(p.matrices) * STATE * others)
    if p.kind == "partial_sums" and part.structure is not None:
        b, m, n = part.stack
        statistics = np.full(p.team, b * sent(part.structure, m, n)[0] * STATE)
        return _to_owner(p, statistics) + b * part.norms(p.interval) * STATE * others
    if p.kind == "elementwise" and p.mesh.is_whole:
        own = p.updated * itemsize
        return np.stack([own * (p.mesh.ranks - 1), own.sum() - own])
    return np.zeros((2, *p.mesh.shape), np.int64)


def _to_owner(p: Placed, own: Ranks) -> Ranks:
    """The ranks of the owner's replica send theirs to it; those of the first replica if the owner holds nothing."""
    owner = np.unravel_index(p.owner or 0, p.team)
    replica = owner[0] if p.on_ranks[owner] or p.kind == "partial_sums" else 0
    both = np.zeros((2, *p.team), np.int64)
    both[0, replica] = own[replica]
    both[(slice(None), *owner)] = 0, both[0].sum() - both[0][owner]
    return _everywhere(p, both)


def _broadcast(p: Placed, each: Ranks) -> Ranks:
    """The owner sends every other rank of the team its own number of bytes."""
    received = each * (1 - p.is_owner)
    return _everywhere(p, np.stack([p.is_owner * received.sum(), received]))


def _everywhere(p: Placed, both: Ranks) -> Ranks:
    """The same in every team."""
    return np.broadcast_to(both, (2, *p.mesh.shape))


def gradient_bytes(numbers: int, mesh: Mesh, itemsize: int) -> float:
    """What each rank sends for the gradients, whatever the optimizer: a ring's all-reduce or reduce-scatter.

    ``2 (N - 1)/N`` of the bytes for copies, ``(F - 1)/F`` for shards and then the copies of a shard.
    """
    local = numbers * itemsize / mesh.tp
    scattered = local * (mesh.fsdp - 1) / mesh.fsdp
    return scattered + 2 * local / mesh.fsdp * (mesh.replicate - 1) / mesh.replicate
