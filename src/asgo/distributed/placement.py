"""Where the entries of a parameter are: whole on every rank, or in boxes on several.

The facts that the rest needs are here as plain data. Which rank holds which box of a `DTensor` is computed from its
mesh and placements; nothing is asked of other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, combinations, product
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from asgo.distributed.collectives import ensure_group
from asgo.distributed.dtensor import is_dtensor
from asgo.structures import Structure
from asgo.structures.base import Axis
from asgo.views import View, axes_of, lengths

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement as TorchPlacement

Region: TypeAlias = tuple[tuple[int, int], ...]
"""A box of entries: where it begins and ends along every axis."""

Kind: TypeAlias = Literal["local", "root_sharing", "owner_computes", "whole_slices", "partial_sums", "elementwise"]
"""The placements that the library chooses; `GroupedOptimizer.distribute` may be given another."""


@dataclass(frozen=True)
class ShardSpec:
    """How single matrices are divided among ranks, and their state with them.

    Args:
        axis: of a stack: 1 if ranks have some rows of each matrix, 2 if they have some columns.
        ranks: global ranks that shard the same matrices as this one, in order.
        sharded_keys: state keys that are sharded as the matrices are.
        owner_keys: state keys stored on the owner only; keys in neither list are replicated.
    """

    axis: int
    ranks: tuple[int, ...]
    sharded_keys: tuple[str, ...]
    owner_keys: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Where the entries of a parameter are, and so how it is stepped.

    Args:
        kind: ``"local"``: this rank holds all and does all. ``"root_sharing"``: likewise, but ranks divide the roots
            among them. ``"owner_computes"``: every matrix has a rank that keeps its state and computes its update.
            ``"whole_slices"``: what this rank holds are whole matrices of the view. ``"partial_sums"``: this rank
            holds some rows or columns of every matrix, and statistics are sums over ranks. ``"elementwise"``: no
            view, so any part will do.
        ranks: the global ranks that have to do with it, in order; none if it is alone.
        group_rank: this rank's place among them.
        boxes: the entries that each of them holds.
        view: through which what is held here is read; None without a view.
        rows: whether the boxes are runs of rows that ranks divide among them although all hold the whole.
        cut: of ``"partial_sums"``, how.
    """

    kind: Kind | str
    view: View | None
    ranks: tuple[int, ...] = ()
    group_rank: int = 0
    boxes: tuple[Region, ...] = ()
    rows: bool = False
    cut: ShardSpec | None = None

    @property
    def box(self) -> Region:
        """The entries that this rank holds."""
        return self.boxes[self.group_rank]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of a plain one. It shares its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def gradient(param: Tensor) -> Tensor:
    """What this rank holds of a parameter's gradient, placed as the parameter is."""
    grad = param.grad
    if is_dtensor(grad) and is_dtensor(param) and grad.placements != param.placements:
        grad = param.grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)  # pyright: ignore[reportArgumentType]


def find(param: Tensor, view: View | None, caller: str, structure: Structure | None = None) -> Placement:
    """The placement of a parameter with this view.

    Args:
        param: any tensor.
        view: through which it is read as a whole.
        caller: the optimizer and the parameter's name, for messages.
        structure: of its group, to decide whether statistics are summed over shards; None: they are not.

    Raises:
        TypeError: a placement with which its entries are on no rank, such as Partial.
    """
    if not is_dtensor(param):
        return Placement("local", view)
    mesh, placements, shape = param.device_mesh, param.placements, tuple(param.shape)
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not all(placement.is_replicate() or placement.is_shard() or _strided(placement) for placement in placements):
        raise TypeError(
            f"{caller} has the placements {placements}: it is a sum over ranks that nobody holds. Redistribute it to "
            "Shard(...) or Replicate()."
        )
    if mesh.size() == 1 or not cut:
        return Placement("local", view)
    ranks, me = tuple(mesh.mesh.flatten().tolist()), _flat(mesh.get_coordinate(), mesh.shape)
    boxes = rank_regions(shape, tuple(mesh.shape), tuple(placements))
    if not _disjoint(boxes, math.prod(shape)):
        raise TypeError(
            f"{caller} has the placements {placements} on a mesh {tuple(mesh.shape)}, with which a rank holds rows "
            "that are not side by side. Choose a mesh that divides its rows."
        )
    kind = kind_of_shards(shape, view, structure, [(mesh.size(i), placements[i]) for i in cut], boxes)
    if kind == "whole_slices" and view is not None:
        along = ensure_group(None, mesh, cut[0])
        piece = whole_slices(view, shape, _dim(placements[cut[0]]), boxes, me)
        return Placement(kind, piece, along, along.index(ranks[me]), tuple(boxes[ranks.index(rank)] for rank in along))
    ensure_group(ranks, mesh)
    found = Placement(kind, view, ranks, me, boxes)
    if kind != "partial_sums" or view is None or structure is None:
        return found
    axis, piece = _shard_axis(view, shape, _dim(placements[cut[0]]))
    along = ensure_group(None, mesh, cut[0])
    return replace(found, view=piece, cut=_shard_spec(structure, axis, along))


def kind_of_shards(
    shape: tuple[int, ...],
    view: View | None,
    structure: Structure | None,
    cuts: Sequence[tuple[int, TorchPlacement]],
    boxes: Sequence[Region],
) -> Kind:
    """How a sharded parameter is stepped. Only shapes and the structure decide, so that all ranks, and a plan for ranks
    that do not exist, decide alike.

    Args:
        shape: of the whole parameter.
        view: through which it is read as a whole.
        structure: of its group, to decide whether statistics are summed over shards (`most_shards`); None: never.
        cuts: ranks along each dimension of the mesh that cuts it, and the placement there.
        boxes: the entries that each rank holds.
    """
    if view is None:
        return "elementwise"
    if len(cuts) == 1:
        size, placed = cuts[0]
        if whole_slices(view, shape, _dim(placed), boxes, 0) is not None:
            return "whole_slices"
        most = 0 if structure is None or _strided(placed) else most_shards(view, shape, _dim(placed), structure)
        if 1 < size <= most:
            return "partial_sums"
    return "owner_computes"


def replicated(param: Tensor, view: View | None, ranks: tuple[int, ...], me: int, sharded: bool) -> Placement:
    """The placement of a parameter that every one of these ranks holds whole.

    Args:
        param: the parameter.
        view: through which it is read.
        ranks: the global ranks.
        group_rank: this rank's place among them.
        sharded: whether one rank alone keeps the state, of a matrix or, without a view, of a run of rows.
    """
    if view is not None:
        return everywhere("owner_computes" if sharded else "root_sharing", param, view, ranks, me)
    if not sharded or param.ndim == 0 or not param.is_contiguous():
        return Placement("local", None)
    from torch.distributed.tensor import Shard

    return Placement(
        "elementwise", None, ranks, me, rank_regions(tuple(param.shape), (len(ranks),), (Shard(0),)), rows=True
    )


def everywhere(kind: str, param: Tensor, view: View | None, ranks: tuple[int, ...], me: int) -> Placement:
    """The placement of a parameter that every one of these ranks holds, see `replicated`."""
    return Placement(kind, view, ranks, me, (whole(param),) * len(ranks))


def whole(param: Tensor) -> Region:
    """The box of all entries."""
    return tuple((0, length) for length in param.shape)


@lru_cache(maxsize=4096)
def part_regions(view: View | None, shape: tuple[int, ...]) -> tuple[tuple[Region, ...], ...]:
    """The boxes of every part of a parameter of this shape: one each, or one for each repetition."""
    whole = tuple((0, length) for length in shape)
    if view is None or view.split is None:
        return ((whole,),)
    dim, boxes = view.split_dim % len(shape), []
    unit = sum(view.split) if view.repeated else shape[dim]
    for begin, length in zip(accumulate(view.split, initial=0), view.split, strict=False):
        starts = range(begin, shape[dim], unit) if length else ()
        boxes.append(tuple((*whole[:dim], (start, start + length), *whole[dim + 1 :]) for start in starts))
    return tuple(boxes)


def pieces(view: View, part: Tensor) -> Sequence[Tensor]:
    """A part as one tensor for each of its boxes (see `part_regions`), on the same memory."""
    return part.unbind(view.split_dim % (part.ndim - 1)) if view.repeated else (part,)


def overlap(a: Region, b: Region) -> Region | None:
    """The entries in both boxes; None for none."""
    both = tuple((max(lo, low), min(hi, high)) for (lo, hi), (low, high) in zip(a, b, strict=True))
    return both if all(lo < hi for lo, hi in both) else None


def within(box: Region, outer: Region) -> tuple[slice, ...]:
    """The indices of a box in a tensor that holds the outer one."""
    return tuple(slice(lo - start, hi - start) for (lo, hi), (start, _) in zip(box, outer, strict=True))


def sizes(box: Region) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(hi - lo for lo, hi in box)


@lru_cache(maxsize=4096)
def rank_regions(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[object, ...]) -> tuple[Region, ...]:
    """The box that every rank of a mesh holds, in the order of the ranks."""
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    boxes = []
    for coordinate in product(*map(range, mesh)):
        held, begin = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)  # pyright: ignore[reportArgumentType]
        boxes.append(tuple((lo, lo + length) for lo, length in zip(begin, held, strict=True)))
    return tuple(boxes)


@lru_cache(maxsize=4096)
def _disjoint(boxes: tuple[Region, ...], numel: int) -> bool:
    """Whether different boxes hold all entries once."""
    distinct = {box for box in boxes if overlap(box, box)}
    if sum(math.prod(sizes(box)) for box in distinct) != numel:
        return False
    return not any(overlap(a, b) for a, b in combinations(distinct, 2))


def whole_slices(view: View, shape: tuple[int, ...], dim: int, boxes: Sequence[Region], me: int) -> View | None:
    """The view of what this rank holds, if every rank of the cut axis holds whole matrices; else None."""
    if view.split is not None:
        return None
    source, target = map(axes_of, view.pattern_of(0).split("->"))
    known = lengths(view.pattern_of(0).split("->")[0], shape, tuple(view.sizes))  # pyright: ignore[reportArgumentType]
    first = source[dim][:1]
    if not first or first != target[0][:1] or first[0] not in known:
        return None
    each = math.prod(known[name] for name in source[dim][1:] if name in known)
    if each == 0 or any(lo % each or hi % each or lo == hi for lo, hi in (box[dim] for box in boxes)):
        return None
    lo, hi = boxes[me][dim]
    return View(view.pattern, {**known, first[0]: (hi - lo) // each})


def _strided(placement: object) -> bool:
    return type(placement).__name__ == "_StridedShard"


def _dim(placement: TorchPlacement) -> int:
    return placement.dim  # pyright: ignore[reportAttributeAccessIssue]


def _flat(coordinate: Sequence[int] | None, mesh: Sequence[int]) -> int:
    """The place of a coordinate in a mesh read row by row."""
    place = 0
    for index, length in zip(coordinate or [0] * len(mesh), mesh, strict=True):
        place = place * length + index
    return place


def entries_of(param: Tensor, placement: Placement, tensor: Tensor) -> Tensor:
    """What this rank updates of a parameter or gradient without a view, as a tensor on the same memory."""
    held = local(tensor)
    return held[within(placement.box, whole(param))] if placement.rows else held


# ---- shards of single matrices ------------------------------------------------------------------------------------

AXES: dict[Axis, int] = {"rows": 1, "columns": 2}
"""The axis of a stack."""


def _shard_spec(structure: Structure, axis: Axis | None, ranks: tuple[int, ...]) -> ShardSpec:
    keys = {*structure.init(torch.empty(1, 1, 1, device="meta")), "failures"}
    owned = keys - {*structure.root_keys, *structure.sharded_keys} if structure.root_keys else set()
    return ShardSpec(AXES[axis or "rows"], ranks, structure.sharded_keys, tuple(sorted(owned)))


def most_shards(view: View, shape: Sequence[int], dim: int, structure: Structure) -> int:
    """Into how many shards an axis may be cut so that summing statistics over them is possible and sends less than
    gathering gradients; 0: never.

    Possible: one dimension of the mesh cuts one axis of the parameter, which is the axis of rows, or of columns, of
    all its matrices and no more than that; and shards along it are additive for the structure.

    Less: for every matrix its S shards send q numbers of a measurement to an owner and get r numbers of roots back,
    ``(S - 1) (q + r)`` in all (without roots the measurement is all-reduced: r = q). To gather the gradient and send
    the update back takes ``2 m n (S - 1) / S``. So the rule is ``S (q + r) < 2 m n``, summed over the parts of a split:
    for a one-sided statistic ``S k^2 < m n``, packed ``S k (k + 1) / 2 < m n``.
    """
    (axis, _), stacks = _shard_axis(view, shape, dim), view.shapes(shape)
    if axis is None or 0 in shape or not all(structure.is_shard_additive(axis, m, n) for _, m, n in stacks):
        return 0
    return (2 * math.prod(shape) - 1) // sum(b * sum(sent_numbers(structure, m, n)) for b, m, n in stacks)


@lru_cache(maxsize=4096)
def sent_numbers(structure: Structure, m: int, n: int) -> tuple[int, int]:
    """Numbers that go from and to a shard of an ``m x n`` matrix: a measurement; roots, or without any that again."""
    like = torch.empty(1, m, n, device="meta")
    measured, state = structure.compute_statistic(like).numel(), structure.init(like)
    return measured, sum(state[key].numel() for key in structure.root_keys) or measured


def _shard_axis(view: View, shape: Sequence[int], dim: int) -> tuple[Axis | None, View]:
    """Whether an axis of a parameter is the rows, or the columns, of all its matrices; and the view of a shard.

    Axes of length 1 do not count: the rows of ``"(g o) i -> g o i"`` with one group are a whole axis.
    """
    at = dim  # in a part, which has one axis more if parts are repeated
    if view.split is not None:
        if view.split_dim % len(shape) == dim:
            return None, view
        at += view.repeated and view.split_dim % len(shape) < dim
    found, sizes = set[Axis | None](), dict(view.sizes)
    for part, piece in enumerate(view.cut(torch.empty(tuple(shape), device="meta"))):
        source, target = view.pattern_of(part).split("->")
        known = lengths(source, tuple(piece.shape), tuple(view.sizes))  # pyright: ignore[reportArgumentType]
        cut, rows, columns = (
            [name for name in names if known.get(name, 1) > 1] for names in (axes_of(source)[at], *axes_of(target)[1:])
        )
        single = len(cut) == 1 and (view.split is None or len(axes_of(source)[at]) == 1)
        found.add(("rows" if cut == rows else "columns" if cut == columns else None) if single else None)
        if view.split is None:
            sizes = dict(known)
        for name in cut:
            sizes.pop(name, None)
    return (found.pop() if len(found) == 1 else None), replace(view, sizes=sizes)
