"""What a step of ASGO does: operations and bytes of memory for a part, and who does how much of it on a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from asgo import roots
from asgo.lab.plan.mesh import Mesh
from asgo.lab.plan.parts import Part
from asgo.lab.plan.placing import Grid, Placed, applies, everywhere, owner, remembers, share, updated
from asgo.matmul import PANELS, SMALLEST_PANEL

PASSES = 19
"""How often a step on a GPU reads or writes a number of a stack beside the products: norm 2, where 4, lerp 6, square
and mean 3, two multiplications 4."""
LIMITING = 3
"""The same for the lengths of rows and their limit, where roots grow older than a step."""
FOLD, PACKED = 3, 7
"""How often a step reads or writes a number of a ``k x k`` statistic and root beside products: to fold 3; where they
are packed, to pack a measurement 1.75, to fold it 1.5, to unpack a root 3.5, and a little for masks."""
PROBES = 32
"""Products of a root's probe with single columns, ``k^2`` multiplications each: 4 twice, then 8 three times."""


def statistic_flops(part: Part) -> int:
    """Operations of ``S S^T``: four panels of rows, each times the rows down to it, or one product if k is small."""
    b, k = part.stack[0], part.k
    other = part.numel // (b * k) if b * k else 0
    if k < PANELS * SMALLEST_PANEL:
        return 2 * b * k * k * other
    cuts = [k * i // PANELS for i in range(PANELS + 1)]
    return 2 * b * other * sum((stop - start) * stop for start, stop in pairwise(cuts))


def application_flops(part: Part) -> int:
    """Operations of the root times the direction: ``2 m n k``."""
    return 2 * part.numel * part.k


def root_flops(part: Part, products: float) -> float:
    """Operations of one refresh: `products` of ``2 k^3``, and the probe, for each matrix."""
    return part.stack[0] * 2 * part.k**2 * (products * part.k + PROBES)


def products_of(root: str, eps: float) -> float:
    """How many products a root takes on a GPU, where ``auto`` is ``minimax``."""
    roots.check_eps(root, eps)
    return roots.products(root, eps, "cuda")


@dataclass(frozen=True)
class Numbers:
    """Bytes of a number: `param` of parameters and gradients, `state` of the state."""

    param: int
    state: int

    @property
    def worker(self) -> int:
        """Bytes of memory traffic for each number that a rank steps: stacking, casting, `PASSES`."""
        cast = 0 if self.param == self.state else self.param + self.state
        return 2 * self.param + cast + PASSES * self.state

    @property
    def holder(self) -> int:
        """The same for each number that a rank updates: decay, then addition."""
        return 4 * self.param + self.state

    @property
    def adamw(self) -> int:
        """The same for each number of AdamW: norm and fused kernel, in the precision of the state."""
        return 8 * self.state + (0 if self.param == self.state else 3 * (self.param + self.state))


@dataclass(frozen=True)
class Work:
    """What every rank does in a step.

    Args:
        statistic: operations of the statistics.
        application: operations of the roots' products with directions.
        elements: bytes read and written beside the products.
        roots: operations of the roots that are refreshed, a row for each step of the interval.
        products: how many matrix products a step takes, likewise.
        refreshed: how many roots a step refreshes in the whole model, one number for each step of the interval.
    """

    statistic: Grid
    application: Grid
    elements: Grid
    roots: NDArray[np.float64]
    products: NDArray[np.float64]
    refreshed: NDArray[np.int64]


def work(placed: Sequence[Placed], mesh: Mesh, interval: int, products: float, numbers: Numbers) -> Work:
    """What every rank does in each step of an interval.

    Args:
        placed: all parts.
        mesh: the ranks.
        interval: steps between refreshes of a root.
        products: of a root.
        numbers: bytes of a number.
    """
    grid = (mesh.replicate, mesh.fsdp, mesh.tp)
    statistic, application, elements = (np.zeros(grid) for _ in range(3))
    cubic, count = (np.zeros((interval, *grid)) for _ in range(2))
    refreshed = np.zeros(interval, dtype=np.int64)
    for p in placed:
        part, b = p.part, p.part.stack[0]
        if part.view is None:
            elements += updated(p, mesh) * numbers.adamw
            continue
        mine = share(p, mesh)
        refreshes = owner(p, mesh) if p.kind in ("shared", "summed") else mine
        statistic += mine * statistic_flops(part)
        application += mine * application_flops(part)
        elements += everywhere(p, mesh, p.held) * numbers.holder
        squares = (PACKED if part.packed else FOLD) * b * part.k**2
        worker = numbers.worker + (LIMITING * numbers.state if interval > 1 else 0)
        elements += mine * part.numel * worker + remembers(p, mesh) * squares * numbers.state
        cubic[p.turn] += refreshes * root_flops(part, products)
        count += applies(p, mesh) * 2 * b
        count[p.turn] += refreshes * b * products
        refreshed[p.turn] += b
    return Work(statistic, application, elements, cubic, count, refreshed)


@dataclass(frozen=True)
class Memory:
    """Bytes that the fullest rank keeps."""

    params: int
    gradients: int
    momentum: int
    statistics: int
    roots: int
    adamw: int
    rest: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())

    @property
    def state(self) -> int:
        """What the optimizer keeps."""
        return self.total - self.params - self.gradients


def kept(placed: Sequence[Placed], mesh: Mesh, numbers: Numbers, state_scale: float = 1.0) -> dict[str, Grid]:
    """Bytes that every rank keeps, by the names of `Memory`; activations and temporaries are not in it.

    Args:
        placed: all parts.
        mesh: the ranks.
        numbers: bytes of a number.
        state_scale: bytes of a number of the state over those that the parts were read with.
    """
    names = [field.name for field in fields(Memory)]
    found = {name: np.zeros((mesh.replicate, mesh.fsdp, mesh.tp)) for name in names}
    for p in placed:
        found["rest"] += p.part.counter
        local = everywhere(p, mesh, p.held)
        for name in ("params", "gradients"):
            found[name] += local * numbers.param
        if p.part.view is None:
            found["adamw"] += updated(p, mesh) / max(p.part.numel, 1) * p.part.momentum * state_scale
            continue
        mine, memory = share(p, mesh), remembers(p, mesh)
        found["momentum"] += mine * p.part.momentum * state_scale
        found["statistics"] += memory * p.part.statistic * state_scale
        found["roots"] += applies(p, mesh) * p.part.root * state_scale
        found["rest"] += mine * p.part.spread + memory * (p.part.rest - p.part.spread)
    return {name: grid.round() for name, grid in found.items()}


def memory(placed: Sequence[Placed], mesh: Mesh, numbers: Numbers, state_scale: float = 1.0) -> Memory:
    """What the rank with the most keeps; arguments as of `kept`."""
    found = kept(placed, mesh, numbers, state_scale)
    fullest = int(np.sum(list(found.values()), axis=0).argmax())
    return Memory(**{name: int(grid.flat[fullest]) for name, grid in found.items()})
