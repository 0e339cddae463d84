"""The square root of the one-sided statistic in place of the statistic and its inverse root."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.linalg import half_precision, polar
from asgo.linalg.inverse_root import eigh_with_root
from asgo.linalg.masked import known_all_true, where
from asgo.linalg.matmul import exact_matmul, gram, times
from asgo.linalg.packed_symmetric import unpack
from asgo.linalg.spectral import decompose
from asgo.structures.base import OneCall, active_mask
from asgo.structures.one_sided import Cross, Sided, cross_square, normalized

EPS = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Relative damping of roots of the statistic itself, by its dtype."""
APART = 512 * 512
"""Entries from which the matrices of a stack are stepped one after the other on a CPU. In bfloat16 on units for it that
takes 0.86 of the time of a stack at once at 768 x 768 and 0.89 at 512 x 512, but 1.06 at 384 and 2.2 at 128."""
IN_RANGE = 50
"""Exponents whose squares float32 holds, with sums of them."""

Result: TypeAlias = tuple[Stack, Tensor]
Step: TypeAlias = Callable[[State, Stack, Stack | None, float, Stack | None], Result]


@dataclass(frozen=True)
class SquareRoot(Sided, OneCall):
    """ASGO's preconditioner without an inverse root: keeps ``S = V^(1/2)`` and runs Muon's iteration on ``[D | S]``.

    With ``V <- b2 V + (1 - b2) D D^T`` (left side, momentum statistic) and ``S S^T = V``::

        A = [sqrt(1 - b2) D | sqrt(b2) S]      A A^T is the new V, exactly
        X = (A A^T)^(-1/2) A                   the polar factor, by matrix products in half precision
        U = X[:, :n] / sqrt(1 - b2)            = V^(-1/2) D
        S <- X A^T                             = V^(1/2)

    For the gradient statistic G stands in the place of D, and D follows as further columns that are multiplied and do
    not enter ``X X^T``. With ``b2 = 1`` statistics add up: ``A = [G | S]``. With ``b2 = 0`` there is no S in A, S stays
    as it is, and the update is Muon's. At the first step S is 0 and ``V = (1 - b2) D D^T``, as of `OneSided`.

    There is no ``eps``: directions of A with a singular value below ``low s``, with ``s^2 = ||V||_F``, are amplified by
    ``plan.amplification / s`` at most (see `asgo.linalg.polar`), as a root of V amplifies them by a relative damping of
    ``1 / plan.amplification^2``: 4.7e-6 for "bf16" and "fp16", 2.1e-5 for their fast plans, 4.5e-7 for their deep ones,
    which take one step more.
    With the momentum statistic no row or column of U is longer than ``(1 + tolerance) / sqrt(1 - b2)``.

    In float32 and float64 this iteration would cost more than an inverse root of V. So there, and in every precision
    where ranks sum statistics, ``V = b2 S S^T + (1 - b2) D D^T`` is formed in the dtype of D. Its inverse root Z is
    computed with a relative damping of `EPS`, and ``U = Z D``. On a CPU Z and ``S = V^(1/2)`` come from one
    eigendecomposition, which takes the time of 6.5 products of ``k x k`` matrices, where the iteration takes 32 for a
    square matrix and 71 for ``k x 4k``; elsewhere Z is that of `asgo.linalg.polar.cholesky_root` and S follows from it.

    Nor is there an interval between refreshes: the root is a by-product of the update.

    State: ``sqrt (b, k, k)``, symmetric (`Packed` leaves it as it is), in bfloat16 for the half precisions, whose
    exponents reach as far as float32's; and with `cross_normalize` ``cross`` as of `OneSided`. Stored in bfloat16, S
    follows V as long as one step changes it by more than a rounding: use ``keep="fp32"`` for b2 above 0.98 and for sums
    (b2 = 1).

    **How to step.** One call does all of it, where this process has whole matrices::

        update, ok = structure.update(state, direction, seen, beta2)

    Where ranks hold shards of a matrix along the axis that is `is_shard_additive`, statistics add up over ranks::

        R = structure.compute_statistic(seen)                                   # float32 (b, k, k) of the shard
        R = all_reduce(R)                                             # the only transfer but for norms
        update, ok = structure.update_from(state, direction, R, beta2, whole)   # direction: the shard; state: whole

    The state is the same on all ranks, bit for bit, if R is. In both calls the caller counts ``~ok``, rescales the
    update and adds it. `compute_statistic`, `update_statistic`, `compute_root` and
    `precondition` do the same in the four calls of every structure, at a higher cost: for loops that know nothing of
    `update`.

    Args:
        side: as of `OneSided`.
        precision: one of `asgo.linalg.polar.plans`, or "auto": float64 for float64, float16 on CUDA, bfloat16 on CPUs
            that have units for it, else float32. In place of bfloat16 it takes float32 with the gradient statistic: the
            columns that are carried along do not correct themselves. On a CPU without units for a half precision its
            products are computed in float32 and rounded once, as units do.
        cross_normalize: as of `OneSided`.
        keep: the dtype of ``sqrt``; "auto" is bfloat16 for half precision, else the state's dtype.
    """

    state_keys: ClassVar[tuple[str, ...]] = (*Sided.state_keys, "sqrt")

    side: Literal["auto", "left", "right"] = "auto"
    precision: str = "auto"
    cross_normalize: Cross = False
    keep: Literal["auto", "bf16", "fp32"] = "auto"

    def with_side_of(self, m: int, n: int) -> SquareRoot:
        """With the side that ``"auto"`` would take."""
        return replace(self, side="left" if self.left(m, n) else "right")

    def plan(self, like: Tensor, carried: bool = False) -> polar.Plan:
        """The plan for a stack of this dtype on this device, with a gradient statistic if something is carried."""
        plan = polar.plan_for(self.precision, like.dtype, like.device)
        too_coarse = carried and self.precision == "auto" and plan.dtype == torch.bfloat16
        return polar.plans()["fp32"] if too_coarse else plan

    def init(self, like: Stack) -> State:
        """A zero root: nothing has been averaged."""
        b, m, n = like.shape
        k = m if self.left(m, n) else n
        return {"sqrt": like.new_zeros(b, k, k, dtype=self._kept(like))} | self.init_cross(like)

    def _kept(self, like: Tensor) -> torch.dtype:
        if self.keep == "auto":
            return torch.bfloat16 if self.plan(like).dtype.itemsize < 4 else like.dtype
        return torch.bfloat16 if self.keep == "bf16" else torch.float32

    # ---- whole matrices: one call

    def update(
        self, state: State, direction: Stack, seen: Stack, beta2: float, out: Stack | None = None
    ) -> tuple[Stack, Tensor]:
        """Take a gradient into the statistic and precondition a direction with the result.

        Args:
            state: from `init`; ``sqrt`` and ``cross`` change in place. Where `seen` is zero they stay.
            direction: ``(b, m, n)`` in float32 or float64.
            seen: what enters the statistic, of the same shape: `direction` itself (the same object) for the momentum
                statistic, the gradient for the paper's.
            beta2: decay of the statistic; 1 adds up.
            out: as of `OneCall`.

        Returns:
            The update in the dtype of `direction`, and ``(b,)`` bool: where it is False (NaN, infinity, a diverged
            iteration) the update is zero and the state has not changed.
        """
        left = self.left(*direction.shape[1:])
        D, G = (direction, seen) if left else (direction.mT, seen.mT)
        out = out if left or out is None else out.mT
        plan = self.plan(D, carried=seen is not direction)
        by = self._by_iteration if plan.dtype.itemsize < 4 else self._by_statistic
        U, ok = one_by_one(by, state, D, None if seen is direction else G, beta2, out)
        return self._across(state, U if left else U.mT, lambda norms: norms), ok

    def _by_iteration(self, state: State, D: Stack, G: Stack | None, beta2: float, out: Stack | None = None) -> Result:
        """From the left, by the polar factor of ``[G | S]``; G of None is D itself."""
        carried, G = (None, D) if G is None else (D, G)
        active = active_mask(G) > 0  # before D, which may be G, gives its place to the update
        weight, decay = (1.0, 1.0) if beta2 == 1 else (math.sqrt(1 - beta2), math.sqrt(beta2))
        A = [(G, weight)]
        if beta2 > 0:  # S is symmetric: it comes in the memory order of D
            A += [(state["sqrt"] if D.is_contiguous() else state["sqrt"].mT, decay)]
        U, S, norm, ok = polar.polar_and_root(A, self.plan(D, carried is not None), carried, beta2 > 0, out)
        if S is not None:
            _keep(state, S * norm, ok[:, None, None] & active)
        return U.div_(weight) if carried is None and weight != 1 else U, ok

    def _by_statistic(self, state: State, D: Stack, G: Stack | None, beta2: float, out: Stack | None = None) -> Result:
        """From the left, by the root of ``V`` itself, of which a power of two is taken out if its squares need that."""
        sound = torch.isfinite(polar.largest(D))
        G = D if G is None else G
        top = torch.maximum(polar.largest(G), polar.largest(state["sqrt"]).to(G.dtype))
        exponent = torch.frexp(where(top.isfinite(), top, 1.0)).exponent.clamp(-124, 126) // 4 * 4
        unit = torch.ldexp(torch.ones_like(top), -exponent)  # to the fourth, so that its roots are exact
        unit = torch.where(exponent.abs() > IN_RANGE, unit, 1.0)
        with exact_matmul(D.device):
            Z, ok = self._take_in(
                state, self._measured(G if known_all_true(unit == 1) else G * unit, sound), beta2, unit
            )
            U = where(sound, times(Z.mul_(unit), D), 0.0)
            return U if out is None else out.copy_(U), ok

    def _measured(self, G: Stack, sound: Tensor) -> Tensor:
        return where(sound, gram(G), torch.nan)

    # ---- shards: measure, all-reduce, then one call

    def compute_statistic(self, grad: Stack) -> Tensor:
        """``G G^T`` or ``G^T G`` in the dtype of the gradient: the sum over shards is the statistic of the matrix.

        Its entries are squares, so that in float32 gradients beyond 1e19 or below 1e-19 are out of range, as
        in `OneSided`; `update` has no such limit.
        """
        return gram(grad if self.left(*grad.shape[1:]) else grad.mT)

    def update_from(
        self, state: State, direction: Stack, R: Tensor, beta2: float, whole: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Stack, Tensor]:
        """As `update`, with the measurement of whole matrices and a shard of the direction.

        Args:
            state: of whole matrices, but for ``cross``, which is cut like the direction.
            direction: the shard, or all of it.
            R: `compute_statistic` of what enters the statistic, summed over the ranks that hold shards.
            beta2: decay of the statistic; 1 adds up.
            whole: all-reduces norms ``(b, 1, 1)`` of shards to norms of matrices; None where matrices are not
                sharded. Called with `cross_normalize` only, once.
        """
        Z, ok = self._take_in(state, R, beta2)
        left = self.left(*direction.shape[1:])
        with exact_matmul(direction.device):
            U = times(Z, direction) if left else times(Z, direction.mT).mT
        return self._across(state, U, whole or (lambda norms: norms)), ok

    def _take_in(self, state: State, R: Tensor, beta2: float, unit: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """S of the new statistic in place; its inverse root, 0 where that cannot be computed.

        `unit` is what R and the root have been multiplied by, the former twice.
        """
        S, active = state["sqrt"].to(R.dtype) * unit, active_mask(R) > 0
        with exact_matmul(R.device):
            V = torch.baddbmm(R, S, S.mT, beta=1.0 if beta2 == 1 else 1 - beta2, alpha=beta2)
            del R, S  # which are as large as all that the root needs
            Z, S, ok = eigh_with_root(V, EPS[V.dtype]) if V.device.type == "cpu" else self._by_cholesky(V)
        if beta2 > 0:
            _keep(state, S.div_(unit), active & ok[:, None, None])
        return Z, ok

    def _by_cholesky(self, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse root Z, damped by d, and ``S = Z (V + d/2)``, for which V is changed.

        Z V would lose d in every step. ``S^2 = V + d^2 / (4 (V + d))``, and the second term adds up over steps, until
        Z is damped by ``(1 + 1 / sqrt(1 - b2)) / 2`` times d where V is 0: 1.06 d at b2 = 0.2, 2.7 d at 0.95.
        """
        Z, ok = polar.cholesky_root(self.plan(V))(V, EPS[V.dtype])
        V.diagonal(dim1=1, dim2=2).add_(torch.linalg.vector_norm(V, dim=(1, 2))[:, None], alpha=EPS[V.dtype] / 2)
        return Z, half_precision.symmetric(Z, V, exact=True), ok

    # ---- the four calls of every structure

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """The new square root, from the measurement of whole matrices."""
        self._take_in(state, measurement, beta2)

    def compute_root(self, state: State) -> Tensor:
        """``S`` is refreshed by `update_statistic`; where that failed the last one stays."""
        return torch.isfinite(state["sqrt"]).all(-1).all(-1)

    def precondition(self, state: State, direction: Stack) -> Stack:
        """``(S S^T)^(-1/2) D``: the iteration on S, with D as further columns."""
        return self.precondition_shard(state, direction, lambda norms: norms)

    def precondition_shard(self, state: State, direction: Stack, whole: Callable[[Tensor], Tensor]) -> Stack:
        """As `precondition`; `whole` as of `update_from`."""
        left = self.left(*direction.shape[1:])
        D = direction if left else direction.mT
        U, *_ = polar.polar_and_root([(state["sqrt"].to(D.dtype), 1.0)], self.plan(D, carried=True), D, root=False)
        return self._across(state, U if left else U.mT, whole)

    def converted(self, state: State) -> State:
        """From the gram and root of `OneSided`."""
        return from_gram(state, self._kept(state["exp_avg"])) if "gram" in state else state

    def root_flops(self, m: int, n: int) -> float:
        """``k^3`` for each product of the iteration."""
        k, long = (m, n) if self.left(m, n) else (n, m)
        return polar.plans()["bf16"].products(k, k + long) * float(k) ** 3

    def step_flops(self, m: int, n: int) -> float:
        """``k^2 (k + n)``: the product ``X A^T``."""
        k, long = (m, n) if self.left(m, n) else (n, m)
        return float(k) ** 2 * (k + long)

    def _across(self, state: State, U: Stack, whole: Callable[[Tensor], Tensor]) -> Stack:
        """U, divided by its running size along the other side if asked."""
        if not self.cross_normalize:
            return U
        square = cross_square(U, self.left(*U.shape[1:]), self.cross_normalize)
        active = whole(square.sum((1, 2), keepdim=True).sqrt_()) > 0
        return normalized(state, U, square, active)


def one_by_one(by: Step, state: State, D: Stack, G: Stack | None, beta2: float, out: Stack | None) -> Result:
    """All matrices at once or, on a CPU, large ones one after the other: what a step needs is in the cache then."""
    b, k, n = D.shape
    if b <= 1 or k * n < APART or D.device.type != "cpu" or torch.compiler.is_compiling():
        return by(state, D, G, beta2, out)
    U = torch.empty_like(D) if out is None else out
    states = [{"sqrt": S} for S in state["sqrt"].split(1)] if "sqrt" in state else [{}] * b
    parts = zip(states, D.split(1), [None] * b if G is None else G.split(1), U.split(1), strict=True)
    return U, torch.cat([by(one, D_i, G_i, beta2, U_i)[1] for one, D_i, G_i, U_i in parts])


def _keep(state: State, S: Tensor, active: Tensor) -> None:
    state["sqrt"].copy_(S if known_all_true(active) else torch.where(active, S, state["sqrt"].to(S.dtype)))


def from_gram(state: State, keep: torch.dtype) -> State:
    """A state of `SquareRoot` from one of `OneSided`: ``sqrt = gram^(1/2)`` by float64 eigendecomposition.

    Args:
        state: with ``gram``, maybe packed (and ``root``, which is dropped); all other keys are kept.
        keep: the dtype of ``sqrt``.
    """
    gram = state["gram"]
    values, vectors = decompose((gram if gram.shape[-1] == gram.shape[-2] else unpack(gram)).double())
    S = (vectors * values.clamp_min(0).sqrt()[:, None]) @ vectors.mT
    return {key: x for key, x in state.items() if key not in ("gram", "root")} | {"sqrt": S.to(keep)}
