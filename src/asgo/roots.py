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
in full precision whatever the script chose, see `exact_matmul`. ("reference" alone keeps other rules.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

import torch

from asgo._types import Root
from asgo.minimax import bracket, coupled_root, probe, schedule

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    Square: TypeAlias = Float[Tensor, "b k k"]
    PerMatrix: TypeAlias = Float[Tensor, "b 1 1"]
    Result: TypeAlias = tuple[Square, Bool[Tensor, "b"]]
    Solver: TypeAlias = Callable[[Square, PerMatrix, float], Square]

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-9}  # asked of the schedule of `minimax`


@contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Matrix products in full precision inside; the caller's settings are as before outside.

    Otherwise ``torch.set_float32_matmul_precision("high")`` spoils an iterative root on CUDA, ``"medium"``
    every root on CPUs with bfloat16 units, and autocast both. The settings belong to the process: a product
    that another thread starts meanwhile is exact too.
    """
    mkldnn = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    backends = (torch.backends.cuda.matmul, mkldnn)
    before = [backend.fp32_precision for backend in backends]
    known = torch.amp.is_autocast_available(device.type)
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False) if known else nullcontext():
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = "none"  # inherit, as an inherited value should not become a fixed one
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def _check(A: Square) -> None:
    if A.ndim != 3 or A.shape[-1] != A.shape[-2] or A.dtype not in TOLERANCE:
        raise ValueError(
            f"root got {A.dtype} of shape {tuple(A.shape)}: it takes float32 or float64 of shape (b, k, k). "
            "Pass A[None] for a single matrix, A.float() for half precision"
        )


def _eye(A: Square) -> Float[Tensor, "k k"]:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def _norm(A: Square) -> PerMatrix:
    return torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True)


def _solve(solver: Solver, A: Square, eps: float, dtype: torch.dtype | None = None) -> Result:
    """Root of A by a solver ``(unit, scale, eps) -> root of unit``.

    ``A = scale * unit``, and unit's largest entry is in [1, 2), so that its norm can be squared whatever the
    range of A. In place of a matrix that is zero or not finite the solver meets the identity. It marks a
    failure by a diagonal that is not finite. It works in ``dtype`` (A's own if None); the result has A's.
    """
    _check(A)
    own, A = A.dtype, A.to(dtype or A.dtype)
    if A.numel() == 0:
        return torch.zeros_like(A, dtype=own), torch.ones(len(A), dtype=torch.bool, device=A.device)
    top = A.abs().amax(dim=(-2, -1), keepdim=True)  # NaN wins
    finite = top.isfinite()
    live = finite & (top > 0)
    scale = torch.where(live, top / (2 * torch.frexp(top).mantissa), 1)  # a power of two: exact
    with exact_matmul(A.device):
        Z = solver(torch.where(live, A, _eye(A)) / scale, scale, eps) / scale.sqrt()
    ok = finite.flatten() & Z.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=-1)
    return torch.where(ok[:, None, None] & live, Z, 0).to(own), ok


def _eigh(A: Square) -> tuple[Float[Tensor, "b k"], Square]:
    """Eigenvalues and eigenvectors.

    One matrix that LAPACK cannot solve raises for its whole stack. Then all are tried in float64, then one
    by one; a matrix that fails even so becomes NaN, alone.
    """
    try:
        return torch.linalg.eigh(A)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        pass
    if A.dtype != torch.float64:
        values, vectors = _eigh(A.double())
        return values.to(A.dtype), vectors.to(A.dtype)
    if len(A) > 1:
        values, vectors = zip(*(_eigh(one[None]) for one in A), strict=True)
        return torch.cat(values), torch.cat(vectors)
    return torch.full_like(A[..., 0], math.nan), torch.full_like(A, math.nan)


def _by_eigh(unit: Square, scale: PerMatrix, eps: float) -> Square:
    values, vectors = _eigh(unit)
    half = vectors * (values.clamp(min=0) + eps * _norm(unit)[..., 0]).pow(-0.25)[:, None]
    return half @ half.mT  # positive semidefinite whatever the rounding, so any NaN shows on the diagonal


def _by_eigh_outside(unit: Square, scale: PerMatrix, eps: float) -> Square:
    values, vectors = _eigh(unit)
    half = vectors * (values.clamp(min=0).sqrt() + eps / scale.sqrt()[..., 0]).pow(-0.5)[:, None]
    return half @ half.mT


def _by_eigh_inside(unit: Square, scale: PerMatrix, eps: float) -> Square:
    values, vectors = _eigh(unit)
    half = vectors * (values.clamp(min=0) + eps / scale[..., 0]).pow(-0.25)[:, None]
    return half @ half.mT


def _by_products(unit: Square, scale: PerMatrix, eps: float) -> Square:
    norm = _norm(unit)
    bound = norm * ((1 + eps) * (1 + 2e-6))  # no eigenvalue of the damped matrix is larger
    A = unit / bound
    A.diagonal(dim1=-2, dim2=-1).add_(eps * (norm / bound)[..., 0])
    Z = coupled_root(A, schedule(eps, TOLERANCE[unit.dtype]))
    return Z * torch.where(probe(A, Z)[:, None, None], bound.rsqrt(), math.nan)


def eigh(A: Square, eps: float) -> Result:
    """The root by ``torch.linalg.eigh`` in A's dtype: the fastest on CPU.

    At eps 1e-6 in float32 the step is within 5e-2 of exact (measured; usually 2e-2), as eigenvectors of close
    eigenvalues mix.
    """
    return _solve(_by_eigh, A, eps)


def eigh64(A: Square, eps: float) -> Result:
    """`eigh` in float64, rounded back to A's dtype: within 1e-4 of exact in twice the time."""
    return _solve(_by_eigh, A, eps, torch.float64)


def outside(A: Square, eps: float) -> Result:
    """``(A^(1/2) + eps I)^(-1)``: eps absolute and outside the root, computed in float64.

    The theory form, Algorithm 1 of "ASGO: Adaptive Structured Gradient Optimization" (An et al., 2025).
    """
    return _solve(_by_eigh_outside, A, eps, torch.float64)


def inside(A: Square, eps: float) -> Result:
    """``(A + eps I)^(-1/2)``: eps absolute and inside the root, computed in float64.

    The form of one-sided Shampoo ("Structured Preconditioners in Adaptive Optimization", Xie et al., 2025).
    """
    return _solve(_by_eigh_inside, A, eps, torch.float64)


def minimax(A: Square, eps: float) -> Result:
    """The root by a fixed number of products: the fastest on GPUs, and never waits for the host.

    A coupled iteration of best quintics on the interval that damping guarantees, see `asgo.minimax`. At eps
    1e-6: 21 products and within 3e-3 of exact in float32 (measured; usually 2e-3), 29 and 1e-7 in float64. A
    probe of 8 columns tells a failure: in float32 that is a rank-deficient statistic with eps below 1e-7.

    Raises:
        ValueError: if eps is not a positive finite number.
    """
    return _solve(_by_products, A, eps)


def auto(A: Square, eps: float) -> Result:
    """`eigh` on CPU, `minimax` on every other device."""
    return (eigh if A.device.type == "cpu" else minimax)(A, eps)


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
    _check(A)
    X = A.float()
    eye = _eye(X)
    norm = _norm(X + eps * eye) * 1.01
    Y, Z = X / norm, eye.expand_as(X)
    with exact_matmul(A.device):
        for c0, c1, c2 in _RELEASED:
            B = bracket(Z @ Y, c1, c2)
            Y, Z = torch.baddbmm(Y, Y, B, beta=c0), torch.baddbmm(Z, B, Z, beta=c0)
    Z = Z / norm.sqrt()
    finite = Z.isfinite().all(dim=-1).all(dim=-1)
    return torch.where(finite[:, None, None], Z, eye).to(A.dtype), torch.ones_like(finite)


ROOTS: dict[str, Root] = {
    "auto": auto,
    "eigh": eigh,
    "eigh64": eigh64,
    "minimax": minimax,
    "outside": outside,
    "inside": inside,
    "reference": reference,
}
_EIGH_PRODUCTS = 6.5  # measured on CPU at k = 768, in times of one float32 product; float64 takes twice that


def resolve(name: str) -> Root:
    """The root called ``name``.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in ROOTS:
        raise ValueError(f"root {name!r} is unknown: choose one of {', '.join(map(repr, ROOTS))}")
    return ROOTS[name]


def products(name: str, eps: float, device: torch.device | str = "cpu") -> float:
    """What the root of one float32 matrix costs, in ``k x k`` products of ``2 k^3`` operations each.

    Exact for a root made of products; an eigendecomposition counts by its measured time. ``device`` matters
    for "auto" only.

    Raises:
        ValueError: if there is no root of that name, or "minimax" cannot take eps.
    """
    resolve(name)
    if name == "auto":
        name = "eigh" if torch.device(device).type == "cpu" else "minimax"
    if name == "minimax":
        return 4 * len(schedule(eps)) - 3
    if name == "reference":
        return 4 * len(_RELEASED)
    return _EIGH_PRODUCTS if name == "eigh" else 2 * _EIGH_PRODUCTS
