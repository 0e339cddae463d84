"""Inverse square roots of stacks of symmetric positive semidefinite matrices.

Every root is a function ``(A, eps) -> (Z, ok)`` of the table `ROOTS`: ``A`` is ``(b, k, k)`` in float32 or
float64, ``Z`` has its shape and dtype, and ``ok`` is ``(b,)``. Unless a root says otherwise it computes

    ``Z = (A + eps ||A||_F I)^(-1/2)``

Damping is relative and inside the root, so ``Z`` scales exactly as ``A^(-1/2)`` does and one eps fits
gradients of any size. 1e-6 is a little above the spacing of float32 (1.2e-7), below
which eigenvalues of a float32 statistic are noise.

Apply a root as ``Z @ M`` or ``M @ Z.mT``. That matters for "minimax", which is symmetric only to about 1e-2:
on rank-deficient statistics its transpose is five times less exact, and the mean of both three times.

A zero matrix has the root 0 (nothing was learned, so nothing moves) and is ``ok``. A matrix with NaN or
infinity, or whose root fails, has the root 0, is not ``ok``, and touches no other in its stack. Products run
in full precision whatever the script chose, see `exact_matmul`. `asgo.linalg.solver.solve` sees to all of this.
("reference" alone keeps other rules.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from asgo.linalg import polynomial as iteration
from asgo.linalg import spectral
from asgo.linalg.masked import where
from asgo.linalg.matmul import Precision, exact_matmul
from asgo.linalg.solver import check_stack, eye_of, solve

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from asgo.linalg.solver import PerMatrix, Result, Solver, Square

    Solve: TypeAlias = Callable[[Square, float], Result]
    Formula: TypeAlias = Callable[[Float[Tensor, "*b k"], float], Float[Tensor, "*b k"]]

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-9}
"""Asked of the schedule of `minimax`."""
FAST_TOLERANCE = 1.4e-2
"""Asked of the schedule of `minimax_fast`: the worst of 17 products at eps 1e-6; the usual error is 1e-2."""
LEAST_EPS_TF32 = 1e-5
"""TF32 products keep 11 bits: at a tenth of this damping their iteration diverges on some statistics."""
SMALL = 128
"""Up to this size products are the faster root of a stack in float32 on a CPU as well."""


def _by_eigh(A: Square, scale: PerMatrix, eps: float) -> Square:
    return spectral.root(A, scale, partial(_damped, eps=eps))


def _damped(values: Tensor, scale: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return (values + eps * norm).pow(-0.25) * scale.pow(-0.25)


def _outside(kept: torch.dtype) -> Solver:
    def weights(values: Tensor, scale: Tensor, eps: float) -> Tensor:
        return ((spectral.resolved(values, kept) * scale).sqrt() + eps).pow(-0.5)

    return lambda A, scale, eps: spectral.root(A, scale, partial(weights, eps=eps))


def _inside(kept: torch.dtype) -> Solver:
    def weights(values: Tensor, scale: Tensor, eps: float) -> Tensor:
        return (spectral.resolved(values, kept) * scale + eps).pow(-0.25)

    return lambda A, scale, eps: spectral.root(A, scale, partial(weights, eps=eps))


def _by_products(degree: Literal[5, 9] = 5, precision: Precision = "ieee") -> Solver:
    def solver(A: Square, scale: PerMatrix, eps: float) -> Square:
        fast = degree == 9 and A.dtype == torch.float32
        steps = iteration.schedule(eps, FAST_TOLERANCE if fast else TOLERANCE[A.dtype], degree)
        unit = A / scale
        norm = torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True)
        bound = norm * ((1 + eps) * (1 + 2e-6))  # no eigenvalue of the damped matrix is larger
        unit = unit.div_(bound)
        unit.diagonal(dim1=-2, dim2=-1).add_(eps * (norm / bound)[..., 0])
        with exact_matmul(A.device, "tf32" if precision == "tf32" else "ieee"):
            Z = iteration.coupled_root(unit, steps, precision)
        good = iteration.probe(unit, Z)[:, None, None]
        return Z.mul_(torch.where(good, bound.rsqrt() * scale.rsqrt(), math.nan))

    return solver


def eigh(A: Square, eps: float) -> Result:
    """The root by ``torch.linalg.eigh`` in A's dtype: the fastest on CPU unless matrices are small.

    At eps 1e-6 in float32 the step is within 6e-2 of exact (measured; usually 2e-2), as eigenvectors of close
    eigenvalues mix. On a CPU the threads of torch share the matrices of the stack.
    """
    return solve(_by_eigh, A, eps)


def eigh_with_root(A: Square, eps: float) -> tuple[Square, Square, Bool[Tensor, "b"]]:
    """``(Z, S, ok)``: `eigh`, and ``S = A^(1/2)`` without damping by the same decomposition; 0 where Z is."""
    roots = [A]

    def weights(values: Tensor, scale: Tensor) -> Tensor:
        return torch.stack([_damped(values, scale, eps), (values * scale).pow(0.25)], 1)

    def solver(A: Square, scale: PerMatrix, eps: float) -> Square:
        Z, roots[0] = spectral.roots(A, scale, weights)
        return Z

    Z, ok = solve(solver, A, eps)
    return Z, where(Z.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] > 0, roots[0], 0.0), ok


def eigh64(A: Square, eps: float) -> Result:
    """`eigh` in float64, rounded back to A's dtype: within 1e-4 of exact in twice the time."""
    return solve(_by_eigh, A, eps, torch.float64)


def outside(A: Square, eps: float) -> Result:
    """``(A^(1/2) + eps I)^(-1)``: eps absolute and outside the root, computed in float64.

    Eigenvalues that A's dtype does not resolve are raised, see `asgo.linalg.spectral.RESOLUTION`.
    The theory form, Algorithm 1 of "ASGO: Adaptive Structured Gradient Optimization" (An et al., 2025).
    """
    return solve(_outside(A.dtype), A, eps, torch.float64)


def inside(A: Square, eps: float) -> Result:
    """``(A + eps I)^(-1/2)``: eps absolute and inside the root, computed in float64.

    Eigenvalues that A's dtype does not resolve are raised, see `asgo.linalg.spectral.RESOLUTION`.
    The form of one-sided Shampoo ("Structured Preconditioners in Adaptive Optimization", Xie et al., 2025).
    """
    return solve(_inside(A.dtype), A, eps, torch.float64)


def minimax(A: Square, eps: float) -> Result:
    """The root by a fixed number of products: the fastest on GPUs, and never waits for the host.

    A coupled iteration of best quintics on the interval that damping guarantees, see `asgo.linalg.polynomial`. At eps
    1e-6: 21 products, one of them in float64, and about 2e-3 from exact in float32, most of it the polynomials'
    (4e-3 on devices where float64 is slow and left out), 29 and 1e-7 in float64. A probe of 8 columns detects a
    failure: in float32 that is a rank-deficient statistic with eps below 1e-7.

    Raises:
        ValueError: if eps is not a positive finite number.
    """
    return solve(_by_products(), A, eps)


def minimax_fast(A: Square, eps: float) -> Result:
    """`minimax` with polynomials of degree 9: 17 products instead of 21 at eps 1e-6, about 1.2e-2 from exact.

    In float64 it is as exact as `minimax`.
    """
    return solve(_by_products(degree=9), A, eps)


def minimax_bf16x3(A: Square, eps: float) -> Result:
    """`minimax` with three bfloat16 products for each in float32: about 2e-3 from exact at eps 1e-6.

    On rank-deficient statistics, as on the first steps, within 6e-3. The two most sensitive products stay in
    float64 and float32. For tensor cores, where the three cost less than the one. Float64 is computed as ever.
    """
    return solve(_by_products(precision="bf16x3"), A, eps)


def minimax_tf32(A: Square, eps: float) -> Result:
    """`minimax` with TF32 products on CUDA (float32 elsewhere): within 4e-2 of exact at eps 1e-5.

    Raises:
        ValueError: if eps is below 1e-5, where TF32 is too coarse.
    """
    check_eps("minimax_tf32", eps)
    return solve(_by_products(precision="tf32"), A, eps)


def auto(A: Square, eps: float) -> Result:
    """The fastest by measurement (``benchmarks.root``): on a CPU `eigh` for matrices larger than 128 and for
    float64, else `minimax`. How many matrices stand in the stack makes no difference to their roots."""
    return ROOTS[_fastest(A.device.type, A.shape[-1], A.dtype)](A, eps)


def _fastest(device: str, k: int, dtype: torch.dtype = torch.float32) -> str:
    return "eigh" if device == "cpu" and (k > SMALL or dtype == torch.float64) else "minimax"


_CUSHIONED = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_RELEASED = (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _CUSHIONED), *[(1.875, -1.25, 0.375)] * 3)


def reference(A: Square, eps: float) -> Result:
    """The authors' released root, for comparison only: 10 steps of the Polar Express in float32, 40 products.

    Its eps is absolute and enters the norm alone, so that a rank-deficient A is barely damped and its root
    often far off. A root with NaN or infinity is replaced by the identity, and all count as ok.
    """
    check_stack(A)
    X = A.float()
    eye = eye_of(X)
    norm = torch.linalg.vector_norm(X + eps * eye, dim=(-2, -1), keepdim=True) * 1.01
    Y, Z = X / norm, eye.expand_as(X)
    with exact_matmul(A.device):
        for c0, c1, c2 in _RELEASED:
            B = iteration.bracket(Z @ Y, (c0, c1, c2))
            Y, Z = torch.baddbmm(Y, Y, B, beta=c0), torch.baddbmm(Z, B, Z, beta=c0)
    Z = Z / norm.sqrt()
    finite = Z.isfinite().all(dim=-1).all(dim=-1)
    return torch.where(finite[:, None, None], Z, eye).to(A.dtype), torch.ones_like(finite)


# ---- what a root inverts: the eigenvalues of the damped matrix -------------------------------------------------------


def relative(values: Tensor, eps: float) -> Tensor:
    """``A + eps ||A||_F I``."""
    return values + eps * torch.linalg.vector_norm(values, dim=-1, keepdim=True)


def absolute(values: Tensor, eps: float) -> Tensor:
    """``A + eps I``."""
    return values + eps


def outside_the_root(values: Tensor, eps: float) -> Tensor:
    """``(A^(1/2) + eps I)^2``."""
    return (values.sqrt() + eps).square()


def undamped(values: Tensor, eps: float) -> Tensor:
    """A itself."""
    return values


@dataclass(frozen=True)
class InverseRoot:
    """A root and what the library, its tests, benchmarks and pages ask about it; call it as ``root(A, eps)``.

    Args:
        solve: ``(A, eps) -> (Z, ok)``, see the module.
        formula: the eigenvalues ``(..., k)`` of the matrix that it is the inverse square root of, from the eigenvalues
            of A, none of them negative, and eps; in float64.
        products: what one float32 matrix costs, in products of ``k x k`` matrices, by eps.
        error: the largest relative error of a step ``Z M`` in float32 at the larger of `min_eps` and 1e-6,
            rank-deficient statistics included; None for a root in float64 whose step has rounding errors alone.
        how: what it does, for the table of roots in ``docs/concepts.md``, as markdown.
        note: what that table says of its cost and error.
        retry: the name of the root that computes the same more exactly, by which a failed matrix is tried once more.
        min_eps: the least damping it can work with.
        raises: whether eigenvalues that A's dtype does not resolve are raised before they are damped.
    """

    solve: Solve
    formula: Formula
    products: Callable[[float], float]
    error: float | None
    how: str
    note: str
    retry: str | None = None
    min_eps: float = 0.0
    raises: bool = False

    def __call__(self, A: Square, eps: float) -> Result:
        """The roots of a stack ``(b, k, k)`` and, ``(b,)``, which of them could be computed."""
        return self.solve(A, eps)


_EIGH = 6.5  # products, measured on CPU at k = 768, in times of one float32 product; float64 takes twice that


def _scheduled(eps: float) -> float:
    return iteration.products(iteration.schedule(eps))


# fmt: off
ROOTS: dict[str, InverseRoot] = {
    "auto": InverseRoot(
        auto, relative, _scheduled, 6e-2, 'on a CPU `"eigh"` for `k` above 128 and for float64; else `"minimax"`', "",
        retry="eigh64"
    ),
    "eigh": InverseRoot(
        eigh, relative, lambda eps: _EIGH, 6e-2, "an eigendecomposition in the precision of the state",
        "step within 6e-2 of exact in float32, usually 2e-2", retry="eigh64"
    ),
    "eigh64": InverseRoot(
        eigh64, relative, lambda eps: 2 * _EIGH, 1e-4, "an eigendecomposition in float64",
        "within 1e-4 of exact, twice the time"
    ),
    "minimax": InverseRoot(
        minimax, relative, _scheduled, 4e-3, "matrix products only, in a number fixed by `eps`",
        "21 products, about 2e-3 from exact in float32 (4e-3 where float64 is slow)", retry="eigh64"
    ),
    "minimax_fast": InverseRoot(
        minimax_fast, relative, lambda eps: iteration.products(iteration.schedule(eps, FAST_TOLERANCE, 9)), 1.5e-2,
        "the same with polynomials of degree 9", "17 products, about 1.2e-2; 1.5e-2 on rank-deficient statistics",
        retry="eigh64"
    ),
    "minimax_bf16x3": InverseRoot(
        minimax_bf16x3, relative, _scheduled, 6e-3, '`"minimax"`, three bfloat16 products for one in float32',
        "about 2e-3; 6e-3 on rank-deficient statistics", retry="eigh64"
    ),
    "minimax_tf32": InverseRoot(
        minimax_tf32, relative, _scheduled, 4e-2, '`"minimax"` in TF32 on CUDA', "takes `eps` of 1e-5 or more",
        retry="eigh64", min_eps=LEAST_EPS_TF32
    ),
    "outside": InverseRoot(
        outside, outside_the_root, lambda eps: 2 * _EIGH, None, "`(V^(1/2) + eps I)^(-1)` in float64",
        "for `ASGO.theory`", raises=True
    ),
    "inside": InverseRoot(
        inside, absolute, lambda eps: 2 * _EIGH, None, "`(V + eps I)^(-1/2)` in float64, `eps` absolute",
        "for `OneSidedShampoo`", raises=True
    ),
    "reference": InverseRoot(
        reference, undamped, lambda eps: 4 * len(_RELEASED), None, "the authors' released iteration",
        "for `ASGO.reference`: 40 products"
    ),
}
# fmt: on
"""All roots by name; a new one is a function and a row here. ("auto" is one of the others, see `products`.)"""


def resolve(name: str) -> InverseRoot:
    """The root called ``name``.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in ROOTS:
        raise ValueError(f"root {name!r} is unknown: choose one of {', '.join(map(repr, ROOTS))}")
    return ROOTS[name]


def check_eps(name: str, eps: float) -> None:
    """Raise `ValueError` if a root cannot work with so little damping."""
    least = ROOTS[name].min_eps if name in ROOTS else 0.0
    if eps < least:
        raise ValueError(
            f"root {name!r} got eps={eps}: its products are too coarse for eps below {least:g}. Pass eps={least:g}, or "
            "use root 'minimax'"
        )


def products(name: str, eps: float, device: torch.device | str = "cpu", k: int = 768) -> float:
    """What the root of one float32 matrix costs, in ``k x k`` products of ``2 k^3`` operations each.

    Exact for a root made of products; an eigendecomposition counts by its measured time. The device and the
    size matter for "auto" only.

    Raises:
        ValueError: if there is no root of that name, or "minimax" cannot take eps.
    """
    name = _fastest(torch.device(device).type, k) if name == "auto" else name
    return resolve(name).products(eps)
