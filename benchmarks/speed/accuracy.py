"""How far a root's step is from exact: ``Z M`` against an eigendecomposition of the same matrix in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from asgo.linalg.inverse_root import ROOTS, relative, undamped
from benchmarks.speed.matrices import Problem


@dataclass(frozen=True)
class Accuracy:
    """Errors of one root on one problem.

    Args:
        median_error: of ``||U - U*||_F / ||U*||_F`` over the matrices.
        max_error: its largest.
        min_cos: the smallest cosine of U and U*.
        finite: whether every result is finite.
        told: whether exactly the broken matrices were reported as such.
    """

    median_error: float
    max_error: float
    min_cos: float
    finite: bool
    told: bool


Formula = Callable[[Tensor, float], Tensor]


def formula_of(name: str) -> Formula:
    """What a root is held against: its own formula; the released root, which damps nothing, against `relative`."""
    return relative if ROOTS[name].formula is undamped else ROOTS[name].formula


def exact_root(gram: Tensor, eps: float, formula: Formula) -> Tensor:
    """The root of one matrix ``(k, k)`` by a float64 eigendecomposition."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * formula(values.clamp(min=0), eps).rsqrt()) @ vectors.mT


def exact_steps(problem: Problem, eps: float, formula: Formula = relative) -> list[Tensor | None]:
    """The exact ``U*`` of every matrix; None for one that is not finite, zero for a zero one."""
    found: list[Tensor | None] = []
    for gram, direction in zip(problem.grams, problem.directions, strict=True):
        wide, vectors = gram.double().cpu(), direction.double().cpu()  # float64 is slow and eigh frail on some GPUs
        if not bool(wide.isfinite().all()):
            found.append(None)
        else:
            step = exact_root(wide, eps, formula) @ vectors if bool(wide.any()) else torch.zeros_like(vectors)
            found.append(step)
    return found


def measure(name: str, problem: Problem, eps: float, exact: Sequence[Tensor | None]) -> Accuracy:
    """The errors of the root called `name`, applied as ``Z @ M`` in float32.

    Args:
        name: one of `asgo.linalg.inverse_root.ROOTS`.
        problem: matrices, broken ones included.
        eps: damping.
        exact: the steps by `exact_steps`; matrices with None there count only in `finite` and `told`.
    """
    roots, ok = ROOTS[name](problem.grams, eps)
    errors, cosines = [], []
    finite = bool(roots.isfinite().all())
    for root, direction, wanted in zip(roots, problem.directions, exact, strict=True):
        if wanted is None:
            continue
        step = (root @ direction).double().cpu()
        finite = finite and bool(step.isfinite().all())
        errors.append(_relative(step, wanted))
        cosines.append(_cosine(step, wanted))
    told = ok.tolist() == [wanted is not None for wanted in exact]
    return Accuracy(median(errors), max(errors), min(cosines), finite, told)


def _relative(step: Tensor, wanted: Tensor) -> float:
    size, error = float(wanted.norm()), float((step - wanted).norm())
    if math.isnan(error):
        return math.inf
    return error / size if size else (0.0 if error == 0 else math.inf)


def _cosine(step: Tensor, wanted: Tensor) -> float:
    sizes = float(step.norm()) * float(wanted.norm())
    if not sizes > 0:
        return 1.0 if torch.equal(step, wanted) else 0.0
    return float((step * wanted).sum()) / sizes
