"""What ``benchmarks.root`` measures, a dataclass per kind of row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RootRow:
    """One root on matrices of one kind, size and batch; numbers are None where it failed.

    Args:
        matrices: their kind.
        size: k.
        batch: how many at once.
        root: name of the root.
        failure: why there are no numbers; empty if there are.
        seconds: median time per matrix.
        low: lower quartile of it.
        high: upper quartile of it.
        products: median over rounds of its time over that of one float32 product of the same batch.
        speedup: median over rounds of the released root's time over its own; None where that was not timed.
        median_error: relative error of the step, median over the matrices.
        max_error: its largest.
        min_cos: smallest cosine of the step and the exact one.
        finite: whether every number of the root and the step is finite.
    """

    matrices: str
    size: int
    batch: int
    root: str
    failure: str = ""
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    products: float | None = None
    speedup: float | None = None
    median_error: float | None = None
    max_error: float | None = None
    min_cos: float | None = None
    finite: bool | None = None


@dataclass(frozen=True)
class CaseRow:
    """One root on one case that breaks solvers.

    Args:
        case: what is special.
        root: name of the root.
        finite: whether every number of the root and of the steps of sound matrices is finite.
        max_error: the largest relative error over sound matrices; None if it raised.
        told: whether it reported exactly the matrices that are none.
        failure: what it raised; empty if it did not.
    """

    case: str
    root: str
    finite: bool
    max_error: float | None
    told: bool
    failure: str = ""
