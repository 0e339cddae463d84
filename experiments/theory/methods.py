"""The methods and what stands in their bounds: a distance, a trace, and how they see moments and smoothness.

All but Shampoo are AdaGrad in a matrix algebra: the statistic is ``sum g g^T`` projected on it, the step ``g`` times
its inverse root. `reduce` is that projection in short form, `trace` the trace of its root.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer

from asgo.presets import ASGO, BAG, Shampoo
from asgo.views import STACK
from experiments.full_adagrad import FullAdaGrad

OUTSIDE = 1e-8
"""eps of the methods that add it to the root."""

INSIDE = 1e-12
"""eps of the methods whose statistic starts from it."""

NEGLIGIBLE = 1e-12
"""Eigenvalues below this share of the largest are zero."""

MARGIN = 1 + 1e-9
"""A smoothness constant is rounded up by this."""


class Method(ABC):
    """One method, for matrices of m x n, m n = d."""

    @abstractmethod
    def build(self, stack: nn.Parameter) -> Optimizer:
        """The optimizer of independent matrices ``(models, m, n)``, at a step size of 1."""

    @abstractmethod
    def distance(self, error: Tensor) -> Tensor:
        """The norm of ``W - W* (..., m, n)`` that its bound is about."""

    @abstractmethod
    def measure(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """What its statistic adds for a gradient ``(..., m, n)``."""

    @abstractmethod
    def trace(self, statistic: tuple[Tensor, ...]) -> Tensor:
        """The trace in its bound, of the sums of what was measured."""

    def weight(self, rank: int) -> float:
        """The factor of the second term of its bound; `rank` is that of single gradients."""
        return 1.0

    def slack(self, factor: Tensor, first: Tensor, eta: Tensor, d: int) -> Tensor:
        """What eps adds to the bound: ``eps ||W_0 - W*||_F^2 / (2 eta)`` where it is outside the root.

        Args:
            factor: of the trace.
            first: ``||W_0 - W*||_F``.
            eta: step size.
            d: entries of W.
        """
        return OUTSIDE * first.square() / (2 * eta)


class Projection(Method):
    """AdaGrad in a matrix algebra."""

    @abstractmethod
    def reduce(self, moment: Tensor, m: int, n: int) -> Tensor:
        """``sum g g^T (R, d, d)`` as what `measure` would have added up."""

    @abstractmethod
    def expand(self, reduced: Tensor, m: int, n: int) -> tuple[Tensor, int]:
        """The projection ``(R, d, d)`` that a reduced matrix stands for, and how often that holds it."""

    def of_moment(self, moment: Tensor, m: int, n: int) -> Tensor:
        """The trace for a second moment ``(R, d, d)`` in place of a sum: ``||Q||_*`` of ASGO's theorem."""
        return self.trace((self.reduce(moment, m, n),))

    def of_hessian(self, hessian: Tensor, m: int, n: int) -> Tensor:
        """``tr L`` of a matrix L of its algebra that is at least the Hessian: the better of two such.

        A multiple of the identity, and a multiple of the Hessian's own projection. That is the smallest L there is when
        the Hessian is of the algebra, and need not be otherwise.
        """
        identity = torch.eye(m * n).to(hessian)
        projected, copies = self.expand(self.reduce(hessian, m, n), m, n)
        candidates = [_scale(hessian, D) * D.diagonal(dim1=1, dim2=2).sum(1) for D in
                      (projected, identity.expand_as(hessian))]  # fmt: skip
        return torch.minimum(*candidates) / copies * MARGIN


def _scale(hessian: Tensor, D: Tensor) -> Tensor:
    """The smallest c with ``c D >= hessian``; the range of D holds that of the Hessian."""
    values, vectors = torch.linalg.eigh(D)
    kept = values > NEGLIGIBLE * values[:, -1:]
    half = vectors * torch.where(kept, values, 1).rsqrt().mul(kept)[:, None]
    return torch.linalg.eigvalsh(half.mT @ hessian @ half)[:, -1]


def roots(matrix: Tensor, power: float = 0.5) -> Tensor:
    """``tr A^power`` of symmetric matrices ``(..., k, k)``."""
    return torch.linalg.eigvalsh(matrix).clamp_min(0).pow(power).sum(-1)


@dataclass(frozen=True)
class OneSided(Projection):
    """ASGO: ``V = sum G G^T`` from the left, ``sum G^T G`` from the right; operator norm."""

    left: bool

    def build(self, stack: nn.Parameter) -> Optimizer:
        """The library's theory form."""
        side = "left" if self.left else "right"
        return ASGO.theory([{"params": [stack], "view": STACK, "side": side}], lr=1.0, eps=OUTSIDE)

    def distance(self, error: Tensor) -> Tensor:
        """``||E||_op``."""
        return torch.linalg.eigvalsh(_gram(error, error.shape[-2] <= error.shape[-1]))[..., -1].clamp_min(0).sqrt()

    def measure(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """``G G^T`` or ``G^T G``."""
        return (_gram(gradient, self.left),)

    def trace(self, statistic: tuple[Tensor, ...]) -> Tensor:
        """``tr V^(1/2)``."""
        return roots(statistic[0])

    def reduce(self, moment: Tensor, m: int, n: int) -> Tensor:
        """The partial trace over the other side."""
        return torch.einsum("rinjn->rij" if self.left else "rmimj->rij", moment.view(-1, m, n, m, n))

    def expand(self, reduced: Tensor, m: int, n: int) -> tuple[Tensor, int]:
        """``S kron I`` or ``I kron S``."""
        other = n if self.left else m
        eye = torch.eye(other).to(reduced)
        return torch.stack([torch.kron(S, eye) if self.left else torch.kron(eye, S) for S in reduced]), other


def _gram(stack: Tensor, left: bool) -> Tensor:
    return stack @ stack.mT if left else stack.mT @ stack


@dataclass(frozen=True)
class Norm(Projection):
    """AdaGrad-Norm: one number; Frobenius norm."""

    def build(self, stack: nn.Parameter) -> Optimizer:
        """BAG with one block takes the mean of squares, hence the rate."""
        root = math.sqrt(stack.shape[1] * stack.shape[2])
        return BAG([{"params": [stack], "view": STACK}], lr=1 / root, eps=OUTSIDE / root)

    def distance(self, error: Tensor) -> Tensor:
        """``||E||_F``."""
        return _frobenius(error)

    def measure(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """``||G||_F^2``."""
        return (gradient.square().sum((-2, -1)),)

    def trace(self, statistic: tuple[Tensor, ...]) -> Tensor:
        """The root of the sum."""
        return statistic[0].sqrt()

    def reduce(self, moment: Tensor, m: int, n: int) -> Tensor:
        """The trace."""
        return moment.diagonal(dim1=1, dim2=2).sum(1)

    def expand(self, reduced: Tensor, m: int, n: int) -> tuple[Tensor, int]:
        """A multiple of the identity."""
        return reduced[:, None, None] / (m * n) * torch.eye(m * n).to(reduced), m * n


@dataclass(frozen=True)
class Diagonal(Projection):
    """Diagonal AdaGrad: one number for each entry; largest entry."""

    def build(self, stack: nn.Parameter) -> Optimizer:
        """torch's own."""
        return Adagrad([stack], lr=1.0, eps=OUTSIDE)

    def distance(self, error: Tensor) -> Tensor:
        """``max |E_ij|``."""
        return error.abs().amax((-2, -1))

    def measure(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """``G_ij^2``."""
        return (gradient.square().flatten(-2),)

    def trace(self, statistic: tuple[Tensor, ...]) -> Tensor:
        """``sum_ij (sum_t G_ij^2)^(1/2)``."""
        return statistic[0].sqrt().sum(-1)

    def reduce(self, moment: Tensor, m: int, n: int) -> Tensor:
        """The diagonal."""
        return moment.diagonal(dim1=1, dim2=2)

    def expand(self, reduced: Tensor, m: int, n: int) -> tuple[Tensor, int]:
        """A diagonal matrix."""
        return torch.diag_embed(reduced), 1


@dataclass(frozen=True)
class Full(Projection):
    """Full-matrix AdaGrad: a d x d matrix; Frobenius norm."""

    def build(self, stack: nn.Parameter) -> Optimizer:
        """The reference of the glm experiment."""
        return FullAdaGrad([stack], lr=1.0, eps=INSIDE)

    def distance(self, error: Tensor) -> Tensor:
        """``||E||_F``."""
        return _frobenius(error)

    def measure(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """``g g^T``."""
        flat = gradient.flatten(-2)
        return (flat[..., :, None] * flat[..., None, :],)

    def trace(self, statistic: tuple[Tensor, ...]) -> Tensor:
        """``tr (sum g g^T)^(1/2)``."""
        return roots(statistic[0])

    def slack(self, factor: Tensor, first: Tensor, eta: Tensor, d: int) -> Tensor:
        """eps inside the root: it adds at most ``d eps^(1/2)`` to the trace."""
        return factor * d * math.sqrt(INSIDE)

    def reduce(self, moment: Tensor, m: int, n: int) -> Tensor:
        """The moment itself."""
        return moment

    def expand(self, reduced: Tensor, m: int, n: int) -> tuple[Tensor, int]:
        """The matrix itself."""
        return reduced, 1


@dataclass(frozen=True)
class TwoSided(Method):
    """Two-sided Shampoo: ``L^(-1/4) G R^(-1/4)``; Frobenius norm."""

    def build(self, stack: nn.Parameter) -> Optimizer:
        """Algorithm 1 of its paper: sums, no momentum."""
        return Shampoo([{"params": [stack], "view": STACK}], lr=1.0, betas=(0.0, 1.0), eps=INSIDE)

    def distance(self, error: Tensor) -> Tensor:
        """``||E||_F``."""
        return _frobenius(error)

    def measure(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """Both grams."""
        return _gram(gradient, True), _gram(gradient, False)

    def trace(self, statistic: tuple[Tensor, ...]) -> Tensor:
        """``tr L^(1/4) tr R^(1/4)``, with the eps they start from."""
        left, right = (roots(side + INSIDE * torch.eye(side.shape[-1]).to(side), 0.25) for side in statistic)
        return left * right

    def weight(self, rank: int) -> float:
        """Its paper's: a gradient of rank r costs r times as much."""
        return float(rank)

    def slack(self, factor: Tensor, first: Tensor, eta: Tensor, d: int) -> Tensor:
        """The trace has it."""
        return torch.zeros_like(factor)


def _frobenius(error: Tensor) -> Tensor:
    return error.flatten(-2).norm(dim=-1)


METHODS: dict[str, Method] = {
    "asgo": OneSided(left=True),
    "asgo-right": OneSided(left=False),
    "adagrad": Diagonal(),
    "adagrad-norm": Norm(),
    "full-adagrad": Full(),
    "shampoo": TwoSided(),
}
"""ASGO from the left, as in its theorem, and from the right; its rivals."""
