"""Bytes that an optimizer step puts on the links, as pure functions of what the ranks hold.

Ranks stand in a grid ``(replicate, fsdp, tp)``. Every function answers a `Traffic`: for each rank the bytes of its
tensors that are for other ranks, and those that come from others, once each; what a rank keeps does not count. What
gradients cost on the way to their ranks is the model's own affair, the same for every optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from asgo.lab.plan.mesh import Mesh
from asgo.lab.plan.placing import Placed, matrices, updated

Bytes: TypeAlias = NDArray[np.int64]

FLAG = 8
"""Bytes of the count of failures that goes with each root."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of every rank, ``(replicate, fsdp, tp)``."""

    sent: Bytes
    received: Bytes

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.received + other.received)

    @property
    def busiest(self) -> int:
        """The most that one rank sends or receives: links carry both directions at once."""
        return int(np.maximum(self.sent, self.received).max())


def nothing(mesh: Mesh) -> Traffic:
    """No bytes."""
    zeros = np.zeros((mesh.replicate, mesh.fsdp, mesh.tp), dtype=np.int64)
    return Traffic(zeros, zeros)


def roots(due: Sequence[Placed], mesh: Mesh, itemsize: int = 4) -> Traffic:
    """The owner of each part that is due sends its roots to all others, where all apply them.

    Data parallel, ``b (k^2 itemsize + 8)`` bytes to each of ``N - 1`` ranks; where statistics are summed over shards,
    without the flag. Packed, ``k (k + 1) / 2`` in place of ``k^2``.

    Args:
        due: parts whose roots are refreshed in this step; those that are neither shared nor summed cost nothing.
        mesh: the ranks.
        itemsize: bytes of a number of the root.
    """
    own, found = np.zeros(mesh.ranks, dtype=np.int64), nothing(mesh)
    for placed in due:
        bytes_of_roots = placed.part.stack[0] * placed.part.square * itemsize
        if placed.kind == "shared":
            own[placed.owner] += bytes_of_roots + placed.part.stack[0] * FLAG
        if placed.kind == "summed":
            held, owner, sent, received = _grid(placed, mesh)
            received += bytes_of_roots
            received[owner] = 0
            sent[owner] = bytes_of_roots * (held.size - 1)
            found = found + _spread(sent, received, mesh)
    grid = (mesh.replicate, mesh.fsdp, mesh.tp)
    return found + Traffic((own * (mesh.ranks - 1)).reshape(grid), (own.sum() - own).reshape(grid))


def sums(placed: Placed, mesh: Mesh, itemsize: int = 4) -> Traffic:
    """The ranks of the owner's replica send it the statistics of what they hold of matrices.

    Args:
        placed: a part; one whose statistics are not summed costs nothing.
        mesh: the ranks.
        itemsize: bytes of a number of the state.
    """
    if placed.kind != "summed":
        return nothing(mesh)
    _, owner, sent, received = _grid(placed, mesh)
    sent[owner[0]] = placed.part.measured * itemsize
    sent[owner] = 0
    received[owner] = placed.part.measured * itemsize * (len(placed.held) - 1)
    return _spread(sent, received, mesh)


def to_owner(placed: Placed, mesh: Mesh, itemsize: int) -> Traffic:
    """The ranks of one shard group send what they hold of an owned part's gradient to its owner.

    Those of the owner's replica do, and nobody if the owner holds all of it.

    Args:
        placed: a part; one that has no owner of all its state costs nothing.
        mesh: the ranks.
        itemsize: bytes of a number of the gradient.
    """
    if placed.kind != "owned":
        return nothing(mesh)
    held, owner, sent, received = _grid(placed, mesh)
    own = int(held[owner])
    replica = owner[0] if own else 0
    if own < placed.part.numel:
        sent[replica] = held[replica] * itemsize
        sent[owner] = 0
        received[owner] = (placed.part.numel - own) * itemsize
    return _spread(sent, received, mesh)


def to_holders(placed: Placed, mesh: Mesh, itemsize: int = 4) -> Traffic:
    """The owner sends every rank what it holds of the update: its shard, or with ZeRO-1 all of it.

    Args:
        placed: a part; one that has no owner of all its state costs nothing.
        mesh: the ranks.
        itemsize: bytes of a number of the update, which has the precision of the state.
    """
    if placed.kind != "owned":
        return nothing(mesh)
    held, owner, sent, received = _grid(placed, mesh)
    received += held * itemsize
    received[owner] = 0
    sent[owner] = (int(held.sum()) - int(held[owner])) * itemsize
    return _spread(sent, received, mesh)


def norms(placed: Placed, mesh: Mesh, itemsize: int = 4) -> Traffic:
    """Ranks with whole matrices tell each other one number for each, so that a parameter has one size of step.

    Ranks with shards of matrices do so for the norm of the gradient, that of the update, and if it is evened out along
    the other side that of what is evened out.

    Args:
        placed: a part; one that is neither aligned nor summed costs nothing.
        mesh: the ranks.
        itemsize: bytes of a norm.
    """
    if placed.kind == "aligned":
        count = max(matrices(placed))
    elif placed.kind == "summed":
        count = placed.part.stack[0] * (3 if placed.part.spread else 2)
    else:
        return nothing(mesh)
    others = len(placed.held) - 1
    each = np.full((mesh.replicate, mesh.fsdp, mesh.tp), count * itemsize * others, dtype=np.int64)
    return Traffic(each, each)


def rows(placed: Placed, mesh: Mesh, itemsize: int) -> Traffic:
    """AdamW with ZeRO-1: every rank sends the rows that it has updated to all others.

    Args:
        placed: a part; one that is not divided by rows costs nothing.
        mesh: the ranks.
        itemsize: bytes of a number of the parameter.
    """
    if placed.kind != "rows":
        return nothing(mesh)
    own = updated(placed, mesh).astype(np.int64) * itemsize
    return Traffic(own * (mesh.ranks - 1), placed.part.numel * itemsize - own)


def fixed(placed: Sequence[Placed], mesh: Mesh, param: int, state: int = 4) -> Traffic:
    """What every step sends, whichever roots are due.

    Args:
        placed: all parts.
        mesh: the ranks.
        param: bytes of a number of a parameter and of its gradient.
        state: bytes of a number of the state.
    """
    found = nothing(mesh)
    for p in placed:
        if p.kind in ("owned", "aligned", "summed", "rows"):
            there, back = to_owner(p, mesh, param), to_holders(p, mesh, state)
            found = found + there + back + sums(p, mesh, state) + norms(p, mesh, state) + rows(p, mesh, param)
    return found


def step(placed: Sequence[Placed], mesh: Mesh, turn: int, param: int, state: int = 4) -> Traffic:
    """Everything that the step of an interval sends at which those of that turn are due."""
    return fixed(placed, mesh, param, state) + roots([p for p in placed if p.turn == turn], mesh, state)


def gradients(numbers: int, mesh: Mesh, itemsize: int) -> float:
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


def _grid(placed: Placed, mesh: Mesh) -> tuple[Bytes, tuple[int, ...], Bytes, Bytes]:
    """What every rank of the part's team holds, the owner's place there, and zeros for what is sent and received."""
    shape = (mesh.sharing, mesh.fsdp, placed.across)
    one = np.array(placed.held, dtype=np.int64).reshape(1, mesh.fsdp, placed.across)
    owner = tuple(int(i) for i in np.unravel_index(placed.owner or 0, shape))
    return np.broadcast_to(one, shape), owner, np.zeros(shape, np.int64), np.zeros(shape, np.int64)


def _spread(sent: Bytes, received: Bytes, mesh: Mesh) -> Traffic:
    """The same in every copy that works for itself: replicas, and ranks of tensor parallel that do not cut the part."""
    shape = (mesh.replicate, mesh.fsdp, mesh.tp)
    return Traffic(np.broadcast_to(sent, shape), np.broadcast_to(received, shape))
