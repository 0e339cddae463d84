"""The problems that are not smooth: matrix regression with absolute loss, multiclass hinge loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asgo.lab.errors import LabError
from experiments.theory.instance import Draws
from experiments.theory.problem import EXAMPLES, Problem, Round, centred

SMALLEST = 1e-9
"""Margins below this share of the largest are rounding."""


class Absolute(Problem):
    """Matrix regression: ``f_t(W) = mean |<X, W> - y|``, ``y = <X, W*> + noise``, X and noise Gaussian."""

    def prepare(self) -> None:
        """The size of the noise: that of the first residuals."""
        error = self.offset(torch.zeros_like(self.instance.target)[:, None])
        self.sigma = self.dials.noise * self._spread(error)
        self.unit = self._excess(error)

    def _spread(self, error: Tensor) -> Tensor:
        """The standard deviation of ``<X, error>``."""
        i = self.instance
        return (i.left[:, None].mT @ error @ i.right[:, None]).flatten(2).norm(dim=2)

    def _excess(self, error: Tensor) -> Tensor:
        """The mean of ``|r|`` for a normal r is ``sqrt(2/pi)`` times its standard deviation."""
        return math.sqrt(2 / math.pi) * (torch.hypot(self._spread(error), self.sigma) - self.sigma)

    def round(self, weights: Tensor) -> Round:
        """A batch of new examples."""
        i, batch = self.instance, self.dials.batch
        error, x = self.offset(weights), i.features(self.draws, batch)
        noise = self.sigma * self.draws.normal(batch)
        residual = error.flatten(2) @ x.flatten(2).mT - noise[:, None]
        gradient = (residual.sign() @ x.flatten(2) / batch).view_as(error)
        regret = residual.abs().mean(2) - noise.abs().mean(1, keepdim=True)
        return Round(i.outward(gradient), regret, self._excess(error))

    def moment(self) -> Tensor:
        """``E X X^T``; the gradient is a mean of ``+-X``."""
        i = self.instance
        return i.covariance(i.left @ i.left.mT, i.right @ i.right.mT)


class Hinge(Problem):
    """Multiclass hinge loss: ``max_j ([j != y] + z_j) - z_y`` with ``z = A^T W x``, one of the rows' m classes each.

    Of twice as many examples those are kept that W* separates best, and x is scaled so that the smallest margin is 1:
    ``F(W*) = 0``.
    """

    def prepare(self) -> None:
        """Examples ``x (R, N, n)`` and labels ``(R, N)``."""
        i, draws = self.instance, Draws(self.dials.seed, self.dials.repeats, 2)
        x = draws.normal(2 * EXAMPLES, self.dials.columns) @ i.right.mT
        top = self._scores(i.target[:, None], x)[:, 0].topk(2, dim=1)
        margin, order = (top.values[:, 0] - top.values[:, 1]).sort(dim=1, descending=True)
        kept, scale = order[:, :EXAMPLES], margin[:, EXAMPLES - 1]
        if not (scale > SMALLEST * margin[:, 0]).all():
            raise LabError("hinge: W* tells no classes apart with these dials. Pass another --seed, --rank or --tail.")
        self.labels = top.indices[:, 0].gather(1, kept)
        # A hair more than 1, lest rounding make a loss at W* of it.
        self.x = x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2])) / scale[:, None, None] * (1 + 1e-12)
        self.unit = torch.ones(self.dials.repeats, 1, dtype=torch.float64)

    def _scores(self, weights: Tensor, x: Tensor) -> Tensor:
        """``z (R, S, classes, N)``."""
        return self.instance.left[:, None].mT @ self.instance.inward(weights) @ x[:, None].mT

    def round(self, weights: Tensor) -> Round:
        """A batch of examples, drawn with replacement."""
        i, dials = self.instance, self.dials
        chosen = self.draws.integers(EXAMPLES, dials.batch)
        wrong = self.draws.uniform(dials.batch) < dials.noise
        shift = 1 + self.draws.integers(dials.rows - 1, dials.batch)
        labels = torch.where(wrong, self.labels.gather(1, chosen) + shift, self.labels.gather(1, chosen)) % dials.rows
        x = self.x.gather(1, chosen[:, :, None].expand(-1, -1, dials.columns))
        loss, rival = self._loss(self._scores(weights, x), labels)
        best, _ = self._loss(self._scores(i.target[:, None], x), labels)
        slope = _one_hot(rival, dials.rows) - _one_hot(labels[:, None].expand_as(rival), dials.rows)
        gradient = i.left[:, None] @ slope @ x[:, None] / dials.batch
        excess = self._mean_loss(weights) - self._mean_loss(i.target[:, None])
        return Round(i.outward(gradient), loss.mean(2) - best.mean(2), excess)

    def _loss(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss ``(R, S, N)`` of every example and the class that has it."""
        labels = labels[:, None, None].expand(-1, z.shape[1], 1, -1)
        augmented = (z + 1).scatter(2, labels, z.gather(2, labels))
        value, rival = augmented.max(2)
        return value - z.gather(2, labels)[:, :, 0], rival

    def _mean_loss(self, weights: Tensor) -> Tensor:
        """``F (R, S)``: over all examples and all labels that they can have."""
        z, p = self._scores(weights, self.x), self.dials.noise
        total = (1 - p) * self._loss(z, self.labels)[0].mean(2)
        for shift in range(1, self.dials.rows if p else 1):
            total += p / (self.dials.rows - 1) * self._loss(z, (self.labels + shift) % self.dials.rows)[0].mean(2)
        return total

    def moment(self) -> Tensor:
        """A slope is ``e_j - e_y``, so ``G G^T`` is at most ``2 A P A^T |x|^2``, P the projection off the ones."""
        i = self.instance
        return i.covariance(2 * centred(i.left), self.x.mT @ self.x / EXAMPLES)

    @property
    def gradient_rank(self) -> int:
        """At most one for every example."""
        rank = super().gradient_rank
        return rank if self.dials.structure == "none" else min(rank, self.dials.batch)


def _one_hot(classes: Tensor, count: int) -> Tensor:
    """``(..., N)`` to ``(..., classes, N)``."""
    return torch.nn.functional.one_hot(classes, count).mT.to(torch.float64)
