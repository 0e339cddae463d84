"""Gradients ahead of the weights, along the trend of the training run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

START, END = 1 / 6, 3 / 4
"""The part of the run, in shares of its steps, with a lookahead."""
MEMORY = 1 / 32
"""Share of the steps that the average of the weights' changes reaches back over."""


class EMANesterov:
    """Steps from ``w + beta m`` in place of the weights ``w``, with m an average of their changes.

    One step of an optimizer A is ``w' = A(w + beta m)`` and ``m' = g m + (1 - g) (w' - w)``, with
    ``g = 1 - 1 / (MEMORY steps)``. `beta` falls with the learning rate and is 0 before `START` and after `END` of the
    run ("EMA-Nesterov: Stabilizing Nesterov's Lookahead for Accelerated Deep Learning Optimization", Yau, Li, Glentis,
    Boreiko, Wai and Hong 2026; their run of 3,150 steps has ``g = 0.99``, and `beta` between steps 500 and 2,400).

    State: one copy of the weights; another one lives from `before` to `after`.

    Args:
        parameters: the weights.
        beta: of the largest learning rate.
        steps: of the whole run.
    """

    def __init__(self, parameters: Iterable[Tensor], beta: float, steps: int) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.beta, self.steps = beta, steps
        self.keep = 1 - 1 / max(1.0, MEMORY * steps)
        self.averages = [torch.zeros_like(p) for p in self.parameters]
        self._weights: list[Tensor] = []

    @torch.no_grad()
    def before(self, step: int, factor: float) -> None:
        """Move the weights ahead for step number `step` (from 0), whose learning rate is `factor` of the largest."""
        self._weights = [p.detach().clone() for p in self.parameters]
        if START <= step / self.steps < END:
            for parameter, average in zip(self.parameters, self.averages, strict=True):
                parameter.add_(average, alpha=self.beta * factor)

    @torch.no_grad()
    def after(self) -> None:
        """Take the change of the weights since `before` into the average."""
        for parameter, average, old in zip(self.parameters, self.averages, self._weights, strict=True):
            average.lerp_(parameter - old, 1 - self.keep)
        self._weights = []

    def state_dict(self) -> list[Tensor]:
        """The averages, in the order of the weights that train."""
        return self.averages

    def load_state_dict(self, state: list[Tensor]) -> None:
        """Take averages from `state_dict`."""
        for average, saved in zip(self.averages, state, strict=True):
            average.copy_(saved)
