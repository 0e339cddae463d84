"""Products of stacks of matrices in half precision: by the device's units for it, else rounded once as units do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import torch

from asgo.linalg.matmul import exact_matmul

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Square: TypeAlias = Float[Tensor, "b k k"]
    Wide: TypeAlias = Float[Tensor, "b k n"]

PANELS = 4
SMALLEST_WITH_PANELS = {torch.float32: (512, 0), torch.bfloat16: (384, 400_000)}
"""From how many rows, and entries of the factor, a symmetric product by panels is the faster one on a CPU. In float32
it takes 0.75 of the time at 512 (0.61 with five times as many columns) and 0.96 at 384; in bfloat16, on units for it,
0.79 at 768 and 0.97 at 512, with twice as many columns 0.71, 0.85 and, at 384, 0.94 (0.82 with four times). On a GPU
its panels would be strided batches; there the whole product is computed."""
SLICE = 2
"""`multiply` takes so many times k columns at once: what it needs beside X is no larger."""
UNITS = {
    torch.bfloat16: torch.cpu._is_avx512_bf16_supported(),
    torch.float16: torch.cpu._is_amx_fp16_supported(),
}
"""The half precisions that this CPU has units for."""


def has_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of this dtype as they are.

    On a CPU that has no units for a half precision torch takes up to fifty times as long for them as for float32.
    """
    return device.type != "cpu" or UNITS.get(dtype, True)


def precise(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """No autocast, and for products in float32 no lower precision; half precision and graphs take the former alone."""
    if dtype.itemsize >= 4 or not (has_units(device, dtype) or torch.compiler.is_compiling()):
        return exact_matmul(device)
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def symmetric(
    X: Wide, Y: Wide | None = None, C: Square | None = None, c: float = 0.0, a: float = 1.0, exact: bool = False
) -> Square:
    """``c C + a X Y^T`` where that is symmetric but for rounding, or exactly so if asked; Y is X without one.

    On a CPU the lower triangle alone is computed, by panels of rows, where it is the faster way, and mirrored.
    """
    k, dtype = X.shape[1], X.dtype
    X, Y, C = _factors(X, X if Y is None else Y, C)
    least, entries = SMALLEST_WITH_PANELS.get(X.dtype, (k + 1, 0))
    if k < least or k * X.shape[2] < entries or X.device.type != "cpu":
        whole = _product(X, Y.mT, C, c, a).to(dtype)
        return mirrored(whole) if exact else whole
    result = X.new_empty(len(X), k, k, dtype=dtype)
    cuts = [k * i // PANELS for i in range(PANELS + 1)]
    for i, out in enumerate(result):  # batches of strided panels would be copied first
        for start, stop in pairwise(cuts):
            rows, columns = X[i, start:stop], Y[i, :stop].mT
            if C is None:
                panel = rows @ columns
            else:
                panel = torch.addmm(C[i, start:stop, :stop], rows, columns, beta=c, alpha=a)
            out[start:stop, :stop] = panel
            out[:start, start:stop] = panel[:, :start].mT
            if exact:
                mirrored(out[None, start:stop, start:stop])
    return result


def mirrored(S: Square) -> Square:
    """The lower triangle and its mirror image, in place."""
    above = transposed(S).triu_(1)
    return S.tril_().add_(above)


def transposed(S: Square) -> Square:
    """A contiguous copy of ``S^T``; on a CPU of one matrix after another, for which torch has a fourfold faster way."""
    if S.device.type != "cpu" or torch.compiler.is_compiling():
        return S.mT.contiguous()
    result = torch.empty_like(S)
    for out, matrix in zip(result, S, strict=True):
        out.copy_(matrix.mT)
    return result


def multiply(X: Wide, B: Square, c: float = 0.0) -> Wide:
    """``c X + B X`` for a symmetric B, in the memory order of X; in place, by slices of columns, where X is wide."""
    step = SLICE * max(X.shape[1], 1)
    if X.shape[2] <= step:
        return _times(X, B, c)
    for part in X.split(step, 2):
        part.copy_(_times(part, B, c))
    return X


def _times(X: Wide, B: Square, c: float) -> Wide:
    dtype = X.dtype
    X, B, C = _factors(X, B, X if c else None)
    if X.is_contiguous() or not X.mT.is_contiguous():
        return _product(B, X, C, c).to(dtype)
    return _product(X.mT, B.mT, None if C is None else C.mT, c).to(dtype).mT


def _factors(A: Wide, B: Wide, C: Wide | None) -> tuple[Wide, Wide, Wide | None]:
    """In float32 where the device has no units for their precision: a product is rounded once, as units do."""
    if has_units(A.device, A.dtype):
        return A, B, C
    wide = A.float()
    return wide, wide if B is A else B.float(), None if C is None else wide if C is A else C.float()


def _product(A: Wide, B: Wide, C: Wide | None, c: float, a: float = 1.0) -> Wide:
    return torch.bmm(A, B) if C is None else torch.baddbmm(C, A, B, beta=c, alpha=a)
