"""Where the entries of a parameter are: whole on every rank, or in boxes on several.

The facts that the rest needs are here as plain data. Which rank holds which box of a `DTensor` is computed from its
mesh and placements; nothing is asked of other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations, product
from typing import Literal, TypeAlias

from torch import Tensor

from asgo.distributed.collectives import know
from asgo.distributed.dtensor import is_dtensor
from asgo.views import View, axes_of, lengths

Box: TypeAlias = tuple[tuple[int, int], ...]
"""A box of entries: where it begins and ends along every axis."""

Kind: TypeAlias = Literal["alone", "shared", "owned", "aligned", "summed", "entries"]


@dataclass(frozen=True)
class Cut:
    """How single matrices are divided among ranks, and their state with them.

    Args:
        axis: of a stack: 1 if ranks have some rows of each matrix, 2 if they have some columns.
        ranks: the global ranks that hold the shards of those matrices of which this rank holds one, in order.
        spread: keys of the state that are cut as the matrices are.
        owned: keys that the owner of a matrix alone has; all other ranks have what is in neither, whole.
    """

    axis: int
    ranks: tuple[int, ...]
    spread: tuple[str, ...]
    owned: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Where the entries of a parameter are, and so how it is stepped.

    Args:
        kind: ``"alone"``: this rank holds all and does all. ``"shared"``: as alone, but ranks divide the roots among
            them. ``"owned"``: every matrix has a rank that keeps its state and computes its update. ``"aligned"``:
            what this rank holds are whole matrices of the view. ``"summed"``: this rank holds some rows or columns of
            every matrix, and statistics are sums over ranks. ``"entries"``: no view, so any part will do.
        ranks: the global ranks that have to do with it, in order; none if it is alone.
        me: this rank's place among them.
        boxes: the entries that each of them holds.
        view: through which what is held here is read; None without a view.
        rows: whether the boxes are runs of rows that ranks divide among them although all hold the whole.
        cut: of ``"summed"``, how.
    """

    kind: Kind
    view: View | None
    ranks: tuple[int, ...] = ()
    me: int = 0
    boxes: tuple[Box, ...] = ()
    rows: bool = False
    cut: Cut | None = None

    @property
    def box(self) -> Box:
        """The entries that this rank holds."""
        return self.boxes[self.me]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of a plain one. It shares its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def gradient(param: Tensor) -> Tensor:
    """What this rank holds of a parameter's gradient, placed as the parameter is."""
    grad = param.grad
    if is_dtensor(grad) and is_dtensor(param) and grad.placements != param.placements:
        grad = param.grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)  # pyright: ignore[reportArgumentType]


def find(param: Tensor, view: View | None, who: str) -> Placement:
    """The placement of a parameter with this view.

    Args:
        param: any tensor.
        view: through which it is read as a whole.
        who: the optimizer and the parameter's name, for messages.

    Raises:
        TypeError: a placement with which its entries are on no rank, such as Partial.
    """
    if not is_dtensor(param):
        return Placement("alone", view)
    mesh, placements = param.device_mesh, param.placements
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not all(placement.is_replicate() or placement.is_shard() or _strided(placement) for placement in placements):
        raise TypeError(
            f"{who} has the placements {placements}: it is a sum over ranks that nobody holds. Redistribute it to "
            "Shard(...) or Replicate()."
        )
    if mesh.size() == 1 or not sharded:
        return Placement("alone", view)
    ranks, me = tuple(mesh.mesh.flatten().tolist()), _flat(mesh.get_coordinate(), mesh.shape)
    boxes = _boxes(tuple(param.shape), tuple(mesh.shape), tuple(placements))
    if not _disjoint(boxes, math.prod(param.shape)):
        raise TypeError(
            f"{who} has the placements {placements} on a mesh {tuple(mesh.shape)}, with which a rank holds rows that "
            "are not side by side. Choose a mesh that divides its rows."
        )
    if view is None:
        know(ranks, mesh)
        return Placement("entries", None, ranks, me, boxes)
    if len(sharded) == 1:
        piece = _aligned(view, tuple(param.shape), placements[sharded[0]].dim, boxes, me)  # pyright: ignore[reportAttributeAccessIssue]
        if piece is not None:
            along = know(None, mesh, sharded[0])
            return Placement(
                "aligned", piece, along, along.index(ranks[me]), tuple(boxes[ranks.index(rank)] for rank in along)
            )
    know(ranks, mesh)
    return Placement("owned", view, ranks, me, boxes)


def on_all(param: Tensor, view: View | None, ranks: tuple[int, ...], me: int, sharded: bool) -> Placement:
    """The placement of a parameter that every one of these ranks holds whole.

    Args:
        param: the parameter.
        view: through which it is read.
        ranks: the global ranks.
        me: this rank's place among them.
        sharded: whether one rank alone keeps the state, of a matrix or, without a view, of a run of rows.
    """
    if view is not None:
        return Placement("owned" if sharded else "shared", view, ranks, me, (whole(param),) * len(ranks))
    if not sharded or param.ndim == 0 or not param.is_contiguous():
        return Placement("alone", None)
    from torch.distributed.tensor import Shard

    return Placement("entries", None, ranks, me, _boxes(tuple(param.shape), (len(ranks),), (Shard(0),)), rows=True)


def whole(param: Tensor) -> Box:
    """The box of all entries."""
    return tuple((0, length) for length in param.shape)


@lru_cache(maxsize=4096)
def part_boxes(view: View, shape: tuple[int, ...]) -> tuple[tuple[Box, ...], ...]:
    """The boxes of every part of a parameter of this shape: one each, or one for each repetition."""
    whole = tuple((0, length) for length in shape)
    if view.split is None:
        return ((whole,),)
    dim, boxes = view.split_dim % len(shape), []
    unit = sum(view.split) if view.repeated else shape[dim]
    for begin, length in zip(accumulate(view.split, initial=0), view.split, strict=False):
        starts = range(begin, shape[dim], unit) if length else ()
        boxes.append(tuple((*whole[:dim], (start, start + length), *whole[dim + 1 :]) for start in starts))
    return tuple(boxes)


def pieces(view: View, part: Tensor) -> Sequence[Tensor]:
    """A part as one tensor for each of its boxes (see `part_boxes`), on the same memory."""
    return part.unbind(view.split_dim % (part.ndim - 1)) if view.repeated else (part,)


def overlap(a: Box, b: Box) -> Box | None:
    """The entries in both boxes; None for none."""
    both = tuple((max(lo, low), min(hi, high)) for (lo, hi), (low, high) in zip(a, b, strict=True))
    return both if all(lo < hi for lo, hi in both) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """The indices of a box in a tensor that holds the outer one."""
    return tuple(slice(lo - start, hi - start) for (lo, hi), (start, _) in zip(box, outer, strict=True))


def sizes(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(hi - lo for lo, hi in box)


@lru_cache(maxsize=4096)
def _boxes(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[object, ...]) -> tuple[Box, ...]:
    """The box that every rank of a mesh holds, in the order of the ranks."""
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    boxes = []
    for coordinate in product(*map(range, mesh)):
        held, begin = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)  # pyright: ignore[reportArgumentType]
        boxes.append(tuple((lo, lo + length) for lo, length in zip(begin, held, strict=True)))
    return tuple(boxes)


@lru_cache(maxsize=4096)
def _disjoint(boxes: tuple[Box, ...], numel: int) -> bool:
    """Whether different boxes hold all entries once."""
    distinct = {box for box in boxes if overlap(box, box)}
    if sum(math.prod(sizes(box)) for box in distinct) != numel:
        return False
    return not any(overlap(a, b) for a, b in combinations(distinct, 2))


def _aligned(view: View, shape: tuple[int, ...], dim: int, boxes: Sequence[Box], me: int) -> View | None:
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


def keeps(placement: Placement, owner: int | None) -> bool:
    """Whether this rank keeps the state of a matrix with that owner."""
    return placement.kind != "owned" or owner == placement.me
