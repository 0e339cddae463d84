"""Inverse powers of stacks of symmetric positive semidefinite matrices, for structures with more roots than one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def inverse_power(
    A: Float[Tensor, "b k k"], eps: float, power: float
) -> tuple[Float[Tensor, "b k k"], Bool[Tensor, "b"]]:
    """``(A + eps I)^(-power)`` by an eigendecomposition in float64, in A's dtype, and which of them can be trusted.

    A matrix that is not finite, or that cannot be decomposed, is not ``ok`` and touches no other in its stack.
    """
    ok = A.isfinite().flatten(1).all(1)
    try:
        values, vectors = torch.linalg.eigh(torch.where(ok[:, None, None], A, 0).double())
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        if len(A) == 1:
            return torch.zeros_like(A), torch.zeros_like(ok)
        roots, oks = zip(*(inverse_power(one[None], eps, power) for one in A), strict=True)
        return torch.cat(roots), torch.cat(oks)
    half = vectors * (values.clamp(min=0) + eps).pow(-power / 2)[:, None]
    return (half @ half.mT).to(A.dtype), ok
