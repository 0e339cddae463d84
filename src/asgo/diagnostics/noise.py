"""How much of a gradient is signal and how much is noise, from the gradients of microbatches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from asgo._types import Stack

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Moments:
    """Mean and scatter of the gradients of equal microbatches, one after the other.

    Welford's update, so nothing large is subtracted from something large, and memory is one gradient however many
    come. With N gradients ``g_i``, their mean ``g`` and ``s^2 = sum ||g_i - g||_F^2 / (N - 1)`` the gradient G of the
    whole batch has, without bias, the

        noise  ``E ||G - E G||_F^2 = c^2 s^2 / N``      signal  ``||E G||_F^2 = c^2 (||g||_F^2 - s^2 / N)``

    with c of 1 where G is the mean of the ``g_i``, and N where it is their sum, as under gradient accumulation.
    Being unbiased, the signal's estimate may be negative. The noise in units of the signal is the batch at which
    noise and signal weigh alike ("An Empirical Model of Large-Batch Training", McCandlish, Kaplan and Amodei, 2018).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Stack | None = None
        self.scatter: Float[Tensor, "b"] | None = None

    @torch.no_grad()
    def add(self, gradient: Stack) -> None:
        """One more gradient ``(b, m, n)``; kept in float32, or float64 for float64."""
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        self.count += 1
        if self.mean is None or self.scatter is None:
            self.mean = gradient.clone()
            self.scatter = gradient.new_zeros(len(gradient), dtype=torch.float64)
            return
        change = gradient - self.mean
        self.mean += change / self.count
        self.scatter += change.mul_(gradient - self.mean).sum((1, 2), dtype=torch.float64)

    def split(self, summed: bool = False) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Signal and noise of the whole batch's gradient, ``(b,)`` each in float64; NaN below two microbatches.

        Args:
            summed: the whole gradient is the sum of the microbatches', not their mean.

        Raises:
            ValueError: if none was added.
        """
        if self.mean is None or self.scatter is None:
            raise ValueError("Moments has seen no gradient: call add with the gradients of two microbatches or more.")
        scale = self.count**2 if summed else 1
        noise = self.scatter * (scale / self.count / (self.count - 1) if self.count > 1 else math.nan)
        return scale * self.mean.double().square().sum((1, 2)) - noise, noise
