"""Singular values of stacks of matrices, and what they say of rank.

For singular values ``s_1 >= s_2 >= ... >= s_k``:

======================  ==============================  =================================================
stable rank             ``sum s^2 / s_1^2``             1 to the rank: how many directions carry energy
effective rank          ``exp(H(s / sum s))``           1 to the rank: H is the entropy ("The effective
                                                        rank", Roy and Vetterli, 2007)
nuclear over Frobenius  ``sum s / sqrt(sum s^2)``       1 to the root of the rank: what ASGO's bound pays
                                                        for the gradient against what AdaGrad-Norm's does
======================  ==============================  =================================================

None of them depends on the gradient's scale. Of a matrix that is zero or not finite they are NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asgo._types import Stack
from asgo.linalg import spectral
from asgo.linalg.matmul import exact_matmul

if TYPE_CHECKING:
    from jaxtyping import Float


def eigenvalues(A: Float[Tensor, "b k k"]) -> Float[Tensor, "b k"]:
    """Eigenvalues of symmetric matrices in ascending order, in float64; NaN for a matrix that is not finite."""
    A = A.double()
    finite = A.isfinite().flatten(1).all(1)[:, None]
    sound = torch.where(finite[..., None], A, 0)
    try:
        values = torch.linalg.eigvalsh(sound)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        values, _ = spectral.decompose(sound)
    return torch.where(finite, values, torch.nan)


def singular_values(stack: Stack) -> Float[Tensor, "b k"]:
    """The ``k = min(m, n)`` singular values of every matrix, descending, in float64.

    Roots of the eigenvalues of the shorter side's gram in float64: several times as fast as a decomposition, and
    what lies below 1e-8 of the largest is rounding. NaN for a matrix that is not finite.

    Args:
        stack: ``(b, m, n)`` of any precision.
    """
    b, m, n = stack.shape
    if stack.numel() == 0:
        return stack.new_zeros(b, min(m, n), dtype=torch.float64)
    wide = (stack if m <= n else stack.mT).double()
    size = wide.abs().amax((1, 2), keepdim=True)
    wide = wide / torch.where(size > 0, size, 1)  # so that no square leaves the range of float64
    with exact_matmul(stack.device):
        values = eigenvalues(wide @ wide.mT)
    return values.clamp(min=0).sqrt().flip(1) * size[..., 0]


def stable_rank(values: Float[Tensor, "b k"]) -> Float[Tensor, "b"]:
    """``sum s^2 / s_1^2`` of singular values in descending order."""
    return (values / values[:, :1]).square().sum(1)


def effective_rank(values: Float[Tensor, "b k"]) -> Float[Tensor, "b"]:
    """``exp(-sum p log p)`` with ``p = s / sum s``."""
    p = values / values.sum(1, keepdim=True)
    return torch.special.entr(p).sum(1).exp()


def nuclear_over_frobenius(values: Float[Tensor, "b k"]) -> Float[Tensor, "b"]:
    """``sum s / sqrt(sum s^2)``."""
    unit = values / values[:, :1]
    return unit.sum(1) / unit.square().sum(1).sqrt()
