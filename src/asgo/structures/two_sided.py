"""One matrix on each side: the preconditioner of Shampoo."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.linalg.masked import where
from asgo.linalg.matmul import gram
from asgo.linalg.spectral import inverse_power
from asgo.structures.base import Structure, active_mask, masked_ema_, norms_along, shorten


@dataclass(frozen=True)
class TwoSided(Structure):
    """The gram matrices of both sides, each to the power -1/4.

    ``L <- b2 L + (1 - b2) G G^T``, ``R <- b2 R + (1 - b2) G^T G``, or their sums; direction
    ``(L + eps I)^(-1/4) M (R + eps I)^(-1/4)``. ``L^(1/2) kron R^(1/2)`` bounds the full statistic from above, but such
    matrices form no algebra, so this is no `Algebra` here.

    State: ``left (b, m, m)``, ``right (b, n, n)``, ``left_root`` and ``right_root`` alike.

    Args:
        max_size: a longer side, if there is a limit, is left alone (its tensors are empty); the other takes the power
            -1/2.
        limit: the longest that a row or a column of the result may be; None for any. For roots that are older than the
            statistic, see `asgo.structures.base.reach`.
        eps: damping, absolute and inside the roots.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("left", "right", "left_root", "right_root")

    max_size: int | None = 8192
    limit: float | None = None
    eps: float = 1e-8

    def sizes(self, m: int, n: int) -> tuple[int, int]:
        """The sizes of both grams; 0 for a side that is left alone."""
        limit = math.inf if self.max_size is None else self.max_size
        return (m if m <= limit else 0), (n if n <= limit else 0)

    @property
    def root_keys(self) -> tuple[str, ...]:
        """What the memory alone determines."""
        return ("left_root", "right_root")

    @property
    def symmetric(self) -> tuple[str, ...]:
        """Statistics and roots."""
        return ("left", "right", *self.root_keys)

    def init(self, like: Stack) -> State:
        """Zero statistics and identities as roots."""
        b, m, n = like.shape
        state = {}
        for side, k in zip(("left", "right"), self.sizes(m, n), strict=True):
            state[side] = like.new_zeros(b, k, k)
            state[f"{side}_root"] = torch.eye(k, dtype=like.dtype, device=like.device).repeat(b, 1, 1)
        return state

    def compute_statistic(self, grad: Stack) -> Tensor:
        """The gradient itself: its two grams have no common shape."""
        return grad

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Average both grams in, or add them up with ``beta2`` of 1."""
        active = active_mask(measurement)
        if state["left"].numel():
            masked_ema_(state["left"], gram(measurement), beta2, active)
        if state["right"].numel():
            masked_ema_(state["right"], gram(measurement.mT), beta2, active)

    def compute_root(self, state: State) -> Tensor:
        """New roots where both can be computed."""
        sides = [side for side in ("left", "right") if state[side].numel()]
        fresh = [inverse_power(state[side], self.eps, 0.5 / len(sides)) for side in sides]
        ok = torch.ones(len(state["left"]), dtype=torch.bool, device=state["left"].device)
        for _, well in fresh:
            ok = ok & well
        for side, (new, _) in zip(sides, fresh, strict=True):
            kept = state[f"{side}_root"]
            kept.copy_(where(ok[:, None, None], new, kept))
        return ok

    def precondition(self, state: State, direction: Stack) -> Stack:
        """Both roots times the direction, its rows and columns limited if asked."""
        if state["left"].numel():
            direction = state["left_root"] @ direction
        if state["right"].numel():
            direction = direction @ state["right_root"].mT
        if self.limit is None or not any(self.sizes(*direction.shape[1:])):
            return direction
        return shorten(direction, torch.maximum(norms_along(direction, 2), norms_along(direction, 1)), self.limit)

    def root_flops(self, m: int, n: int) -> float:
        """``m^3 + n^3``, of the sides that have a root."""
        return float(sum(k**3 for k in self.sizes(m, n)))

    def step_flops(self, m: int, n: int) -> float:
        """``2 m n (m + n)``: two grams and two products with roots."""
        return 2.0 * m * n * sum(self.sizes(m, n))
