"""Functions of positive semidefinite matrices by eigendecompositions, several at once on the cores of a CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from asgo.linalg.matmul import gram

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Square: TypeAlias = Float[Tensor, "b k k"]
    PerMatrix: TypeAlias = Float[Tensor, "b 1 1"]

Weights: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(eigenvalues (b, k), scale (b, 1)) -> root of the eigenvalues' weights in Z``, i.e. ``Z = Q w^2 Q^T``."""

RESOLUTION = 2
"""Of a statistic V kept in a dtype, eigenvalues below ``RESOLUTION eps ||V||_F`` are rounding (eps of that dtype)."""
# A rounding of V moves each entry by at most eps/2 of itself, hence V by at most eps/2 ||V||_F. Those of T steps differ
# in sign and add up to about sqrt(T) eps/2 ||V||_F: measured in float32, 0.7 eps ||V||_F after 300 steps and 6 after
# 3,000. Call that e and the floor f; W is what is kept, with eigenvalues raised to f. Then W >= V - e I and W >= f I,
# so W >= f/(e + f) V, and a step by W^(-1/2) is at most sqrt(1 + e/f) times as long as one by V^(-1/2). Without a floor
# nothing bounds it: where V has null directions, what is kept has rounding of either sign.
SMALLEST = 32  # smaller matrices are done before another thread has woken up


def root(A: Square, scale: PerMatrix, weights: Weights) -> Square:
    """``Z = Q diag(w^2) Q^T`` with ``A = scale Q diag(values) Q^T`` and ``w = weights(values, scale)``."""
    return roots(A, scale, lambda values, scale: weights(values, scale)[:, None])[0]


def roots(A: Square, scale: PerMatrix, weights: Weights) -> list[Square]:
    """As `root`, with a w of shape ``(b, r, k)``: r matrices by one decomposition. No w but the last may be 0.

    LAPACK decomposes one matrix at a time and gains little from threads (at k = 384, two threads make it 1.3
    times as fast), so on a CPU the threads share the matrices instead.
    """
    threads = torch.get_num_threads()
    single = threads == 1 or len(A) < 2 or A.shape[1] < SMALLEST or torch.compiler.is_compiling()
    if single or A.device.type != "cpu":
        return _roots(A, scale, weights)
    workers = min(threads, len(A))
    shared = len(A) - len(A) % workers
    Z = _share(A[:shared], scale[:shared], weights, workers, threads)
    return Z if shared == len(A) else _joined([Z, roots(A[shared:], scale[shared:], weights)])


def _share(A: Square, scale: PerMatrix, weights: Weights, workers: int, threads: int) -> list[Square]:
    pool = _pool(os.getpid(), workers)
    each = len(A) // workers
    jobs = [
        pool.submit(_alone, threads // workers, part, part_scale, weights)
        for part, part_scale in zip(A.split(each), scale.split(each), strict=True)
    ]
    try:
        return _joined([job.result() for job in jobs])
    finally:
        torch.set_num_threads(threads)  # torch's number is per thread, the BLAS library's is not


def _joined(parts: list[list[Square]]) -> list[Square]:
    return [torch.cat(one) for one in zip(*parts, strict=True)]


@lru_cache(maxsize=4)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "asgo-eigh")  # a forked process has no threads, hence one for each


def _alone(threads: int, A: Square, scale: PerMatrix, weights: Weights) -> list[Square]:
    torch.set_num_threads(threads)
    return _roots(A, scale, weights)


@torch.no_grad()
def _roots(A: Square, scale: PerMatrix, weights: Weights) -> list[Square]:
    values, vectors = decompose(A / scale)
    found, last = [], None
    for w in weights(values.clamp_(min=0), scale[..., 0]).unbind(1):
        vectors.mul_((w if last is None else w / last)[:, None])
        # Positive semidefinite whatever the rounding, so that any NaN shows on the diagonal.
        found.append(gram(vectors))
        last = w
    return found


def resolved(values: Float[Tensor, "b k"], dtype: torch.dtype) -> Float[Tensor, "b k"]:
    """Eigenvalues (none below 0) of matrices that were kept in `dtype`, raised to what it resolves."""
    floor = RESOLUTION * torch.finfo(dtype).eps * torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return values.maximum(floor)


def decompose(A: Square) -> tuple[Float[Tensor, "b k"], Square]:
    """Eigenvalues and eigenvectors.

    One matrix that LAPACK cannot solve raises for its whole stack. Then all are tried in float64, then one
    by one; a matrix that fails even so becomes NaN, alone.
    """
    try:
        return torch.linalg.eigh(A)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        pass
    if A.dtype != torch.float64:
        values, vectors = decompose(A.double())
        return values.to(A.dtype), vectors.to(A.dtype)
    if len(A) > 1:
        values, vectors = zip(*(decompose(one[None]) for one in A), strict=True)
        return torch.cat(values), torch.cat(vectors)
    return torch.full_like(A[..., 0], math.nan), torch.full_like(A, math.nan)


def apply_to_eigenvalues(
    A: Float[Tensor, "b k k"], weigh: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, "b k k"], Bool[Tensor, "b"]]:
    """``Q weigh(values) Q^T`` by an eigendecomposition in float64, in A's dtype, and which of them can be trusted.

    Eigenvalues that A's dtype does not resolve are raised first, see `RESOLUTION`. A matrix that is not
    finite, or that cannot be decomposed, is not ``ok`` and touches no other in its stack.

    Args:
        A: the stack.
        weigh: takes eigenvalues ``(b, k)`` in float64, none below 0, and gives positive numbers.
    """
    ok = A.isfinite().flatten(1).all(1)
    values, vectors = decompose(torch.where(ok[:, None, None], A, 0).double())
    half = vectors * weigh(resolved(values.clamp(min=0), A.dtype)).sqrt()[:, None]
    result = gram(half)
    ok = ok & result.isfinite().flatten(1).all(1)
    return torch.where(ok[:, None, None], result, 0).to(A.dtype), ok


def inverse_power(
    A: Float[Tensor, "b k k"], eps: float, power: float
) -> tuple[Float[Tensor, "b k k"], Bool[Tensor, "b"]]:
    """``(A + eps I)^(-power)``, eps absolute, see `apply_to_eigenvalues`."""
    return apply_to_eigenvalues(A, lambda values: (values + eps).pow(-power))
