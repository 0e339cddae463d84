"""Fitting a generalized linear model from several seeds and with several settings at once.

All of them are one stack of independent models ``(seeds * settings, m, n)``. A step is taken by the optimizer itself,
at learning rate 1 and from zero, which gives its direction; each model then moves by its own rate along it. That
is exact, because no contender's direction depends on the weights or the rate. Nor does it change when gradients are
c times as long and the statistic starts from c^2 as much, so models with scaled gradients have other eps. A whole grid
is little dearer than one fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from experiments.glm.contenders import FLOOR, OptimizerSpec
from experiments.glm.problems import Problem

DIVERGED = 1e10
"""A gradient entry beyond this ends a run: its loss is infinite from then on."""


@dataclass(frozen=True)
class Setting:
    """What is tuned.

    Args:
        lr: learning rate.
        eps: what the statistic of squares starts from, ``H_0 = eps I``; None: as the contender says, or it has none.
    """

    lr: float
    eps: float | None = None

    @property
    def scale(self) -> float:
        """Gradients of this many times the length give the step of `eps`, when the statistic starts from `FLOOR`."""
        return 1.0 if self.eps is None else math.sqrt(FLOOR / self.eps)


@dataclass(frozen=True)
class Plan:
    """How long, and how finely measured.

    Args:
        batch: examples per step.
        steps: number of steps.
        evaluations: how often the loss over all training rows is measured, after the start.
    """

    batch: int
    steps: int
    evaluations: int

    def marks(self) -> list[int]:
        """The steps after which the loss is measured, the start included."""
        return sorted({round(i * self.steps / self.evaluations) for i in range(self.evaluations + 1)})


@dataclass(frozen=True)
class Curves:
    """What came out.

    Args:
        train: ``(seeds, settings, marks)`` mean loss over the training rows; infinite after divergence.
        held: ``(seeds, settings)`` mean loss over the held-out rows, at the end.
    """

    train: Tensor
    held: Tensor


@torch.no_grad()
def descend(
    problem: Problem, contender: OptimizerSpec, settings: Sequence[Setting], seeds: Sequence[int], plan: Plan
) -> Curves:
    """Fit a model for every seed and setting. One seed gives every contender the same start and batches."""
    models = torch.stack([start(problem, seed) for seed in seeds]).repeat_interleave(len(settings), 0)
    order = torch.stack([examples(seed, len(problem.y), plan) for seed in seeds])
    lr, scale = (
        torch.tensor([getattr(setting, name) for setting in settings], dtype=models.dtype).repeat(len(seeds))
        for name in ("lr", "scale")
    )
    move = nn.Parameter(torch.zeros_like(models))
    optimizer = contender.build(move)
    alive = torch.ones(len(models), dtype=torch.bool)
    marks, losses = set(plan.marks()), []
    for step in range(plan.steps + 1):
        if step in marks:
            losses.append(_measure(problem, models, alive))
        if step < plan.steps:
            grad = gradient(problem, models, order[:, step])
            alive &= grad.abs().amax((1, 2)) < DIVERGED
            move.grad = torch.where(alive[:, None, None], grad * scale[:, None, None], 0.0)
            move.zero_()
            optimizer.step()
            models += lr[:, None, None] * move
    held = mean_loss(problem, models, problem.held_x, problem.held_y)
    shape = (len(seeds), len(settings))
    return Curves(torch.stack(losses, -1).view(*shape, -1), torch.where(alive, held, math.inf).view(shape))


def start(problem: Problem, seed: int) -> Tensor:
    """The first weights ``(m, n)``: those of `torch.nn.Linear`."""
    n = problem.x.shape[1]
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(problem.outputs, n, generator=generator, dtype=problem.x.dtype) - 1) / math.sqrt(n)


def examples(seed: int, rows: int, plan: Plan) -> Tensor:
    """Which rows each step sees, ``(steps, batch)``: every row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(plan.steps * plan.batch / rows)
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(passes)])
    return order[: plan.steps * plan.batch].view(plan.steps, plan.batch)


def gradient(problem: Problem, models: Tensor, rows: Tensor) -> Tensor:
    """The gradient of each model's mean loss over its seed's batch.

    Args:
        problem: the data and the loss.
        models: ``(seeds * settings, m, n)``.
        rows: ``(seeds, batch)``.
    """
    (seeds, batch), (_, m, n) = rows.shape, models.shape
    x, y = problem.x[rows], problem.y[rows]
    z = (x @ models.view(seeds, -1, n).mT).view(seeds, batch, -1, m)
    slope = problem.loss.slope(z, y[..., None])
    return (slope.reshape(seeds, batch, -1).mT @ x / batch).view_as(models)


def mean_loss(problem: Problem, models: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss of each model over all rows of `x`."""
    z = (x @ models.flatten(0, 1).mT).view(len(x), len(models), problem.outputs)
    return problem.loss.each(z, y[:, None]).mean(0)


@lru_cache(maxsize=2)
def optimum(problem: Problem) -> float:
    """The smallest mean loss over the training rows, by L-BFGS; 0 in the limit where the classes can be separated."""
    shape = (1, problem.outputs, problem.x.shape[1])
    every = torch.arange(len(problem.y))[None]

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        models = torch.from_numpy(flat).view(shape)
        loss = mean_loss(problem, models, problem.x, problem.y)
        return float(loss), gradient(problem, models, every).flatten().numpy()

    options = {"maxiter": 2000, "maxfun": 4000, "gtol": 1e-9, "ftol": 1e-13}
    return float(minimize(value, np.zeros(math.prod(shape)), jac=True, method="L-BFGS-B", options=options).fun)


def _measure(problem: Problem, models: Tensor, alive: Tensor) -> Tensor:
    loss = mean_loss(problem, models, problem.x, problem.y)
    return torch.where(alive & loss.isfinite(), loss, math.inf)
