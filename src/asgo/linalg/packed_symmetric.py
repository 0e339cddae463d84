"""Symmetric matrices as triangles, in half the memory and without rounding.

The lower triangle of a ``k x k`` matrix fills a rectangle of ``k (k + 1) / 2`` numbers: the left half of its columns
as they are, and the rest of it, transposed, where those columns would hold the upper triangle. For k = 4 and k = 5,
with r for the row and c for the column of the number ``rc``::

    22 32          00 33 43
    00 33          10 11 44
    10 11          20 21 22
    20 21          30 31 32
    30 31          40 41 42

So both directions are copies of blocks, without an index of places that would have to be kept. It is the rectangular
full packed format of "Rectangular Full Packed Format for Cholesky's Algorithm", Gustavson, Wasniewski, Dongarra and
Langou 2010.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

    Square: TypeAlias = Float[Tensor, "*b k k"]
    Rectangle: TypeAlias = Float[Tensor, "*b rows columns"]


LEAF = 96
"""Size of the blocks on the diagonal on a CPU: of 48 to 384 among the fastest at every k from 64 to 1,024."""


def rectangle(k: int) -> tuple[int, int]:
    """Rows and columns of the triangle of a ``k x k`` matrix: ``(k + 1, k / 2)``, or ``(k, (k + 1) / 2)`` for odd k."""
    return k + 1 - k % 2, (k + 1) // 2


def size(P: Rectangle) -> int:
    """The k of a packed matrix."""
    rows, columns = P.shape[-2:]
    return min(rows, 2 * columns)


def pack(S: Square) -> Rectangle:
    """The lower triangle; what stands above is not read."""
    rows, columns = rectangle(S.shape[-1])
    P = S.new_empty(*S.shape[:-2], rows, columns)
    left, corner = _halves(P)
    left.copy_(S[..., :columns])
    _copy_lower(S[..., columns:, columns:], corner.mT)
    return P


def unpack(P: Rectangle) -> Square:
    """The whole symmetric matrix whose lower triangle is given."""
    left, corner = _halves(P)
    k, columns = left.shape[-2:]
    S = P.new_empty(*P.shape[:-2], k, k)
    S[..., :columns] = left
    S[..., :columns, columns:] = left[..., columns:, :].mT
    S[..., columns:, columns:] = corner
    _copy_lower(left[..., :columns, :], S[..., :columns, :columns].mT)
    _copy_lower(corner.mT, S[..., columns:, columns:])
    return S


def diagonal(S: Square | Rectangle) -> Float[Tensor, "*b k"]:
    """The diagonal of a matrix, whole or packed."""
    if S.shape[-2] == S.shape[-1]:  # packed too, for k = 1
        return S.diagonal(dim1=-2, dim2=-1)
    return torch.cat([half.diagonal(dim1=-2, dim2=-1) for half in _halves(S)], -1)


def _halves(P: Rectangle) -> tuple[Tensor, Tensor]:
    """Views: the left columns ``(k, columns)``, and the square whose upper triangle is the rest."""
    rows, columns = P.shape[-2:]
    k = size(P)
    even = rows - k
    return P[..., even:, :], P[..., : k - columns, 1 - even :]


def _copy_lower(A: Square, out: Square) -> None:
    """Copy the diagonal and what is below it, into a view.

    By halves on a CPU, where copies of blocks cost half of what a mask over rows and columns does; elsewhere at once.
    """
    k = A.shape[-1]
    if k > LEAF and A.device.type == "cpu":
        half = k // 2
        _copy_lower(A[..., :half, :half], out[..., :half, :half])
        out[..., half:, :half] = A[..., half:, :half]
        _copy_lower(A[..., half:, half:], out[..., half:, half:])
        return
    i = torch.arange(k, device=A.device)
    below = i[:, None] >= i
    if torch.compiler.is_compiling():  # a graph that is traced takes no view as `out`
        out.copy_(torch.where(below, A, out))
    else:
        torch.where(below, A, out, out=out)
