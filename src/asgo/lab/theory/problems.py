"""The convex problems: their rounds, their known best matrix, and the constants of the bounds.

A round shows a convex function ``f_t`` with ``E f_t = F``. `W*` minimises ``F`` (for the hinge loss with wrong labels
it is only a comparator). All of ``F(W) - F(W*)``, the gradient, the second moment of gradients, the smoothness and the
covariance of the noise are closed forms or sums over all data: nothing is estimated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from asgo.lab.errors import LabError
from asgo.lab.theory.instance import Dials, Draws, Instance, make

EXAMPLES = 256
"""Examples of the classification problems."""

SMALLEST = 1e-9
"""Margins below this share of the largest are rounding."""

LOGITS = 2.0
"""Root mean square of the logits at W*."""


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

    def __init__(self, dials: Dials) -> None:
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
        return i.covariance(2 * _centred(i.left), self.x.mT @ self.x / EXAMPLES)

    @property
    def gradient_rank(self) -> int:
        """At most one for every example."""
        rank = super().gradient_rank
        return rank if self.dials.structure == "none" else min(rank, self.dials.batch)


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
        return i.covariance(_centred(i.left) / 2, self.x.mT @ self.x / EXAMPLES)


def _centred(left: Tensor) -> Tensor:
    """``A P A^T``, P the projection off the ones."""
    off = left - left.mean(2, keepdim=True)
    return off @ off.mT


def _one_hot(classes: Tensor, count: int) -> Tensor:
    """``(..., N)`` to ``(..., classes, N)``."""
    return torch.nn.functional.one_hot(classes, count).mT.to(torch.float64)


PROBLEMS: dict[str, type[Problem]] = {
    "absolute": Absolute,
    "hinge": Hinge,
    "squares": Squares,
    "logistic": Logistic,
}
"""Two that are not smooth, two that are."""
