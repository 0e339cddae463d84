"""Which ranks of a mesh hold a matrix, which of them works on it, and at which steps its roots are due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from asgo.distributed.work import ROOT_PRODUCTS, turns
from asgo.lab.plan.mesh import Mesh
from asgo.lab.plan.parts import Part
from asgo.views import axes_of

Range: TypeAlias = tuple[int, int]
Box: TypeAlias = tuple[Range, Range]
"""Ranges of a parameter's first axis and of one other, see `_second`; the remaining axes are whole."""

Kind: TypeAlias = Literal["alone", "shared", "owned", "aligned", "summed", "rows"]
Stagger: TypeAlias = Literal["model", "rank"]
HAVE_OWNERS = ("shared", "owned", "summed")
"""Kinds whose roots are refreshed by one rank."""
Grid: TypeAlias = NDArray[np.float64]
"""One number for each rank, ``(replicate, fsdp, tp)``."""


@dataclass(frozen=True)
class Placed:
    """A part on a mesh.

    Args:
        part: which.
        kind: ``alone``: every rank holds it and does all of what it holds. ``shared``: as alone, but ranks divide the
            roots. ``owned``: one rank keeps the state and computes the update. ``aligned``: every rank holds whole
            matrices and does them. ``summed``: every rank holds and does some rows or columns of each matrix, and one
            rank adds up their statistics and keeps those. ``rows``: of AdamW: every rank holds it whole and does a run
            of its rows.
        held: how many of its numbers each rank of a shard group holds, ``fsdp`` by `across` in the order of rows.
        across: ranks of tensor parallel that cut it: 1 or the mesh's ``tp``.
        owner: of roots or of all, as a place among ``sharing x fsdp x across``; None: there is none.
        turn: the step of an interval at which its roots are due.
    """

    part: Part
    kind: Kind
    held: tuple[int, ...]
    across: int
    owner: int | None = None
    turn: int = 0


def place(parts: Sequence[Part], mesh: Mesh, interval: int, stagger: Stagger = "model") -> list[Placed]:
    """The parts on a mesh, with the owners and turns that the optimizer chooses.

    Args:
        parts: of all parameters.
        mesh: the ranks.
        interval: steps between refreshes of a root.
        stagger: ``model``: first turns that balance the steps of the whole model, then for each part the owner that
            has least to do on that turn. ``rank``: first owners of equal work, then each rank spreads its own roots,
            so that all ranks refresh at the same steps.
    """
    found = [_place(part, mesh) for part in parts]
    stacks = [i for i, placed in enumerate(found) if placed.part.view is not None]
    if stagger == "model":
        for i, turn in zip(stacks, turns([parts[i].cost for i in stacks], interval), strict=True):
            found[i] = replace(found[i], turn=turn)
    for across in {placed.across for placed in found}:
        mine = [i for i in stacks if found[i].kind in HAVE_OWNERS and found[i].across == across]
        for i, owner in zip(mine, _owners([found[i] for i in mine], mesh.sharing * mesh.fsdp * across), strict=True):
            found[i] = replace(found[i], owner=owner)
    if stagger == "rank":
        for key in {(found[i].across, found[i].owner) for i in stacks}:
            own = [i for i in stacks if (found[i].across, found[i].owner) == key]
            for i, turn in zip(own, turns([parts[i].cost for i in own], interval), strict=True):
                found[i] = replace(found[i], turn=turn)
    return found


def _owners(units: Sequence[Placed], ranks: int) -> list[int]:
    """The dearest first, each to the rank that has least to do on its turn, then in all."""
    whole, on_turn, chosen = np.zeros(ranks), {unit.turn: np.zeros(ranks) for unit in units}, [0] * len(units)
    costs = [_cost(unit) for unit in units]
    for i in sorted(range(len(units)), key=lambda i: -costs[i]):
        now = on_turn[units[i].turn]
        chosen[i] = int(np.where(now == now.min(), whole, np.inf).argmin())
        now[chosen[i]] += costs[i]
        whole[chosen[i]] += costs[i]
    return chosen


def _cost(unit: Placed) -> float:
    """What an owner does: the roots, and all the rest where the state is the owner's too."""
    part = unit.part
    if unit.kind == "owned":
        return ROOT_PRODUCTS * part.cost + part.work + part.numel
    return part.cost if unit.kind == "shared" else ROOT_PRODUCTS * part.cost


@lru_cache(maxsize=65_536)
def _place(part: Part, mesh: Mesh) -> Placed:
    across = mesh.tp if part.tp_dim is not None else 1
    cuts = _boxes(_sides(part), mesh.fsdp, across, part.tp_dim == 0)
    rest = math.prod(part.shape) // max(1, math.prod(_sides(part)))
    return Placed(part, _kind(part, mesh, across, cuts), _held(cuts, _region(part), rest), across)


def _kind(part: Part, mesh: Mesh, across: int, cuts: Sequence[Box]) -> Kind:
    if part.view is None:
        return "rows" if mesh.whole and mesh.zero1 and part.shape else "alone"
    if mesh.whole and mesh.ranks > 1:
        return "owned" if mesh.zero1 else "shared"
    return "alone" if len(cuts) == 1 else _kind_of_shards(part, mesh, across, cuts)


def _kind_of_shards(part: Part, mesh: Mesh, across: int, cuts: Sequence[Box]) -> Kind:
    dim = 0 if mesh.fsdp > 1 else part.tp_dim
    if min(mesh.fsdp, across) > 1 or dim is None:
        return "owned"
    if _is_aligned(part, dim, cuts):
        return "aligned"
    return "summed" if len(cuts) <= part.summed[dim] else "owned"


def _is_aligned(part: Part, dim: int, cuts: Sequence[Box]) -> bool:
    """Whether every rank holds one or more whole matrices of the stack; a split parameter never counts as that."""
    view = part.view
    if view is None or view.split is not None:
        return False
    source, target = map(axes_of, view.pattern_of(0).split("->"))
    if len(target[0]) != 1 or not target[0][0].isidentifier() or source[dim][:1] != target[0]:
        return False
    each = part.shape[dim] // part.stack[0]
    return all(lo % each == 0 and hi % each == 0 and lo < hi for lo, hi in (box[min(dim, 1)] for box in cuts))


def _region(part: Part) -> Box:
    """What of the parameter belongs to the part."""
    rows, columns = _sides(part)
    if part.view is None or part.view.split is None:
        return (0, rows), (0, columns)
    start = sum(part.view.split[: part.part])
    own = (start, start + part.view.split[part.part])
    return (own, (0, columns)) if part.view.split_dim % len(part.shape) == 0 else ((0, rows), own)


def _second(part: Part) -> int:
    """The axis beside the first one along which something is cut: by tensor parallel, else by a split."""
    return part.tp_dim or 1


def _sides(part: Part) -> tuple[int, int]:
    shape, second = part.shape, _second(part)
    return shape[0] if shape else 1, shape[second] if len(shape) > second else 1


@lru_cache(maxsize=4096)
def _boxes(sides: tuple[int, int], fsdp: int, across: int, tp_rows: bool) -> tuple[Box, ...]:
    """What each rank of a shard group holds: tensor parallel cuts first, then the rows of each piece are cut."""
    rows, columns = sides
    found: list[Box] = []
    for f in range(fsdp):
        for t in range(across):
            lo, hi = _chunk(rows, across)[t] if tp_rows else (0, rows)
            first, last = _chunk(hi - lo, fsdp)[f]
            found.append(((lo + first, lo + last), (0, columns) if tp_rows else _chunk(columns, across)[t]))
    return tuple(found)


@lru_cache(maxsize=4096)
def _chunk(length: int, count: int) -> list[Range]:
    """Runs of equal length, as `torch.chunk` cuts: the last ones may be shorter or empty."""
    size = -(-length // count)
    return [(min(i * size, length), min((i + 1) * size, length)) for i in range(count)]


@lru_cache(maxsize=4096)
def _held(cuts: tuple[Box, ...], whole: Box, rest: int) -> tuple[int, ...]:
    """How many numbers of the part each rank holds; `rest` for each pair of places on both axes."""
    return tuple(_overlap(box, whole) * rest for box in cuts)


def _overlap(a: Box, b: Box) -> int:
    return math.prod(max(0, min(a[i][1], b[i][1]) - max(a[i][0], b[i][0])) for i in (0, 1))


def matrices(placed: Placed) -> tuple[int, ...]:
    """How many whole matrices of an aligned part each rank of a shard group holds."""
    each = placed.part.numel // placed.part.stack[0]
    return tuple(held // each for held in placed.held)


# ---- on every rank -------------------------------------------------------------------------------


def everywhere(placed: Placed, mesh: Mesh, values: Sequence[float]) -> Grid:
    """A number for each rank of a shard group, on all ranks: copies have the same."""
    grid = np.array(values, dtype=np.float64).reshape(1, mesh.fsdp, placed.across)
    return np.broadcast_to(grid, (mesh.replicate, mesh.fsdp, mesh.tp))


def owner(placed: Placed, mesh: Mesh) -> Grid:
    """1 for the owner, in every copy that works for itself, else 0."""
    one = np.zeros((mesh.sharing, mesh.fsdp, placed.across))
    one.flat[placed.owner or 0] = 1
    return np.broadcast_to(one, (mesh.replicate, mesh.fsdp, mesh.tp))


def share(placed: Placed, mesh: Mesh) -> Grid:
    """The share of a part's statistic, application and momentum that each rank has."""
    if placed.kind in ("alone", "shared"):
        return np.ones((mesh.replicate, mesh.fsdp, mesh.tp))
    if placed.kind == "owned":
        return owner(placed, mesh)
    if placed.kind == "summed":
        return everywhere(placed, mesh, [held / placed.part.numel for held in placed.held])
    return everywhere(placed, mesh, [count / placed.part.stack[0] for count in matrices(placed)])


def remembers(placed: Placed, mesh: Mesh) -> Grid:
    """The share of a part's memory that each rank has: where statistics are summed, one rank has all of it."""
    return owner(placed, mesh) if placed.kind == "summed" else share(placed, mesh)


def applies(placed: Placed, mesh: Mesh) -> Grid:
    """The share of a part's roots that each rank has: whole ones where statistics are summed."""
    return np.ones((mesh.replicate, mesh.fsdp, mesh.tp)) if placed.kind == "summed" else share(placed, mesh)


def updated(placed: Placed, mesh: Mesh) -> Grid:
    """How many numbers of a parameter of AdamW's each rank updates and keeps the moments of."""
    if placed.kind != "rows":
        return everywhere(placed, mesh, placed.held)
    rows = _chunk(placed.part.shape[0], mesh.ranks)
    width = placed.part.numel // max(placed.part.shape[0], 1)
    return np.array([(hi - lo) * width for lo, hi in rows], dtype=np.float64).reshape(mesh.replicate, 1, 1)
