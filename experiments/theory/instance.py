"""What a convex problem is made of: features of known covariance, and a best matrix of known norms.

Everything is a stack over repeats, one independent instance each: tensors begin with the axis ``R``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Structure = Literal["left", "right", "both", "none"]
DTYPE = torch.float64


@dataclass(frozen=True)
class ProblemConfig:
    """What can be chosen of a problem.

    Args:
        problem: absolute, hinge, squares or logistic.
        rows: `m` of the matrix W.
        columns: `n` of it.
        rank: directions of full size among those of the structured side; see `tail`.
        tail: size of the other directions; with 0, gradients have exactly this rank.
        spread: ``||W*||_F^2 / ||W*||_op^2``, from 1 to the shorter side; ``||W*||_op`` is 1.
        structure: the side on which directions differ in size; none: a left one in a random basis of all entries, where
            no side sees it.
        aligned: the basis of the directions is that of the entries, which is what a diagonal method needs.
        noise: absolute: standard deviation of the labels' noise, in units of the first residuals. hinge: probability of
            a wrong label. squares, logistic: root mean square of the gradients' noise, in units of the first gradient.
        white: the gradients' noise is the same in all directions; otherwise it has the features' covariance.
        batch: examples, or draws of the noise, that a gradient is the mean of.
        repeats: independent instances.
        seed: of instances and examples.
    """

    problem: str
    rows: int
    columns: int
    rank: int
    tail: float
    spread: float
    structure: Structure
    aligned: bool
    noise: float
    white: bool
    batch: int
    repeats: int
    seed: int


class Draws:
    """Random numbers, a generator for each repeat: the first repeats are the same however many there are."""

    def __init__(self, seed: int, repeats: int, purpose: int) -> None:
        seeds = [(seed * 1_000_003 + repeat) * 7 + purpose for repeat in range(repeats)]
        self.generators = [torch.Generator().manual_seed(number) for number in seeds]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal ``(R, *shape)``."""
        return self._each(lambda generator: torch.randn(shape, generator=generator, dtype=DTYPE))

    def uniform(self, *shape: int) -> Tensor:
        """From 0 to 1, ``(R, *shape)``."""
        return self._each(lambda generator: torch.rand(shape, generator=generator, dtype=DTYPE))

    def integers(self, high: int, *shape: int) -> Tensor:
        """From 0 to ``high - 1``, ``(R, *shape)``."""
        return self._each(lambda generator: torch.randint(high, shape, generator=generator))

    def permutation(self, size: int) -> Tensor:
        """``(R, size)``."""
        return self._each(lambda generator: torch.randperm(size, generator=generator))

    def orthogonal(self, size: int) -> Tensor:
        """``(R, size, size)``."""
        return torch.linalg.qr(self.normal(size, size)).Q

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self.generators])


@dataclass(frozen=True)
class Instance:
    """Features are ``X = A Z B^T`` with ``Z`` of independent entries, in the basis `rotation` of all entries if given.

    Args:
        left: ``A (R, m, m)``, Frobenius norm 1; its columns are the vectors of the classes, where there are any.
        right: ``B (R, n, n)``, Frobenius norm 1.
        rotation: orthogonal ``(R, m n, m n)``, or None for the entries themselves.
        target: ``W* (R, m, n)``.
    """

    left: Tensor
    right: Tensor
    rotation: Tensor | None
    target: Tensor

    def inward(self, weights: Tensor) -> Tensor:
        """``(R, S, m, n)`` in the basis in which features are ``A Z B^T``."""
        return weights if self.rotation is None else _times(weights, self.rotation)

    def outward(self, gradients: Tensor) -> Tensor:
        """The way back."""
        return gradients if self.rotation is None else _times(gradients, self.rotation.mT)

    def covariance(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``rows kron columns`` (each ``(R, k, k)``) as a matrix ``(R, m n, m n)`` on flattened weights."""
        kron = torch.stack([torch.kron(a, b) for a, b in zip(rows, columns, strict=True)])
        return kron if self.rotation is None else self.rotation @ kron @ self.rotation.mT

    def features(self, draws: Draws, count: int) -> Tensor:
        """``X (R, count, m, n)`` in the inward basis; ``E ||X||_F^2 = 1``."""
        z = draws.normal(count, self.left.shape[1], self.right.shape[1])
        return self.left[:, None] @ z @ self.right[:, None].mT


def _times(stack: Tensor, matrix: Tensor) -> Tensor:
    return (stack.flatten(2) @ matrix).view_as(stack)


def make(dials: ProblemConfig) -> Instance:
    """The instances that the dials describe."""
    draws = Draws(dials.seed, dials.repeats, 0)
    m, n = dials.rows, dials.columns
    bases = [torch.eye(k, dtype=DTYPE).repeat(dials.repeats, 1, 1) if dials.aligned else draws.orthogonal(k)
             for k in (m, n)]  # fmt: skip
    sides = ("left", "both", "none"), ("right", "both")
    left, right = (
        (basis * _sizes(dials, k, dials.structure in structured)) @ draws.orthogonal(k)
        for basis, k, structured in zip(bases, (m, n), sides, strict=True)
    )
    return Instance(left, right, _rotation(dials, draws), _target(dials, draws))


def _sizes(dials: ProblemConfig, k: int, structured: bool) -> Tensor:
    sizes = torch.ones(k, dtype=DTYPE)
    if structured:
        sizes[dials.rank :] = dials.tail
    return sizes / sizes.norm()


def _rotation(dials: ProblemConfig, draws: Draws) -> Tensor | None:
    d = dials.rows * dials.columns
    if dials.structure != "none":
        return None
    return torch.eye(d, dtype=DTYPE)[draws.permutation(d)] if dials.aligned else draws.orthogonal(d)


def _target(dials: ProblemConfig, draws: Draws) -> Tensor:
    """Singular values of 1, as many as fit into `spread`, and one for the rest: ``||W*||_F^2`` is `spread`."""
    whole = math.floor(dials.spread)
    k = min(dials.rows, dials.columns)
    values = torch.zeros(k, dtype=DTYPE)
    values[:whole] = 1
    if whole < k:
        values[whole] = math.sqrt(dials.spread - whole)
    return (draws.orthogonal(dials.rows)[:, :, :k] * values) @ draws.orthogonal(dials.columns)[:, :, :k].mT
