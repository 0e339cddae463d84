"""The square of what changes from step to step, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.linalg.masked import where
from asgo.structures.base import Structure, active_mask, all_ok, ema_denominator, masked_ema_, update_ema_weight


@dataclass(frozen=True)
class MomentumChange(Structure):
    """The mean square of differences of successive momenta, per entry.

    With ``H = M / (1 - b1^t)``: ``v <- b2 v + (1 - b2) (H_t - H_{t-1})^2``, ``H_0 = 0``, and the direction is
    ``H / max(sqrt(v / (1 - b2^t)), delta)``. Its preconditioner is diagonal, but its statistic is not
    computed from the gradients, so it is no `Algebra` here. `compute_statistic` must be given the momentum.

    State: ``exp_avg_sq (b, m, n)``, ``previous (b, m, n)``, ``weight`` and ``momentum_weight (b, 1, 1)``.

    Args:
        momentum: the decay b1 of the momentum.
        delta: the least that a direction is divided by.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg_sq", "previous", "weight", "momentum_weight")

    momentum: float
    delta: float

    def init(self, like: Stack) -> State:
        """Zeros: nothing has been averaged."""
        b = len(like)
        return {
            "exp_avg_sq": torch.zeros_like(like, memory_format=torch.contiguous_format),
            "previous": torch.zeros_like(like, memory_format=torch.contiguous_format),
            "weight": like.new_zeros(b, 1, 1),
            "momentum_weight": like.new_zeros(b, 1, 1),
        }

    def compute_statistic(self, grad: Stack) -> Tensor:
        """The momentum itself: its difference needs the memory."""
        return grad

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Average the squared difference to the last momentum in; a zero momentum is none."""
        active = active_mask(measurement)
        update_ema_weight(state["momentum_weight"], self.momentum, active)
        update_ema_weight(state["weight"], beta2, active)
        current = measurement / ema_denominator(state["momentum_weight"])
        masked_ema_(state["exp_avg_sq"], (current - state["previous"]).square_(), beta2, active)
        state["previous"].copy_(where(active > 0, current, state["previous"]))

    def compute_root(self, state: State) -> Tensor:
        """No-op: `precondition` takes the square roots of single numbers."""
        return all_ok(state)

    def precondition(self, state: State, direction: Stack) -> Stack:
        """The corrected direction divided by the root of the mean square, or by delta where that is more."""
        size = (state["exp_avg_sq"] / ema_denominator(state["weight"])).sqrt_().clamp_min_(self.delta)
        return direction / size.mul_(ema_denominator(state["momentum_weight"]))

    def root_flops(self, m: int, n: int) -> float:
        """0: there is no matrix root."""
        return 0.0

    def step_flops(self, m: int, n: int) -> float:
        """``4 m n``: two quotients, a square and a product per entry."""
        return 4.0 * m * n
