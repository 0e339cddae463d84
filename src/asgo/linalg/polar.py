"""Polar factors of stacks of matrices in half precision: ``A -> (A A^T)^(-1/2) A``, by matrix products alone.

Every step applies an odd polynomial ``p`` to the singular values::

    R = X X^T;   B = c1 R + c2 R^2 (+ c3 R^3 + c4 R^4);   X <- c0 X + B X

`minimax.chain` chooses the polynomials: each is the best one on the interval that the chain has reached, which starts
at ``[low, 1]``. A is divided by its Schatten 4-norm ``s = ||A A^T||_F^(1/2)`` first: no singular value is larger, it
comes with the first R, and it is less than the Frobenius norm, by the fourth root of the rank if all are equal.
Singular values of A in ``[low s, s]`` come out within `tolerance` of 1. A smaller ``sigma`` comes out as
``sigma amplification / s`` at most, with ``amplification`` the product of all ``c0``. That is the damping, as by an
``eps = 1 / amplification^2`` relative to ``||V||_F`` in a root of ``V = A A^T``. "The Polar Express", Amsel, Persson,
Musco and Gower 2025, has the theory of the polynomials.

The plain form above corrects itself: it forms ``R`` anew in every step, so that rounding in one step is an error in the
input of the next. That is why it works in bfloat16, where the coupled iteration of `asgo.linalg.polynomial` fails.

The last steps may run in Gram form, on ``k x k`` matrices only::

    R = X X^T;   P = c0 I + B(R);   R <- P R P;   Q <- P Q;   ...   X <- Q X

It saves products with the long side and does not correct itself, so it serves where all singular values are of one
size. An error of rounding in R is relative to its largest eigenvalue, and the Gram form magnifies it by the condition
of R: ``(high / low)^2`` on the interval that the plain steps have reached, `Plan.condition`.

Of a matrix of which only ``V = A A^T`` is at hand, `cholesky_root` takes the polar factor of a Cholesky factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from asgo._types import Root
from asgo.linalg import half_precision, polynomial
from asgo.linalg.half_precision import multiply, precise, symmetric
from asgo.linalg.masked import known_all_true, where
from asgo.linalg.polynomial import Odd
from asgo.linalg.solver import solve

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from asgo.linalg.half_precision import Square, Wide

    PerMatrix: TypeAlias = Float[Tensor, "b 1 1"]
    Blocks: TypeAlias = Sequence[tuple[Wide, float]]

IN_RANGE = (1e-12, 1e12)
"""Norms of matrices whose entries' squares float32 holds, but for entries of 1e-7 of the norm and less."""
SLICE_ENTRIES = 1 << 17
"""Entries of a slice on a CPU: what it takes beside the result stays in the cache."""
HEALTHY_NORM = (0.5, 2.0)
"""Where ``||X A^T||_F`` must be if ``||A||_F = 1``: in exact arithmetic it is 1 within the tolerance."""


@dataclass(frozen=True)
class Plan:
    """How to compute a polar factor.

    Args:
        dtype: of all products.
        low: the smallest singular value, relative to ``||A A^T||_F^(1/2)``, that comes out within `tolerance` of 1.
        steps: the polynomials' coefficients.
        gram: how many of the last steps run in Gram form.
        frobenius: the steps start at ``A / ||A||_F``, as Muon's do; `low` is relative to that norm then.
    """

    dtype: torch.dtype
    low: float
    steps: tuple[Odd, ...]
    gram: int = 0
    frobenius: bool = False

    @property
    def tolerance(self) -> float:
        """Largest distance of a singular value of X from 1 if A's are in ``[low, 1]``, in exact arithmetic."""
        return max(abs(1 - end) for end in _interval(self.low, self.steps))

    @property
    def amplification(self) -> float:
        """What the smallest singular values are multiplied by."""
        return math.prod(step[0] for step in self.steps)

    @property
    def condition(self) -> float:
        """Condition number of the Gram form's first ``R`` if the singular values of A are in ``[low, 1]``."""
        low, high = _interval(self.low, self.steps[: len(self.steps) - self.gram])
        return (high / low) ** 2

    def products(self, k: int, n: int) -> float:
        """Cost of the factor of a ``k x n`` matrix, in products of ``2 k^3`` operations each."""
        if k == 0:
            return 0.0
        inner = sum((len(step) - 1) // 2 for step in self.steps)
        plain = len(self.steps) - self.gram
        return 2 * n / k * (plain + (self.gram > 0)) + inner + 3 * max(self.gram - 1, 0)


HALF_CUSHION = 1.02
"""Room above the interval of every polynomial in half precision. The largest singular value is 1 where one direction
dominates; rounding lifts it, and the first two polynomials are steep there. With 1.01 S S^T is off by 10 % once in some
hundred steps of such matrices, with 1.02 by 3 %."""


def plan(dtype: torch.dtype, low: float, degrees: tuple[Literal[5, 9], ...], gram: int = 0) -> Plan:
    """The `Plan` of the best polynomials of these degrees; 5 takes one product of its own, 9 takes two."""
    cushion = HALF_CUSHION if dtype.itemsize < 4 else polynomial.CUSHION
    return Plan(dtype, low, polynomial.chain(low, degrees, cushion), gram)


def _interval(low: float, steps: tuple[Odd, ...]) -> tuple[float, float]:
    """Where the steps take ``[low, 1]``: the images of a fine grid, as no polynomial is monotonic there."""
    x = torch.logspace(math.log10(low), 0, 20001, dtype=torch.float64, device="cpu")
    for step in steps:
        x = sum((c * x ** (2 * i + 1) for i, c in enumerate(step)), torch.zeros_like(x))
    return float(x.min()), float(x.max())


_PLANS: dict[str, Plan] = {}


def plans() -> dict[str, Plan]:
    """The plans by name, computed when first asked for.

    `low` of a half precision is what 5 quintics (of deep plans 6, of fast ones 3 and one of degree 9) reach with
    a tolerance of about the rounding of bfloat16. Of the Gram steps a simulation with the worst rounding
    (`benchmarks/square_root`) allows two: the largest error is 3e-2 in bfloat16 and 6e-3 in float16 then; with three
    7e-1 and 5e-2. A step of degree 9 before them makes bfloat16 diverge.
    """
    if not _PLANS:  # a dict and no `functools.cache`, which `torch.compile` would trace through
        _PLANS.update(_plans())
    return _PLANS


def _plans() -> dict[str, Plan]:
    return {
        "bf16": plan(torch.bfloat16, 4e-3, (5,) * 5, gram=2),
        "bf16_deep": plan(torch.bfloat16, 1.5e-3, (5,) * 6, gram=2),
        "bf16_fast": plan(torch.bfloat16, 8e-3, (5, 5, 5, 9), gram=2),
        "fp16": plan(torch.float16, 4e-3, (5,) * 5, gram=2),
        "fp16_deep": plan(torch.float16, 1.5e-3, (5,) * 6, gram=2),
        "fp16_fast": plan(torch.float16, 8e-3, (5, 5, 5, 9), gram=2),
        "fp32": plan(torch.float32, 2e-3, (5,) * 6),
        "fp64": plan(torch.float64, 1e-4, (5,) * 11),
    }


def __getattr__(name: str) -> dict[str, Plan]:
    if name == "PLANS":
        return plans()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def plan_for(precision: str, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan called `precision`; of "auto" the fastest one that the device is built for.

    That is float64 for a state in float64; float16 on CUDA, which has the rate of bfloat16 and an eighth of its
    rounding; bfloat16 on CPUs with units for it; else float32.

    Raises:
        ValueError: there is no plan of that name.
    """
    if precision != "auto":
        if precision not in plans():
            known = ", ".join(map(repr, ["auto", *plans()]))
            raise ValueError(f"square root got precision={precision!r}: choose one of {known}")
        return plans()[precision]
    if dtype == torch.float64:
        return plans()["fp64"]
    if device.type == "cuda":
        return plans()["fp16"]
    here = device.type in ("cpu", "meta")  # what is on "meta" will be on this CPU
    slow = here and not half_precision.UNITS[torch.bfloat16]
    return plans()["fp32" if slow else "bf16"]


def polar_and_root(
    A: Blocks, plan: Plan, carried: Wide | None = None, root: bool = True, out: Wide | None = None
) -> tuple[Wide, Square | None, PerMatrix, Bool[Tensor, "b"]]:
    """The polar factor and the square root of ``A A^T``, for a stack.

    Nothing waits for the device, nothing depends on the data but by masks.

    Args:
        A: its blocks of columns ``(b, k, n_i)``, each with a factor; the first in float32 or float64. They may be of
            any size, as A is divided by its norm first.
        plan: precision and polynomials.
        carried: ``(b, k, c)``, multiplied by ``(A A^T)^(-1/2)`` in the place of A. Directions that it has and A has not
            are multiplied by ``plan.amplification / ||A A^T||_F^(1/2)``.
        root: whether to compute the root.
        out: where X is written; a new tensor without it.

    Returns:
        ``X``: the columns of the polar factor that belong to the first block, or what is carried times the root, in the
        dtype of the first block; ``S / norm``, exactly symmetric, in the precision of the plan, or None; the ``norm``
        of A, ``(b, 1, 1)``; and ``ok``, ``(b,)``. X and S are 0 for A = 0, which is ok, and for matrices with NaN or
        infinity and those whose iteration has diverged, which are not.
    """
    first = A[0][0]
    X, norm = normalised(A, plan.dtype)
    finite, n, stack, scale = norm.isfinite(), X.shape[2], X, None
    if carried is not None:
        D, size = normalised([(carried, 1.0)], plan.dtype)
        stack, finite, scale = _beside(X, D), finite & size.isfinite(), size / where(norm > 0, norm, 1.0)
    with precise(first.device, plan.dtype):
        factor = iterate(stack, plan, n)
        S = symmetric(factor[..., :n], X, exact=True) if root else None
    del X, stack  # the most memory is what this leaves and the result
    out = torch.empty_like(first if carried is None else carried) if out is None else out
    out.copy_(factor[..., : first.shape[2]] if scale is None else factor[..., n:])
    out = out if scale is None else out.mul_(scale)
    good = finite if S is None else finite & _is_healthy(S, norm)
    good = good & _norm(out).isfinite() if S is None or scale is not None else good
    if not known_all_true(good):
        out.copy_(torch.where(good, out, 0.0))
    return out, None if S is None else where(good, S, 0.0), norm, good[:, 0, 0]


def cholesky_root(plan: Plan) -> Root:
    """The root ``V^(-1/2) = X L^(-1)`` with ``V + eps ||V||_F I = L L^T`` and X the polar factor of L, by a plan.

    X is orthogonal, and its iteration on the square L corrects itself, so that half precision does: of the products of
    an iteration for ``V^(-1/2)`` itself none may be in less than float32. The other two steps, in the precision of V,
    take ``5/6`` of one. A root as in `asgo.linalg.inverse_root`, symmetric within the error of the plan.
    """

    def solver(V: Square, scale: PerMatrix, eps: float) -> Square:
        V = V / scale
        V.diagonal(dim1=1, dim2=2).add_(eps * torch.linalg.vector_norm(V, dim=(1, 2))[:, None])
        L, info = torch.linalg.cholesky_ex(V)
        X, _ = normalised([(L, 1.0)], plan.dtype)
        X = iterate(X, plan, X.shape[2]).to(V.dtype)
        Z = torch.linalg.solve_triangular(L, X, upper=False, left=False)
        return torch.where((info == 0)[:, None, None], Z * scale.rsqrt(), math.nan)

    return lambda A, eps: solve(solver, A, eps)


def normalised(A: Blocks, dtype: torch.dtype) -> tuple[Wide, PerMatrix]:
    """``A / ||A||_F`` in another precision, and the norm, which is NaN or infinite if A is; such an A gives 0.

    Where squares might overflow or vanish, a power of two of the size of the largest entry is taken out first.
    """
    first = A[0][0]
    norm = _norm_in_range(A)
    if norm is not None:
        return _scaled(A, norm.reciprocal(), dtype), norm
    top = torch.cat([largest(block).to(first.dtype) * factor for block, factor in A], 2).amax(2, keepdim=True)
    live = top.isfinite() & (top >= torch.finfo(first.dtype).tiny)
    exponent = torch.frexp(where(live, top, 1.0)).exponent.clamp(-125, 126)  # both powers are normal in float32
    unit = torch.ldexp(torch.ones_like(top), -exponent)  # a product with a small tensor: ldexp of A takes 10 times that
    norm = _norm_of([torch.linalg.vector_norm(B * unit, dim=(1, 2), keepdim=True) * c for B, c in A])
    unit = unit / norm
    X = where(live, _scaled(A, unit, dtype), 0.0)
    return X, where(live, torch.ldexp(norm, exponent), where(top.isfinite(), 0.0 * top, top))


def _scaled(A: Blocks, unit: PerMatrix, dtype: torch.dtype) -> Wide:
    """The blocks times `unit`, side by side, in the memory order of the first; on a CPU by slices, in the cache."""
    first = A[0][0]
    if first.device.type != "cpu" or torch.compiler.is_compiling():
        return _beside(*[(block * (unit * factor)).to(dtype) for block, factor in A])
    (b, k, _), width = first.shape, sum(block.shape[2] for block, _ in A)
    X = first.new_empty(b, width, k, dtype=dtype).mT if _is_turned(first) else first.new_empty(b, k, width, dtype=dtype)
    start = 0
    for block, factor in A:
        columns, scale, axis = X[..., start : start + block.shape[2]], unit * factor, 2 if _is_turned(block) else 1
        step = max(1, SLICE_ENTRIES * block.shape[axis] // max(block.numel(), 1))
        for out, part in zip(columns.split(step, axis), block.split(step, axis), strict=True):
            out.copy_(part * scale)
        start += block.shape[2]
    return X


def _norm_in_range(A: Blocks) -> PerMatrix | None:
    """The norm, if it is known that no square is out of range; None elsewhere than on a CPU, which alone may look."""
    first = A[0][0]
    if first.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    norm = _norm_of([torch.linalg.vector_norm(B.to(first.dtype), dim=(1, 2), keepdim=True) * c for B, c in A])
    return norm if known_all_true((norm > IN_RANGE[0]) & (norm < IN_RANGE[1])) else None


def _norm_of(norms: Sequence[PerMatrix]) -> PerMatrix:
    return torch.linalg.vector_norm(torch.cat(list(norms), 2), dim=2, keepdim=True)


def largest(A: Wide) -> PerMatrix:
    """The largest absolute value of every matrix, NaN where it has one; 0 of a matrix without entries."""
    if 0 in A.shape:
        return A.new_zeros(len(A), 1, 1)
    return A.abs().amax((1, 2), keepdim=True)  # on a CPU an eighth of the time of a norm of infinite order


def iterate(X: Wide, plan: Plan, n: int) -> Wide:
    """The steps of a plan; columns after the first n are multiplied and do not enter ``X X^T``. X stays as it is."""
    plain = len(plan.steps) - plan.gram
    R = symmetric(X[..., :n])
    X, R = (X.clone(), R) if plan.frobenius else _in_schatten_norm(X, R)
    for step in plan.steps[:plain]:
        B, R = _bracket(symmetric(X[..., :n]) if R is None else R, step), None
        X = multiply(X, B, step[0])
        del B  # what is not needed any more, so that the next products find room
    if plan.gram:
        X = multiply(X, _gram_form(symmetric(X[..., :n]) if R is None else R, plan.steps[plain:]))
    return X


def _in_schatten_norm(X: Wide, R: Square) -> tuple[Wide, Square]:
    """X and ``R = X X^T`` for an X of Schatten 4-norm 1: ``X / ||R||_F^(1/2)``. A zero X stays."""
    size = _norm(R)
    unit = where(size > 0, size, 1.0).rsqrt().to(X.dtype)
    return X * unit, R * unit.square()


def _gram_form(R: Square, steps: tuple[Odd, ...]) -> Square:
    """The product of all ``P = c0 I + B(R)``, the linear term outside of products where there is one.

    All of them are polynomials of one R: they commute, and every product is symmetric.
    """
    Q = None
    for i, step in enumerate(steps):
        P, c0 = _bracket(R, step), step[0]
        Q = _plus_identity(P, c0) if Q is None else symmetric(P, Q, Q, c0)
        if i + 1 < len(steps):
            R = symmetric(P, R, R, c0)
            R = symmetric(P, R, R, c0)
    return R if Q is None else Q


def _plus_identity(P: Square, c0: float) -> Square:
    Q = P.clone()
    diagonal = Q.diagonal(dim1=1, dim2=2)
    diagonal.copy_(diagonal.to(torch.promote_types(P.dtype, torch.float32)) + c0)
    return Q


def _bracket(R: Square, odd: Odd) -> Square:
    """``c1 R + c2 R^2`` or ``c1 R + c2 R^2 + c3 R^3 + c4 R^4``.

    Elementwise sums are made in float32: on a CPU bfloat16 operations round a coefficient to bfloat16 first.
    """
    if len(odd) == 3:
        return symmetric(R, R, R, odd[1], odd[2])
    _, c1, c2, c3, c4 = odd
    square, wide = symmetric(R), torch.promote_types(R.dtype, torch.float32)
    low, high = R.to(wide) * c1 + square.to(wide) * c2, R.to(wide) * c3 + square.to(wide) * c4
    return symmetric(square, high.to(R.dtype), low.to(R.dtype), 1.0)


def _beside(*parts: Wide) -> Wide:
    """Matrices side by side, in the memory order of the first."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.mT for part in parts], 1).mT if _is_turned(parts[0]) else torch.cat(parts, 2)


def _is_turned(X: Wide) -> bool:
    """Whether X lies in memory by columns."""
    return not X.is_contiguous() and X.mT.is_contiguous()


def _is_healthy(S: Square, norm: PerMatrix) -> Bool[Tensor, "b 1 1"]:
    """Whether the root of a normalised matrix has a norm near 1, or of a zero matrix is 0; false with NaN."""
    size = _norm(S)
    return ((size > HEALTHY_NORM[0]) & (size < HEALTHY_NORM[1])) | ((norm == 0) & (size == 0))


def _norm(X: Tensor) -> PerMatrix:
    wide = torch.float32 if X.dtype == torch.float16 else X.dtype  # bfloat16 is summed up in float32 on its own
    return torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True, dtype=wide)
