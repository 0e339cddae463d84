"""The smooth problems: matrix least squares, multiclass logistic regression."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from experiments.theory.instance import Draws
from experiments.theory.problem import EXAMPLES, Problem, Round, centred

LOGITS = 2.0
"""Root mean square of the logits at W*."""


class Smooth(Problem):
    """A smooth F whose exact gradient is shown with noise of known covariance: ``f_t(W) = F(W) + <N_t, W>``."""

    smooth = True

    def prepare(self) -> None:
        """The size of the noise: by that of the first gradient."""
        zero = torch.zeros_like(self.instance.target)[:, None]
        self.unit, gradient = self.value(zero)
        first = gradient.flatten(2).norm(dim=2)
        self.size = self.dials.noise * first[:, :, None, None]

    @abstractmethod
    def value(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """``F(W) - F(W*)`` and its gradient."""

    def round(self, weights: Tensor) -> Round:
        """The gradient with new noise, the mean of as many draws as the batch has."""
        excess, gradient = self.value(weights)
        if not self.dials.noise:
            return Round(gradient, excess, excess)
        noise = self._noise()
        against = (noise * (weights - self.instance.target[:, None])).sum((2, 3))
        return Round(gradient + noise, excess + against, excess, noise)

    def _noise(self) -> Tensor:
        dials, i = self.dials, self.instance
        scale = self.size / math.sqrt(dials.batch)  # the mean of normal numbers is a normal number
        if dials.white:
            return scale * self.draws.normal(1, dials.rows, dials.columns) / math.sqrt(dials.rows * dials.columns)
        return scale * i.outward(i.features(self.draws, 1))

    def covariance(self) -> Tensor | None:
        """Of the mean over a batch."""
        i, d = self.instance, self.dials.rows * self.dials.columns
        if not self.dials.noise:
            return None
        unit = (
            torch.eye(d).to(i.target) / d
            if self.dials.white
            else i.covariance(i.left @ i.left.mT, i.right @ i.right.mT)
        )
        return self.size[:, 0] ** 2 / self.dials.batch * unit


class Squares(Smooth):
    """Matrix least squares over Gaussian features: ``F(W) - F(W*) = E <X, W - W*>^2 / 2``."""

    def value(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Closed forms of the expectation."""
        i, error = self.instance, self.offset(weights)
        left, right = i.left[:, None], i.right[:, None]
        inner = left.mT @ error @ right
        return inner.square().sum((2, 3)) / 2, i.outward(left @ inner @ right.mT)

    def moment(self) -> Tensor:
        """The Hessian."""
        i = self.instance
        return i.covariance(i.left @ i.left.mT, i.right @ i.right.mT)


class Logistic(Smooth):
    """Multiclass logistic regression: cross-entropy of ``softmax(A^T W x)`` with the labels' law, less its entropy.

    The law is given as probabilities, those at W*, so that W* is exactly the minimiser.
    """

    def prepare(self) -> None:
        """Examples ``x (R, N, n)``, and the log-probabilities ``(R, 1, classes, N)`` at W*."""
        i, draws = self.instance, Draws(self.dials.seed, self.dials.repeats, 2)
        x = draws.normal(EXAMPLES, self.dials.columns) @ i.right.mT
        z = i.left[:, None].mT @ i.inward(i.target[:, None]) @ x[:, None].mT
        scale = LOGITS / z.square().mean((1, 2, 3)).sqrt()
        self.x = x * scale[:, None, None]
        self.law = (z * scale[:, None, None, None]).log_softmax(2)
        super().prepare()

    def value(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean divergence over all examples."""
        i, x = self.instance, self.x[:, None]
        log = (i.left[:, None].mT @ i.inward(weights) @ x.mT).log_softmax(2)
        target = self.law.exp()
        # log(p/q) - 1 + q/p has the same mean under p, and no term below 0 that rounding could leave
        ratio = log - self.law
        excess = (target * (torch.expm1(ratio) - ratio)).sum(2).mean(2)
        return excess, i.outward(i.left[:, None] @ (log.exp() - target) @ x / EXAMPLES)

    def moment(self) -> Tensor:
        """``diag(q) - q q^T`` is at most half the projection off the ones, whatever q is."""
        i = self.instance
        return i.covariance(centred(i.left) / 2, self.x.mT @ self.x / EXAMPLES)
