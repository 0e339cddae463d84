"""Full-matrix AdaGrad in low rank: a matrix as one vector of d entries, ``eps I`` and a few directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.linalg.masked import known_all_true, where
from asgo.structures.base import Structure, active_mask

Columns: TypeAlias = Tensor
"""``(b, d, r)``: r vectors of the length of a flattened matrix."""

ROUNDING = 16.0
"""A part of a vector is rounding if it is shorter than this many units in the last place of the vector."""


@dataclass(frozen=True)
class LowRank(Structure):
    """What both forms share: matrices as vectors, and tensors that are kept where they came out finite.

    The direction must be the last gradient g. As the statistic G has that in full, no step is longer than 1:
    ``|G^(-1/2) g|^2 = g^T G^-1 g <= |g|^2 / (eps + |g|^2)``. Rounding could make it longer where gradients differ in
    size by more than the dtype resolves, so the length is cut to 1.

    Args:
        rank: directions that are remembered, at most d; None for all d, which is exact.
        eps: what the statistic starts from, ``eps I``.
        integrator: how a statistic of one rank too many is brought back to `rank`, see `AdaGram`.
    """

    rank: int | None
    eps: float
    integrator: Literal["psi", "bug", "eig"]

    def columns(self, d: int) -> int:
        """The rank for d entries: `rank`, at most d."""
        return d if self.rank is None else min(self.rank, d)

    def compute_statistic(self, grad: Stack) -> Tensor:
        """The gradient as a column."""
        return grad.reshape(len(grad), -1, 1)

    def compute_root(self, state: State) -> Tensor:
        """No-op: `update_statistic` has computed all; returns where it could not."""
        ok = state["failed"][:, 0, 0] == 0
        state["failed"].zero_()
        return ok

    def root_flops(self, m: int, n: int) -> float:
        """0: there is no root."""
        return 0.0


@dataclass(frozen=True)
class LowRankFactor(LowRank):
    """A factor of the statistic: ``eps I + sum g g^T = L L^T`` with ``L^-1 = eps^(-1/2) (I - P Q^T)``.

    One gradient multiplies it by a rank-one matrix: with ``h = L^-1 g`` and ``s = sqrt(1 + |h|^2)``, the new inverse is
    ``(I - (1 - 1/s) u u^T) L^-1``, u the unit vector of h, which adds one column to P and Q. Beyond `rank` columns the
    integrator brings ``P Q^T`` back. The last gradient is kept apart and in full.
    Direction ``L^-1 x``: of the length of ``G^(-1/2) x``, but turned.

    State: ``P`` and ``Q (b, d, r)``, ``whitened (b, d, 1)`` (the last h), ``used (b, 1, 1)`` columns, ``failed``. With
    r of d, ``P (b, d, d)`` is the product and Q is empty.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("P", "Q", "whitened", "used", "failed")

    def init(self, like: Stack) -> State:
        """No columns: the statistic is ``eps I``."""
        b, m, n = like.shape
        r = self.columns(m * n)
        return {
            "P": like.new_zeros(b, m * n, r),
            "Q": like.new_zeros(b, m * n, r if r < m * n else 0),
            "whitened": like.new_zeros(b, m * n, 1),
            "used": like.new_zeros(b, 1, 1),
            "failed": like.new_zeros(b, 1, 1),
        }

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Take the last gradient into the factor, and keep this one apart. It is a sum: `beta2` is not asked."""
        active = active_mask(measurement) > 0
        P, Q, used = state["P"], state["Q"], state["used"]
        u, size, s = unit(state["whitened"])
        p = u * (size / s) * (size / (1 + s))  # (1 - 1/s) u without cancellation
        w = u - factor(Q, P, u)
        if not Q.numel():
            new_P, new_Q = P + p @ w.mT, Q
        else:
            slot = (torch.arange(P.shape[2], device=P.device) == used).to(P.dtype)
            full, (new_P, new_Q) = used >= P.shape[2], (P + p * slot, Q + w * slot)
            if not known_all_true(~full):
                cut_P, cut_Q = self.integrate(P, Q, p, w)
                new_P, new_Q = where(full, cut_P, new_P), where(full, cut_Q, new_Q)
        new = {"P": new_P, "Q": new_Q, "used": used + (size > 0).to(used.dtype)}
        new["whitened"] = (measurement - factor(new_P, new_Q, measurement)) / math.sqrt(self.eps)
        keep(state, new, active)

    def integrate(self, P: Columns, Q: Columns, p: Columns, w: Columns) -> tuple[Columns, Columns]:
        """``P Q^T + p w^T`` in the rank of P."""
        if self.integrator == "psi":
            # A projector-splitting step by an increment is one subspace iteration: U U^T (P Q^T + p w^T).
            V = orth(Q)
            U = orth(P @ (Q.mT @ V) + p @ (w.mT @ V))
            return U, Q @ (P.mT @ U) + w @ (p.mT @ U)
        if self.integrator == "bug":
            U, V = orth(P), orth(Q)
            U, V = orth(P @ (Q.mT @ V) + p @ (w.mT @ V)), orth(Q @ (P.mT @ U) + w @ (p.mT @ U))
            return U @ ((U.mT @ P) @ (Q.mT @ V) + (U.mT @ p) @ (w.mT @ V)), V
        left, R = torch.linalg.qr(torch.cat([P, p], 2))
        right, T = torch.linalg.qr(torch.cat([Q, w], 2))
        U, sigma, V = svd(R @ T.mT)
        r = P.shape[2]
        return left @ (U * sigma[:, None])[:, :, :r], right @ V[:, :, :r]

    def precondition(self, state: State, direction: Stack) -> Stack:
        """``L^-1`` times the direction."""
        x = direction.reshape(len(direction), -1, 1)
        x = (x - factor(state["P"], state["Q"], x)) / math.sqrt(self.eps)
        u, _, s = unit(state["whitened"])
        along = u.mT @ x
        return cut(residual(x, u * along) + u * (along / s)).reshape(direction.shape)

    def step_flops(self, m: int, n: int) -> float:
        """``d r (8 r + 6)`` with d = m n: orthogonal bases of r columns, and products with them; 3 d^2 with r of d."""
        d, r = m * n, self.columns(m * n)
        return 3.0 * d * d if r == d else d * r * (8.0 * r + 6)


@dataclass(frozen=True)
class LowRankSymmetric(LowRank):
    """The statistic itself: ``delta I + U diag(s^2) U^T``, of which the inverse root is taken exactly.

    Each gradient adds a column to ``U diag(s)``, and a singular value decomposition makes the columns orthogonal again;
    before that, they are brought back to `rank`. What is dropped has the energy rho; with `compensate` delta grows by
    ``rho / (d - r)``, as if it were spread over all that is not remembered. The last gradient is in the statistic in
    full. With r of d this is full-matrix AdaGrad.

    State: ``basis (b, d, r + 1)``, the columns ``U diag(s)``, the longest first; ``floor (b, 1, 1)``, the root of
    delta; ``before (b, r + 1, r)``, for "bug" the last basis in terms of U; ``failed``.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("basis", "before", "floor", "failed")

    compensate: bool = True

    def init(self, like: Stack) -> State:
        """No columns, and the root of eps."""
        b, m, n = like.shape
        r = self.columns(m * n)
        width = min(r + 1, m * n)
        return {
            "basis": like.new_zeros(b, m * n, width),
            "before": like.new_zeros(b, width if self.integrator == "bug" else 0, r),
            "floor": like.new_full((b, 1, 1), math.sqrt(self.eps)),
            "failed": like.new_zeros(b, 1, 1),
        }

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Bring the columns back to `rank` and add the gradient. It is a sum: `beta2` is not asked."""
        active = active_mask(measurement) > 0
        basis, floor = state["basis"], state["floor"]
        d, r = basis.shape[1], self.columns(basis.shape[1])
        if r < d:
            basis, dropped = self.integrate(basis, state["before"], r)
            if self.compensate:
                floor = torch.hypot(floor, dropped / math.sqrt(d - r))
        left, R = torch.linalg.qr(torch.cat([basis, measurement], 2))
        U, sigma, _ = svd(R)
        new = {"basis": left @ (U * sigma[:, None]), "floor": floor}
        if state["before"].numel():
            new["before"] = U[:, :r].mT
        keep(state, new, active)

    def integrate(self, basis: Columns, before: Tensor, r: int) -> tuple[Columns, Tensor]:
        """The columns in rank r, and the root of the energy that is dropped."""
        best, dropped = basis[:, :, :r], length(basis[:, :, r:])
        if self.integrator == "eig":
            return best, dropped
        U, s = directions(basis)
        scaled = s / s.amax(2, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
        turned = orth(scaled.mT.square() * before)  # of the statistic times the last basis, in terms of U
        core = turned.mT * s
        left, sigma, _ = svd(core)
        full = scaled[:, :, r:] > torch.finfo(s.dtype).eps  # else the best one is exact
        kept = U @ (turned @ (left * sigma[:, None]))
        rest = length(torch.diag_embed(s[:, 0]) - turned @ core)
        return torch.where(full, kept, best), torch.where(full, rest, dropped)

    def precondition(self, state: State, direction: Stack) -> Stack:
        """``(delta I + U diag(s^2) U^T)^(-1/2)`` times the direction."""
        x, floor = direction.reshape(len(direction), -1, 1), state["floor"]
        U, s = directions(state["basis"])
        along = U.mT @ x
        result = residual(x, U @ along) / floor + U @ (significant(along, x) / torch.hypot(floor, s).mT)
        return cut(result).reshape(direction.shape)

    def step_flops(self, m: int, n: int) -> float:
        """``d r (4 r + 6)`` with d = m n: an orthogonal basis of r + 1 columns, and products with it."""
        d, r = m * n, min(self.columns(m * n) + 1, m * n)
        return d * r * (4.0 * r + 6)


def factor(P: Columns, Q: Columns, x: Columns) -> Columns:
    """``P Q^T x``; where one of them is empty the other is the product."""
    if not Q.numel():
        return P @ x
    return P @ (Q.mT @ x) if P.numel() else Q.mT @ x


def unit(h: Columns) -> tuple[Columns, Tensor, Tensor]:
    """The unit vector of h (zero for zero), its length and ``sqrt(1 + |h|^2)``."""
    size = length(h)
    return h / torch.where(size > 0, size, 1), size, torch.hypot(size, torch.ones_like(size))


def length(X: Columns) -> Tensor:
    """``(b, 1, 1)``: the norm of all columns together, whatever their range."""
    if not X.numel():
        return X.new_zeros(len(X), 1, 1)
    top = X.abs().amax((1, 2), keepdim=True)
    scale = torch.where(top > 0, top, 1)
    return top * torch.linalg.vector_norm(X / scale, dim=(1, 2), keepdim=True)


def cut(step: Columns) -> Columns:
    """The step, of a length of 1 at most."""
    return step / length(step).clamp_min(1)


def directions(basis: Columns) -> tuple[Columns, Tensor]:
    """The unit vectors of orthogonal columns (zero for zero), and ``(b, 1, r)`` lengths."""
    s = torch.cat([length(column) for column in basis.split(1, 2)], 2)
    return basis / torch.where(s > 0, s, 1), s


def residual(x: Columns, projection: Columns) -> Columns:
    """``x - projection``, and zero where all of it is rounding: a large factor would make that a direction."""
    rest = x - projection
    return torch.where(significant(length(rest), x) > 0, rest, 0)


def significant(part: Tensor, x: Columns) -> Tensor:
    """Coefficients or lengths of parts of x, zero where they are of the size of x's rounding."""
    return torch.where(part.abs() > ROUNDING * torch.finfo(x.dtype).eps * length(x), part, 0)


def orth(X: Columns) -> Columns:
    """An orthonormal basis of the columns."""
    return torch.linalg.qr(X)[0]


def svd(X: Columns) -> tuple[Columns, Tensor, Columns]:
    """Singular vectors, values and right vectors of small matrices; NaN for one that LAPACK cannot solve."""
    try:
        U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        if len(X) > 1:
            U, sigma, V = zip(*(svd(one[None]) for one in X), strict=True)
            return torch.cat(U), torch.cat(sigma), torch.cat(V)
        k = min(X.shape[1:])
        return X.new_full((1, X.shape[1], k), math.nan), X.new_full((1, k), math.nan), X.new_zeros(1, X.shape[2], k)
    return U, sigma, Vh.mT


def keep(state: State, new: State, active: Tensor) -> None:
    """Write new values of active matrices, in place; where some are not finite a matrix keeps its state, marked."""
    sums = [
        tensor.sum(tuple(range(1, tensor.ndim)), keepdim=True) for tensor in new.values()
    ]  # keep what is not finite
    finite = torch.cat(sums, 1).isfinite().all(1, keepdim=True)
    for key, tensor in new.items():
        state[key].copy_(where(active & finite, tensor, state[key]))
    state["failed"].copy_(active & ~finite)
