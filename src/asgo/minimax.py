"""An inverse square root by matrix products alone: which polynomials, how many, and how to multiply.

The iteration drives every ``sigma = sqrt(lambda)`` to 1 through a chain of odd quintics
``p(x) = c0 x + c1 x^3 + c2 x^5``; the product of all ``p(x)/x`` is then ``lambda^(-1/2)``. Damping tells
where the smallest sigma lies, so each quintic can be the best possible one: it minimises ``max |1 - p|`` over
the interval that the chain has reached. Taking the best at each step gives the best chain of that length
("The Polar Express", Amsel, Persson, Musco and Gower, 2025).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    Square: TypeAlias = Float[Tensor, "b k k"]

Quintic: TypeAlias = tuple[float, float, float]

CUSHION = 1.01  # room above the interval: without it an eigenvalue of 1.0001 diverges, with it 1.01 is safe
MAX_STEPS = 12  # reaches eps 1e-12; below that the smallest eigenvalues only come out more damped
TAYLOR: Quintic = (15 / 8, -10 / 8, 3 / 8)  # the limit of the best quintic as its interval shrinks to 1
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


def best_quintic(low: float, high: float) -> tuple[Quintic, float]:
    """The odd quintic nearest to 1 on ``[low, high]``, and its largest distance from 1.

    Remez exchange. The distance is attained, with alternating signs, at both ends and at two points between,
    so four guesses of those points give the quintic by a linear system, and the two zeros of its derivative
    (a quadratic in x^2) are the next guesses.
    """
    inner = ((3 * low + high) / 4, (low + 3 * high) / 4)
    c0 = c1 = c2 = error = 0.0
    for _ in range(50):  # converges quadratically, in about 10 rounds
        points = (low, *inner, high)
        rows = [[x, x**3, x**5, sign] for x, sign in zip(points, (1, -1, 1, -1), strict=True)]
        system = torch.tensor(rows, dtype=torch.float64, device="cpu")
        c0, c1, c2, error = torch.linalg.solve(system, torch.ones_like(system[0])).tolist()
        split = math.sqrt(9 * c1 * c1 - 20 * c0 * c2)
        before = inner
        inner = (math.sqrt((-3 * c1 - split) / (10 * c2)), math.sqrt((-3 * c1 + split) / (10 * c2)))
        if math.dist(before, inner) < 1e-14:
            break
    return (c0, c1, c2), error


def _evaluate(quintic: Quintic, x: float) -> float:
    c0, c1, c2 = quintic
    return x * (c0 + x * x * (c1 + x * x * c2))


def _next_step(low: float, high: float) -> tuple[Quintic, float, float]:
    """The next quintic and the interval it leads to."""
    if high - low < CUSHION - 1:  # so narrow that the cushion would cost more than the best quintic gains
        return TAYLOR, _evaluate(TAYLOR, low), _evaluate(TAYLOR, high)
    quintic, error = best_quintic(low, high * CUSHION)
    return quintic, 1 - error, 1 + error


def compose(low: float, tolerance: float) -> tuple[Quintic, ...]:
    """The fewest quintics that take ``[low, 1]`` within ``tolerance`` of 1, at most `MAX_STEPS`."""
    high = 1.0
    steps: list[Quintic] = []
    while max(1 - low, high - 1) > tolerance and len(steps) < MAX_STEPS:
        quintic, low, high = _next_step(low, high)
        steps.append(quintic)
    return tuple(steps)


@lru_cache(maxsize=256)
def schedule(eps: float, tolerance: float = 2e-3) -> tuple[Quintic, ...]:
    """The quintics ``(c0, c1, c2)`` for a relative damping ``eps``, cached.

    Args:
        eps: relative damping; the smallest sigma is about sqrt(eps).
        tolerance: largest relative error of the root in exact arithmetic. 2e-3 is what accumulating the
            statistic in float32 costs anyway at eps 1e-6, and takes 6 steps there.

    Raises:
        ValueError: if eps is not a positive finite number.
    """
    return compose(smallest_sigma(eps), tolerance)


# The iteration: on the device of A, no branch on data, no transfer to or from the host.


def bracket(R: Square, c1: float, c2: float) -> Square:
    """``c1 R + c2 R^2`` with one product."""
    return torch.baddbmm(R, R, R, beta=c1, alpha=c2)


def coupled_root(A: Square, steps: tuple[Quintic, ...]) -> Square:
    """``A^(-1/2)`` for eigenvalues in (0, 1], with ``4 len(steps) - 3`` products.

    Y goes to A^(1/2) and Z to A^(-1/2). In exact arithmetic the factors commute; in floating point any order
    but this one (or its mirror image) diverges, and so does symmetrising on the way, or adding c0 I to the
    bracket instead of c0 times the matrix to the product. Symmetrising the result would cost accuracy, too:
    with this order ``Z @ M`` is nearer than ``Z.mT @ M`` where A is near singular.
    """
    (c0, c1, c2), *rest = steps
    B = bracket(A, c1, c2)  # Z = I here, so Z Y = A and Z costs no product
    Y, Z = A, B + c0 * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for next_c0, c1, c2 in rest:
        Y = torch.baddbmm(Y, Y, B, beta=c0)  # left until here, as the last step needs no Y
        c0 = next_c0
        B = bracket(Z @ Y, c1, c2)
        Z = torch.baddbmm(Z, B, Z, beta=c0)
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
