"""Which matrices ranks step by their rows or columns, with statistics that are sums over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from asgo.distributed.collectives import ensure_group
from asgo.distributed.dtensor import is_dtensor
from asgo.distributed.placement import Placement, ShardSpec
from asgo.structures import Structure
from asgo.structures.base import Axis
from asgo.views import View, axes_of, lengths

AXES: dict[Axis, int] = {"rows": 1, "columns": 2}
"""The axis of a stack."""


def summed(found: Placement, param: Tensor, view: View, structure: Structure) -> Placement:
    """The placement ``"partial_sums"`` where it is possible and sends less than ``"owner_computes"``, else the one
    that was found.

    Possible: one dimension of the mesh cuts one axis of the parameter, which is the axis of rows, or that of columns,
    of all its matrices and no more than that; and shards along it are additive for the structure.

    Less: for every matrix its S shards send q numbers of a measurement to an owner and get r numbers of roots back,
    ``(S - 1) (q + r)`` in all (without roots the measurement is all-reduced: r = q). To gather the gradient and send
    the update back takes ``2 m n (S - 1) / S``. So the rule is ``S (q + r) < 2 m n``, summed over the parts of a split:
    for a one-sided statistic ``S k^2 < m n``, packed ``S k (k + 1) / 2 < m n``. It asks for shapes, mesh and structure
    only: all ranks answer alike.

    Args:
        found: by `asgo.distributed.placement.find`.
        param: the parameter.
        view: through which it is read as a whole.
        structure: of its group.
    """
    if found.kind != "owner_computes" or not is_dtensor(param):
        return found
    cuts = [(i, placed) for i, placed in enumerate(param.placements) if not placed.is_replicate()]
    shape, mesh, (along, placed) = tuple(param.shape), param.device_mesh, cuts[0]
    if len(cuts) > 1 or type(placed).__name__ != "Shard" or mesh.size(along) == 1:
        return found
    dim: int = placed.dim  # pyright: ignore[reportAttributeAccessIssue]
    axis, piece = _cut(view, shape, dim)
    if axis is None or mesh.size(along) > most_shards(view, shape, dim, structure):
        return found
    keys = {*structure.init(torch.empty(1, 1, 1, device="meta")), "failures"}
    owned = keys - {*structure.root_keys, *structure.sharded_keys} if structure.root_keys else set()
    cut = ShardSpec(AXES[axis], ensure_group(None, mesh, along), structure.sharded_keys, tuple(sorted(owned)))
    return replace(found, kind="partial_sums", view=piece, cut=cut)


def most_shards(view: View, shape: Sequence[int], dim: int, structure: Structure) -> int:
    """Into how many shards an axis of a parameter may be cut so that statistics are summed; 0: never. See `summed`."""
    (axis, _), stacks = _cut(view, shape, dim), view.shapes(shape)
    if axis is None or 0 in shape or not all(structure.is_shard_additive(axis, m, n) for _, m, n in stacks):
        return 0
    return (2 * math.prod(shape) - 1) // sum(b * sum(sent(structure, m, n)) for b, m, n in stacks)


@lru_cache(maxsize=4096)
def sent(structure: Structure, m: int, n: int) -> tuple[int, int]:
    """Numbers that go from and to a shard of an ``m x n`` matrix: a measurement; roots, or without any that again."""
    like = torch.empty(1, m, n, device="meta")
    measured, state = structure.compute_statistic(like).numel(), structure.init(like)
    return measured, sum(state[key].numel() for key in structure.root_keys) or measured


def _cut(view: View, shape: Sequence[int], dim: int) -> tuple[Axis | None, View]:
    """Whether an axis of a parameter is that of the rows or the columns of all its matrices, and the view of a shard.

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
