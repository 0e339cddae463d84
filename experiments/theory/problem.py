"""A convex problem: its rounds, its known best matrix, and the constants of the bounds.

A round shows a convex function ``f_t`` with ``E f_t = F``. `W*` minimises ``F`` (for the hinge loss with wrong labels
it is only a comparator). All of ``F(W) - F(W*)``, the gradient, the second moment of gradients, the smoothness and the
covariance of the noise are closed forms or sums over all data: nothing is estimated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from experiments.theory.instance import Draws, Instance, ProblemConfig, make

EXAMPLES = 256
"""Examples of the classification problems."""


@dataclass(frozen=True)
class Round:
    """What a round shows for weights ``(R, S, m, n)``.

    Args:
        gradient: of ``f_t``, ``(R, S, m, n)``.
        regret: ``f_t(W) - f_t(W*)``, ``(R, S)``.
        excess: ``F(W) - F(W*)``, ``(R, S)``.
        noise: gradient of ``f_t - F``, ``(R, 1, m, n)``, where it does not depend on W; None elsewhere.
    """

    gradient: Tensor
    regret: Tensor
    excess: Tensor
    noise: Tensor | None = None


class Problem(ABC):
    """Instances of a problem and the rounds that are played on them."""

    smooth = False

    unit: Tensor
    """``F(0) - F(W*)``, ``(R, 1)``: what pictures measure everything by (of the hinge loss without wrong labels)."""

    def __init__(self, dials: ProblemConfig) -> None:
        self.dials = dials
        self.instance: Instance = make(dials)
        self.draws = Draws(dials.seed, dials.repeats, 1)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Draw data, if any, and set the unit."""

    @abstractmethod
    def round(self, weights: Tensor) -> Round:
        """Draw the next round and show it."""

    @abstractmethod
    def moment(self) -> Tensor:
        """``(R, d, d)`` on flattened weights. Nonsmooth: at least ``E g g^T``. Smooth: at least every Hessian of F."""

    def covariance(self) -> Tensor | None:
        """Smooth problems: that of the noise in a gradient, ``(R, d, d)``; None where there is none."""
        return None

    @property
    def gradient_rank(self) -> int:
        """A number that the rank of no gradient exceeds."""
        dials = self.dials
        full = min(dials.rows, dials.columns)
        if dials.tail > 0 or dials.structure == "none" or dials.white:
            return full
        return min(full, dials.rank)

    def offset(self, weights: Tensor) -> Tensor:
        """``W - W*`` in the features' basis."""
        return self.instance.inward(weights - self.instance.target[:, None])


def centred(left: Tensor) -> Tensor:
    """``A P A^T``, P the projection off the ones."""
    off = left - left.mean(2, keepdim=True)
    return off @ off.mT
