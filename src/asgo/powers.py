"""Functions of stacks of symmetric positive semidefinite matrices, for structures whose root is not in the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from asgo import eigen
from asgo.matmul import gram

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def spectral(
    A: Float[Tensor, "b k k"], weigh: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, "b k k"], Bool[Tensor, "b"]]:
    """``Q weigh(values) Q^T`` by an eigendecomposition in float64, in A's dtype, and which of them can be trusted.

    Eigenvalues that A's dtype does not resolve are raised first, see `asgo.eigen.RESOLUTION`. A matrix that is not
    finite, or that cannot be decomposed, is not ``ok`` and touches no other in its stack.

    Args:
        A: the stack.
        weigh: takes eigenvalues ``(b, k)`` in float64, none below 0, and gives positive numbers.
    """
    ok = A.isfinite().flatten(1).all(1)
    values, vectors = eigen.decompose(torch.where(ok[:, None, None], A, 0).double())
    half = vectors * weigh(eigen.resolved(values.clamp(min=0), A.dtype)).sqrt()[:, None]
    result = gram(half)
    ok = ok & result.isfinite().flatten(1).all(1)
    return torch.where(ok[:, None, None], result, 0).to(A.dtype), ok


def inverse_power(
    A: Float[Tensor, "b k k"], eps: float, power: float
) -> tuple[Float[Tensor, "b k k"], Bool[Tensor, "b"]]:
    """``(A + eps I)^(-power)``, eps absolute, see `spectral`."""
    return spectral(A, lambda values: (values + eps).pow(-power))
