"""Gradients and statistics whose roots are known to be easy or hard, drawn in float64 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CONDITION = 9.0
"""Of the statistics of `gentle`: its singular values lie in [1, 3]."""


def generator(seed: int) -> torch.Generator:
    """Random numbers of the CPU, the same on every machine."""
    return torch.Generator("cpu").manual_seed(seed)


def gentle(b: int, m: int, n: int, seed: int) -> Tensor:
    """``(b, m, n)`` in float64 whose singular values are evenly spaced in [1, 3], so all their grams have condition
    9 or, on the longer side, rank ``min(m, n)``."""
    k, dice = min(m, n), generator(seed)
    left, right = (torch.linalg.qr(torch.randn(b, size, k, generator=dice).double())[0] for size in (m, n))
    return (left * torch.linspace(1, 3, k, dtype=torch.float64)) @ right.mT


def drifting(k: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """A statistic ``(k, k)`` and a momentum ``(k, n)`` in float32, as training makes them.

    Twenty gradients of rank 8 that drift, in noise whose singular values fall as ``i^(-3/2)``.
    """
    dice, rank = generator(seed), min(8, k)
    noise = torch.randn(k, k, generator=dice) / k**0.5 * torch.arange(1, k + 1) ** -1.5
    start, end = torch.randn(2, k, rank, generator=dice)
    gram, momentum = torch.zeros(k, k), torch.zeros(k, n)
    for step in range(20):
        rows = start + (end - start) * (step / 20)
        gradient = rows @ torch.randn(rank, n, generator=dice) / n + noise @ torch.randn(k, n, generator=dice)
        gram, momentum = 0.95 * gram + 0.05 * gradient @ gradient.T, 0.9 * momentum + 0.1 * gradient
    return gram, momentum


def of_rank(k: int, n: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Statistic and momentum after one gradient of a rank."""
    dice = generator(seed)
    gradient = torch.randn(k, rank, generator=dice) @ torch.randn(rank, n, generator=dice) / rank**0.5
    return gradient @ gradient.T, gradient


@dataclass(frozen=True)
class Case:
    """A matrix that a root has to withstand.

    Args:
        name: what it is.
        gram: ``(k, k)``.
        momentum: ``(k, n)``, what the root is applied to.
        is_broken: whether the root has to be reported as failed.
        is_gentle: whether its eigenvalues lie within a factor of 9.
    """

    name: str
    gram: Tensor
    momentum: Tensor
    is_broken: bool = False
    is_gentle: bool = False


def cases(k: int) -> list[Case]:
    """The robustness matrices, all ``(k, k)`` so that they can stand in one stack."""
    n = 2 * k
    gram, momentum = drifting(k, n, 0)
    easy = gentle(1, k, n, 1)[0].float()
    return [
        Case("gentle", easy @ easy.T, easy, is_gentle=True),
        Case("drifting", gram, momentum),
        Case("rank 8", *of_rank(k, n, 8, 2)),
        Case("rank 1", *of_rank(k, n, 1, 3)),
        Case("identity", torch.eye(k), momentum, is_gentle=True),
        Case("zero", torch.zeros(k, k), torch.zeros(k, n)),
        Case("times 1e30", gram * 1e30, momentum * 1e15),
        Case("times 1e-30", gram * 1e-30, momentum * 1e-15),
        Case("NaN", torch.full((k, k), torch.nan), momentum, is_broken=True),
        Case("infinite", torch.full((k, k), torch.inf), momentum, is_broken=True),
        Case("one NaN", gram.index_fill(0, torch.tensor([1]), torch.nan), momentum, is_broken=True),
    ]


def exact(gram: Tensor, eps: float) -> Tensor:
    """``(V + eps ||V||_F I)^(-1/2)`` in float64 by an eigendecomposition on the gram's own device."""
    wide = gram.double()
    size = torch.linalg.vector_norm(wide)
    if not bool(size > 0):
        return torch.zeros_like(wide)
    values, vectors = torch.linalg.eigh(wide / size)
    return (vectors * (values.clamp(min=0) + eps).rsqrt()) @ vectors.mT / size.sqrt()
