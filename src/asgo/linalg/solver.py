"""What all inverse roots have in common: the scale of a matrix, zero matrices, and failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch

from asgo.linalg.masked import where
from asgo.linalg.matmul import exact_matmul

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    Square: TypeAlias = Float[Tensor, "b k k"]
    PerMatrix: TypeAlias = Float[Tensor, "b 1 1"]
    Result: TypeAlias = tuple[Square, Bool[Tensor, "b"]]
    Solver: TypeAlias = Callable[[Square, PerMatrix, float], Square]


def check_stack(A: Square) -> None:
    """Raise `ValueError` unless A is a stack ``(b, k, k)`` in float32 or float64."""
    if A.ndim != 3 or A.shape[-1] != A.shape[-2] or A.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"root got {A.dtype} of shape {tuple(A.shape)}: it takes float32 or float64 of shape (b, k, k). "
            "Pass A[None] for a single matrix, A.float() for half precision"
        )


def eye_of(A: Square) -> Float[Tensor, "k k"]:
    """The identity of A's size, dtype and device."""
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def solve(solver: Solver, A: Square, eps: float, dtype: torch.dtype | None = None) -> Result:
    """Root of A by a solver ``(A, scale, eps) -> root of A / scale``, times ``scale^(-1/2)``.

    The largest entry of ``A / scale`` is in [1, 2), so that its norm can be squared whatever the range of A. In
    place of a matrix that is zero or not finite the solver meets the identity. It marks a failure by a diagonal
    that is not finite. It works in ``dtype`` (A's own if None); the result has A's.
    """
    check_stack(A)
    own, A = A.dtype, A.to(dtype or A.dtype)
    if A.numel() == 0:
        return torch.zeros_like(A, dtype=own), torch.ones(len(A), dtype=torch.bool, device=A.device)
    top = A.diagonal(dim1=-2, dim2=-1).amax(dim=-1)  # no entry of a semidefinite matrix is larger
    finite = A.sum(dim=-1).isfinite().all(dim=-1)  # a sum keeps NaN and infinity, and costs one pass
    live = (finite & (top > 0))[:, None, None]
    scale = where(live, top[:, None, None], 1.0)
    scale = scale / (2 * torch.frexp(scale).mantissa)  # a power of two: exact
    with exact_matmul(A.device):
        Z = solver(where(live, A, eye_of(A)), scale, eps)
    ok = finite & Z.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=-1)
    return where(ok[:, None, None] & live, Z, 0.0).to(own), ok
