"""One matrix on one side: ``(sum or EMA of G G^T)^(-1/2)``, the preconditioner of ASGO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.linalg.inverse_root import ROOTS, eigh64
from asgo.linalg.masked import masked_lerp_, where
from asgo.linalg.matmul import gram, times
from asgo.linalg.packed_symmetric import diagonal
from asgo.structures.base import Algebra, Axis, Structure, ema_denominator, norms_along, shorten, update_ema_weight

CROSS_DECAY = 0.95
"""Decay of the second moment that `OneSided.cross_normalize` keeps along the other side."""

Cross: TypeAlias = Literal[True, False, "element"]
"""What the result is divided by: a running RMS per index of the other side (True), nothing, or one RMS per entry."""


class Sided(Structure):
    """What structures with one matrix on one side share: which side that is, and the average along the other one."""

    state_keys: ClassVar[tuple[str, ...]] = ("cross", "cross_weight")

    side: Literal["auto", "left", "right"]
    cross_normalize: Cross

    def left(self, m: int, n: int) -> bool:
        """Whether an ``m x n`` matrix is preconditioned from the left."""
        return self.side == "left" or (self.side == "auto" and m < n)

    def is_shard_additive(self, axis: Axis, m: int, n: int) -> bool:
        """``G G^T`` is a sum over columns, ``G^T G`` one over rows."""
        return axis == ("columns" if self.left(m, n) else "rows")

    @property
    def sharded_keys(self) -> tuple[str, ...]:
        """Numbers per index of the other side, along which shards are cut, or per entry."""
        return ("cross", "cross_weight") if self.cross_normalize else ()

    @property
    def added(self) -> Mapping[str, float]:
        """The weight: an average of earlier versions was taken as it was."""
        return {"cross_weight": 1.0} if self.cross_normalize else {}

    def init_cross(self, like: Stack) -> State:
        """The average and its weight, zero, if they are kept."""
        return init_cross(like, self.left(*like.shape[1:]), self.cross_normalize) if self.cross_normalize else {}


@dataclass(frozen=True)
class OneSided(Sided, Algebra):
    """The gram matrix of one side of the gradient.

    ``V <- b2 V + (1 - b2) G G^T`` on the left, ``G^T G`` on the right; direction ``V^(-1/2) M`` or
    ``M V^(-1/2)`` with the damping that the root defines. "ASGO: Adaptive Structured Gradient Optimization",
    An, Liu, Pan, Ren, Ma, Goldfarb and Zhang 2025, Algorithms 1 and 2.

    The algebra consists of all ``S kron I`` (left) or ``I kron S`` (right); its projection takes the partial trace
    over the other side, divided by that side's length.

    State, ``k`` the length of the preconditioned side: ``gram (b, k, k)``, ``root (b, k, k)`` and, with
    `cross_normalize`, ``cross`` and ``cross_weight``, each ``(b, 1, n)`` or ``(b, m, 1)``, of ``"element"``
    ``(b, m, n)``: an average from zero, and the average of a constant 1 since the first entry that was not zero, by
    which it is divided.

    Args:
        side: ``"left"`` preconditions rows (k = m), ``"right"`` columns (k = n), ``"auto"`` the shorter one and
            the right one of a square matrix, as released.
        cross_normalize: afterwards divide by the running root mean square of the result taken along the
            preconditioned side, one number per index of the other side; ``"element"``: one number per entry.
        mean: divide the gram by the length of the other side, as one-sided Shampoo does: the projection itself.
        length: that length, where shards of the other side are measured; None: what is measured is whole.
        limit: the longest that a row (left) or column (right) of the root times the direction may be, times the square
            root of that length with `mean`; None for any. For roots that are older than the statistic, see `reach`.
        root: one of `asgo.linalg.inverse_root.ROOTS`.
        eps: its damping.
    """

    state_keys: ClassVar[tuple[str, ...]] = (*Sided.state_keys, "gram", "root")

    side: Literal["auto", "left", "right"] = "auto"
    cross_normalize: Cross = False
    mean: bool = False
    length: int | None = None
    limit: float | None = None
    root: str = "auto"
    eps: float = 1e-6

    def with_side_of(self, m: int, n: int) -> OneSided:
        """With the side that ``"auto"`` would take, and the length of the other one."""
        left = self.left(m, n)
        return replace(self, side="left" if left else "right", length=n if left else m)

    @property
    def root_keys(self) -> tuple[str, ...]:
        """What the memory alone determines."""
        return ("root",)

    @property
    def symmetric(self) -> tuple[str, ...]:
        """The statistic and its root."""
        return ("gram", "root")

    @property
    def linear_statistic(self) -> bool:
        """True: the statistic is an average or a sum of gram matrices."""
        return True

    def init(self, like: Stack) -> State:
        """Zero statistics and the identity as root."""
        b, m, n = like.shape
        k = m if self.left(m, n) else n
        # Until the first refresh succeeds the direction is the momentum itself, whatever its scale.
        state = {
            "gram": like.new_zeros(b, k, k),
            "root": torch.eye(k, dtype=like.dtype, device=like.device).repeat(b, 1, 1),
        }
        return state | self.init_cross(like)

    def compute_statistic(self, grad: Stack) -> Tensor:
        """``G G^T`` or ``G^T G``."""
        _, m, n = grad.shape
        left = self.left(m, n)
        product = gram(grad if left else grad.mT)
        return product / self._length(m, n) if self.mean else product

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Average the gram in, or add it up with ``beta2`` of 1; a zero measurement leaves the gram as it is."""
        if beta2 == 1:
            state["gram"].add_(measurement)
        else:
            active = diagonal(measurement).sum(1)[:, None, None] > 0
            masked_lerp_(state["gram"], measurement, 1 - beta2, active)

    def compute_root(self, state: State) -> Tensor:
        """A new root of the gram where it can be computed."""
        fresh, ok = ROOTS[self.root](state["gram"], self.eps)
        state["root"].copy_(where(ok[:, None, None], fresh, state["root"]))
        return ok

    def retried(self) -> OneSided | None:
        """With the root that computes the same more exactly, where there is one."""
        exact = ROOTS[self.root].retry
        return None if exact is None else replace(self, root=exact)

    def precondition(self, state: State, direction: Stack) -> Stack:
        """The root times the direction, limited and divided by its running size along the other side if asked."""
        return self.precondition_shard(state, direction, lambda norms: norms)

    def precondition_shard(self, state: State, direction: Stack, whole: Callable[[Tensor], Tensor]) -> Stack:
        """As `precondition`; the lengths of whole rows, or norms of whole matrices, come from all shards."""
        _, m, n = direction.shape
        left = self.left(m, n)
        # The computed root is symmetric only up to its error, and accurate in this order of the products.
        result = times(state["root"], direction) if left else times(state["root"], direction.mT).mT
        if self.limit is None and not self.cross_normalize:
            return result
        active = None
        if self.limit is not None:
            size = whole(norms_along(result, 2 if left else 1))
            result = shorten(result, size, self.limit * (math.sqrt(self._length(m, n)) if self.mean else 1))
            active = size.amax((1, 2), keepdim=True) > 0
        if not self.cross_normalize:
            return result
        square = cross_square(result, left, self.cross_normalize)
        if active is None:
            active = whole(square.sum((1, 2), keepdim=True).sqrt_()) > 0
        return normalized(state, result, square, active)

    def _length(self, m: int, n: int) -> int:
        return max(self.length or (n if self.left(m, n) else m), 1)

    def converted(self, state: State) -> State:
        """From the square root of `SquareRoot`, whose inverse root is computed anew."""
        return to_gram(state, state["exp_avg"].dtype, self.eps) if "sqrt" in state else state

    def root_flops(self, m: int, n: int) -> float:
        """``k^3``."""
        return float(m if self.left(m, n) else n) ** 3

    def step_flops(self, m: int, n: int) -> float:
        """``2 m n k``: the gram and one product with the root."""
        return 2.0 * m * n * (m if self.left(m, n) else n)

    def project(self, A: Tensor, m: int, n: int) -> Tensor:
        """The mean of the diagonal blocks that belong to the other side, repeated along it."""
        cells = A.reshape(m, n, m, n)
        if self.left(m, n):
            return torch.kron(torch.einsum("injn->ij", cells) / n, torch.eye(n).to(A))
        return torch.kron(torch.eye(m).to(A), torch.einsum("minj,mn->ij", cells, torch.eye(m).to(A)) / m)


def init_cross(like: Stack, left: bool, cross: Cross) -> State:
    """The second moment of a result ``(b, m, n)`` before the first, see `normalized`."""
    b, m, n = like.shape
    shape = (b, m, n) if cross == "element" else (b, 1, n) if left else (b, m, 1)
    return {"cross": like.new_zeros(shape), "cross_weight": like.new_zeros(shape)}


def cross_square(result: Stack, left: bool, cross: Cross) -> Tensor:
    """Its squares: of the entries, or their mean along the preconditioned side."""
    square = result.square()
    return square if cross == "element" else square.mean(1 if left else 2, keepdim=True)


def normalized(state: State, result: Stack, square: Tensor, active: Tensor) -> Stack:
    """The result divided by the root of its average square, in place; that is `square` where it is seen first."""
    cross, weight = state["cross"], state["cross_weight"]
    update_ema_weight(weight, CROSS_DECAY, (active & ((square > 0) | (weight > 0))).to(weight.dtype))
    masked_lerp_(cross, square, 1 - CROSS_DECAY, active)
    return result.mul_((cross / ema_denominator(weight)).clamp_min_(torch.finfo(cross.dtype).tiny).rsqrt_())


def to_gram(state: State, dtype: torch.dtype, eps: float) -> State:
    """A state of `OneSided` from one of `SquareRoot`: ``gram = S S^T`` and its inverse root by
    `asgo.linalg.inverse_root.eigh64`.

    Args:
        state: with ``sqrt``; all other keys are kept.
        dtype: of ``gram`` and ``root``.
        eps: damping of the root.
    """
    S = state["sqrt"].double()
    V = (S @ S.mT).to(dtype)
    return {key: x for key, x in state.items() if key != "sqrt"} | {"gram": V, "root": eigh64(V, eps)[0]}
