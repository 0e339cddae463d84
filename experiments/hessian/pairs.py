"""The blocks between two matrices: how much of the curvature couples them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from experiments.hessian.config import Curvature
from experiments.hessian.estimates import Estimate
from experiments.hessian.matrices import Matrix, layers


@dataclass(frozen=True)
class Pairs:
    """Squared norms of all blocks of one curvature at one step.

    Args:
        step: training steps done.
        curvature: which.
        labels: short names of the matrices.
        layers: the layer of each, as text.
        squares: squared norm of the block of two matrices, by their numbers; None where it could not be measured.
    """

    step: int
    curvature: Curvature
    labels: Sequence[str]
    layers: Sequence[str]
    squares: Mapping[tuple[int, int], Estimate | None]

    @staticmethod
    def of(step: int, curvature: Curvature, matrices: Sequence[Matrix], found: Sequence[Mapping[str, Any]]) -> Pairs:
        """From what was found for the columns of each matrix."""
        squares = {}
        for i in range(len(matrices)):
            for j in range(len(matrices)):
                both = [found[b]["squares"][a] for a, b in {(i, j), (j, i)} if "squares" in found[b]]
                squares[i, j] = _mean([Estimate(*pair) for pair in both])
        labels = [matrix.label for matrix in matrices]
        return Pairs(step, curvature, labels, layers(matrices), squares)

    def normalized(self, i: int, j: int) -> Estimate | None:
        """``||H_ij|| / sqrt(||H_ii|| ||H_jj||)``, which is 1 for a structureless matrix and on the diagonal."""
        if i == j:
            return None if self.squares[i, i] is None else Estimate(1.0)
        block, first, second = self.squares[i, j], self.squares[i, i], self.squares[j, j]
        if block is None or first is None or second is None or not min(first.value, second.value) > 0:
            return None
        value = math.sqrt(block.value) / (first.value * second.value) ** 0.25
        weights = ((block, 0.5), (first, 0.25), (second, 0.25))
        relative = math.sqrt(sum((w * e.error / e.value) ** 2 for e, w in weights if e.value > 0))
        return Estimate(value, value * relative)

    def matrix(self) -> np.ndarray:
        """`normalized` of all pairs, NaN where it could not be measured."""
        every = range(len(self.labels))
        found = [[self.normalized(i, j) for j in every] for i in every]
        return np.array([[math.nan if each is None else each.value for each in row] for row in found])

    @property
    def largest_error(self) -> float:
        """The largest standard error of `normalized`, as a share of it."""
        every = range(len(self.labels))
        found = [each for i in every for j in every if (each := self.normalized(i, j)) is not None]
        return max((each.error / each.value for each in found if each.value > 0), default=0.0)

    def typical(self, same_layer: bool) -> float | None:
        """The median of `normalized` over pairs of different matrices within a layer, or of different layers.

        Unlike shares of the whole norm it does not depend on which matrix has the largest curvature. None if there
        is no such pair.
        """
        every = range(len(self.labels))
        pairs = [(i, j) for i in every for j in range(i) if (self.layers[i] == self.layers[j]) == same_layer]
        found = [each.value for i, j in pairs if (each := self.normalized(i, j)) is not None]
        return median(found) if found else None

    def rows(self) -> list[dict[str, Any]]:
        """The lines of ``pairs.csv``."""
        return [self._row(i, j) for i in range(len(self.labels)) for j in range(len(self.labels)) if i <= j]

    def _row(self, i: int, j: int) -> dict[str, Any]:
        found, square = self.normalized(i, j), self.squares[i, j]
        return {
            "step": self.step,
            "curvature": self.curvature,
            "first": self.labels[i],
            "second": self.labels[j],
            "norm": None if square is None else math.sqrt(square.value),
            "normalized": None if found is None else found.value,
            "normalized_error": None if found is None else found.error,
        }


def _mean(both: Sequence[Estimate]) -> Estimate | None:
    """The mean of independent estimates of one number."""
    if not both:
        return None
    error = math.sqrt(sum(each.error**2 for each in both)) / len(both)
    return Estimate(sum(each.value for each in both) / len(both), error)
