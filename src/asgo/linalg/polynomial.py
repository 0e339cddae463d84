"""An inverse square root by matrix products alone: which polynomials, how many, and how to multiply.

The iteration drives every ``sigma = sqrt(lambda)`` to 1 through a chain of odd polynomials
``p(x) = c0 x + c1 x^3 + c2 x^5 (+ c3 x^7 + c4 x^9)``; the product of all ``p(x)/x`` is then ``lambda^(-1/2)``.
Damping bounds the smallest sigma from below, so each polynomial can be the best possible one: it minimises
``max |1 - p|`` over the interval that the chain has reached. Taking the best at each step gives the best chain
of that length ("The Polar Express", Amsel, Persson, Musco and Gower, 2025).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from asgo.linalg.matmul import Precision, baddbmm, has_fast_double

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    Square: TypeAlias = Float[Tensor, "b k k"]

Odd: TypeAlias = tuple[float, ...]
"""Coefficients ``(c0, c1, c2, ...)`` of ``x, x^3, x^5, ...``."""

CUSHION = 1.01  # room above the interval: without it an eigenvalue of 1.0001 diverges, with it 1.01 is safe
MAX_STEPS = 12  # reaches eps 1e-12; below that the smallest eigenvalues only come out more damped
TAYLOR: Odd = (15 / 8, -10 / 8, 3 / 8)  # the limit of the best quintic as its interval shrinks to 1
PROBE_TOLERANCE = 0.2  # healthy residuals are below 0.03 in float32, broken ones above 1


# The schedule: float64 on the host, once per eps.


def smallest_sigma(eps: float) -> float:
    """Lower end of the sigmas of ``(A + eps ||A||_F I) / ((1 + eps) ||A||_F)``, less a margin for rounding.

    The upper end is 1, as no eigenvalue exceeds the Frobenius norm.

    Raises:
        ValueError: if eps is not a positive finite number.
    """
    if not 0 < eps < math.inf:
        raise ValueError(
            f"root 'minimax' got eps={eps}: it needs a positive damping. Pass eps=1e-6, or use root 'eigh'"
        )
    margin = 0.9 if eps >= 2e-7 else 0.5  # float32 moves an eigenvalue by 2e-8 of the largest
    return math.sqrt(min(margin * eps, 0.99 * eps / (1 + eps)))


def best_odd(low: float, high: float, degree: Literal[5, 9] = 5) -> tuple[Odd, float]:
    """The odd polynomial nearest to 1 on ``[low, high]``, and its largest distance from 1.

    Remez exchange. The distance is attained, with alternating signs, at both ends and at points between, one
    fewer than there are coefficients; guesses of those points give the polynomial by a linear system, and the
    zeros of its derivative (a polynomial in x^2) are the next guesses.
    """
    powers = torch.arange(1, degree + 1, 2, dtype=torch.float64, device="cpu")
    terms = len(powers)
    signs = (-1.0) ** torch.arange(terms + 1, dtype=torch.float64, device="cpu")
    points = torch.linspace(low, high, terms + 1, dtype=torch.float64, device="cpu")
    coefficients, error = powers, math.nan
    for _ in range(50):  # converges quadratically, in about 6 rounds
        system = torch.cat([points[:, None] ** powers, signs[:, None]], dim=1)
        *solution, error = torch.linalg.solve(system, torch.ones_like(points)).tolist()
        coefficients = torch.tensor(solution, dtype=torch.float64, device="cpu")
        before, points = points, points.clone()
        points[1:-1] = _roots(coefficients * powers).sqrt()
        if (points - before).abs().max() < 1e-14:
            break
    return tuple(coefficients.tolist()), error


def _roots(polynomial: Tensor) -> Tensor:
    """The zeros of ``sum_i polynomial[i] y^i``, all real, in ascending order: eigenvalues of its companion matrix."""
    companion = torch.diag(torch.ones(len(polynomial) - 2, dtype=torch.float64, device="cpu"), -1)
    companion[0] = -polynomial[:-1].flip(0) / polynomial[-1]
    return torch.linalg.eigvals(companion).real.sort().values


def _evaluate(odd: Odd, x: float) -> float:
    return sum(c * x ** (2 * i + 1) for i, c in enumerate(odd))


def _next_step(low: float, high: float, degree: Literal[5, 9], cushion: float = CUSHION) -> tuple[Odd, float, float]:
    """The next polynomial and the interval it leads to."""
    if high - low < cushion - 1:  # so narrow that the cushion would cost more than the best polynomial gains
        return TAYLOR, _evaluate(TAYLOR, low), _evaluate(TAYLOR, high)
    odd, error = best_odd(low, high * cushion, degree)
    return odd, 1 - error, 1 + error


def compose(low: float, tolerance: float, degree: Literal[5, 9] = 5) -> tuple[Odd, ...]:
    """The fewest polynomials that take ``[low, 1]`` within ``tolerance`` of 1, at most `MAX_STEPS`."""
    high = 1.0
    steps: list[Odd] = []
    while max(1 - low, high - 1) > tolerance and len(steps) < MAX_STEPS:
        odd, low, high = _next_step(low, high, degree)
        steps.append(odd)
    return tuple(steps)


def chain(low: float, degrees: tuple[Literal[5, 9], ...], cushion: float = CUSHION) -> tuple[Odd, ...]:
    """Polynomials of given degrees, each the best on the interval that ``[low, 1]`` is in by then."""
    high = 1.0
    steps: list[Odd] = []
    for degree in degrees:
        odd, low, high = _next_step(low, high, degree, cushion)
        steps.append(odd)
    return tuple(steps)


@lru_cache(maxsize=256)
def schedule(eps: float, tolerance: float = 2e-3, degree: Literal[5, 9] = 5) -> tuple[Odd, ...]:
    """The polynomials' coefficients for a relative damping ``eps``, cached.

    Args:
        eps: relative damping; the smallest sigma is about sqrt(eps).
        tolerance: largest relative error of the root in exact arithmetic. 2e-3 is what accumulating the
            statistic in float32 costs anyway at eps 1e-6, and takes 6 quintic steps there.
        degree: 9 gains more per product but has larger coefficients, hence more rounding.

    Raises:
        ValueError: if eps is not a positive finite number.
    """
    return compose(smallest_sigma(eps), tolerance, degree)


def products(steps: tuple[Odd, ...]) -> int:
    """How many matrix products `coupled_root` takes."""
    return 3 * len(steps) - 3 + sum((len(step) - 1) // 2 for step in steps)


# The iteration: on the device of A, no branch on data, no transfer to or from the host.


def bracket(R: Square, odd: Odd, precision: Precision = "ieee") -> Square:
    """``c1 R + c2 R^2`` with one product, ``c1 R + c2 R^2 + c3 R^3 + c4 R^4`` with two."""
    _, c1, c2, *more = odd
    if not more:
        return baddbmm(R, R, R, c1, c2, precision)
    c3, c4 = more
    square = baddbmm(R, R, R, 0.0, 1.0, precision)
    linear = torch.add(square.mul(c2), R, alpha=c1)
    return baddbmm(linear, square, torch.add(square.mul(c4), R, alpha=c3), 1.0, 1.0, precision)


def coupled_root(A: Square, steps: tuple[Odd, ...], precision: Precision = "ieee") -> Square:
    """``A^(-1/2)`` for eigenvalues in (0, 1], with `products` matrix products.

    Y goes to A^(1/2) and Z to A^(-1/2). In exact arithmetic the factors commute; in floating point any order
    but this one (or its mirror image) diverges, and so does symmetrising on the way, or adding c0 I to the
    bracket instead of c0 times the matrix to the product. Symmetrising the result would cost accuracy, too:
    with this order ``Z @ M`` is nearer than ``Z.mT @ M`` where A is near singular.

    Most of the error enters with one product, the first that makes Y: there the largest eigenvalues meet the smallest,
    which all later steps magnify. In float64 it halves the error of the float32 iteration.
    """
    first, *rest = steps
    B = bracket(A, first, precision)  # Z = I here, so Z Y = A and Z costs no product
    Y, Z, c0 = A, B + first[0] * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device), first[0]
    second: Precision = "ieee" if precision == "bf16x3" else precision
    wide: Precision = "double" if has_fast_double(A.device) else "ieee"
    for i, step in enumerate(rest):
        # Left until here, as the last step needs no Y.
        Y = baddbmm(Y, Y, B, c0, 1.0, (wide, second, precision)[min(i, 2)])
        c0 = step[0]
        B = bracket(baddbmm(Y, Z, Y, 0.0, 1.0, precision), step, precision)
        Z = baddbmm(Z, B, Z, c0, 1.0, precision)
    return Z


def _probe_columns(like: Square) -> Float[Tensor, "k 4"]:
    """Four fixed unit columns without structure (quadratic phases), made on the device, not by the RNG."""
    rows = torch.arange(1, like.shape[-1] + 1, device=like.device)[:, None]
    odd = torch.arange(1, 9, 2, device=like.device)
    x = torch.cos((rows * rows * odd * 40503 % 65536).to(like.dtype) * (2 * math.pi / 65536))
    return x / torch.linalg.vector_norm(x, dim=0)


def probe(A: Square, Z: Square) -> Bool[Tensor, "b"]:
    """Is ``Z A Z^T = I`` on four fixed columns, and on the same after two power iterations?

    The latter lie along the top eigenvectors, where an error hides from columns that spread over all.
    """
    x = _probe_columns(A).expand(len(A), -1, -1)
    powered = A @ (A @ x)
    x = torch.cat([x, powered / torch.linalg.vector_norm(powered, dim=-2, keepdim=True)], dim=-1)
    residual = torch.linalg.vector_norm(Z @ (A @ (Z.mT @ x)) - x, dim=-2)
    return (residual < PROBE_TOLERANCE).all(dim=-1)
