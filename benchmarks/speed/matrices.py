"""Statistics whose roots are taken: drawn ones, those of a model that learns, and those that break solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asgo.lab.config.runs import ModelConfig
from asgo.lab.data.batches import DataConfig, open_data
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.models.language import build_model, token_loss
from asgo.optimizer.param_groups import with_views
from asgo.views import View
from asgo.views.routing import route

COUNT = 4
"""Matrices of a drawn problem."""
BETA1, BETA2 = 0.9, 0.95
"""Decay of momentum and statistic."""
DRIFT_STEPS = 20
"""Gradients behind a drawn average."""


@dataclass(frozen=True)
class Problem:
    """Statistics and what their roots are applied to.

    Args:
        grams: ``(b, k, k)``.
        directions: `b` matrices of `k` rows.
    """

    grams: Tensor
    directions: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """``k``."""
        return self.grams.shape[-1]

    def batch(self, b: int) -> Tensor:
        """`b` of the grams, repeated if there are fewer."""
        return self.grams[torch.arange(b, device=self.grams.device) % len(self.grams)].contiguous()


Make = Callable[[int, torch.device, int, int], Problem]


class Average:
    """The averages of a stream of stacks ``(b, k, n)``: of ``G G^T`` and of ``G``, from zero, in float32."""

    def __init__(self) -> None:
        self._gram = self._momentum = torch.zeros(())

    def add(self, gradient: Tensor) -> None:
        """One more step."""
        self._gram = BETA2 * self._gram + (1 - BETA2) * (gradient @ gradient.mT)
        self._momentum = BETA1 * self._momentum + (1 - BETA1) * gradient

    def problem(self) -> Problem:
        """What an optimizer would have to solve now."""
        return Problem(self._gram, tuple(self._momentum))


def signal(k: int, device: torch.device, seed: int, real_steps: int) -> Problem:
    """Twenty gradients of rank 8 whose rows drift, in noise whose singular values fall as ``i^(-3/2)``."""
    dice = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=dice, device=device)

    basis = torch.linalg.qr(draw(COUNT, k, k))[0] * torch.arange(1, k + 1, device=device) ** -1.5
    rank = min(8, k)
    start, end = draw(COUNT, k, rank), draw(COUNT, k, rank)

    average = Average()
    for step in range(DRIFT_STEPS):
        part = step / DRIFT_STEPS
        rows = (1 - part) * start + part * end
        average.add(rows @ draw(COUNT, rank, k) / k + basis @ draw(COUNT, k, k))
    return average.problem()


def first(k: int, device: torch.device, seed: int, real_steps: int) -> Problem:
    """The first step of a gradient whose rank is an eighth of its size."""
    return low_rank(k, max(1, k // 8), device, seed)


def low_rank(k: int, rank: int, device: torch.device, seed: int) -> Problem:
    """The averages after one random gradient of a rank."""
    dice = torch.Generator(device).manual_seed(seed)
    left, right = (torch.randn(COUNT, k, rank, generator=dice, device=device) for _ in range(2))
    average = Average()
    average.add(left @ right.mT)
    return average.problem()


def identity(k: int, device: torch.device, seed: int, real_steps: int) -> Problem:
    """The identity: all eigenvalues are one."""
    dice = torch.Generator(device).manual_seed(seed)
    grams = torch.eye(k, device=device).repeat(COUNT, 1, 1)
    return Problem(grams, tuple(torch.randn(COUNT, k, k, generator=dice, device=device)))


def real(k: int, device: torch.device, seed: int, real_steps: int) -> Problem:
    """Gradients of a GPT-2 of two layers and width `k` that learns Python's help texts with AdamW.

    Attention, projections and MLP are read as `asgo.route` reads them, from the side that `asgo.ASGO` preconditions.
    """
    data = open_data(DataConfig(corpus=CorpusConfig("pydoc"), block_size=128, batch_size=4), seed)
    model = ModelConfig(preset="demo", layers=2, width=k, heads=max(1, k // 64))
    net = build_model(model, data.vocab_size, 128, seed).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    views = [(p, view) for group in route(net) for (_, p), view in with_views(group) if view is not None]
    averages: dict[int, Average] = {}
    for step in range(real_steps):
        inputs, targets = (part.to(device) for part in data.batches.batch(step))
        optimizer.zero_grad()
        token_loss(net, inputs, targets).backward()
        for n, stack in _by_length(views, k).items():
            averages.setdefault(n, Average()).add(stack)
        optimizer.step()
    problems = [average.problem() for average in averages.values()]
    directions = tuple(matrix for problem in problems for matrix in problem.directions)
    return Problem(torch.cat([problem.grams for problem in problems]), directions)


def _by_length(views: Sequence[tuple[nn.Parameter, View]], k: int) -> dict[int, Tensor]:
    """The gradients' matrices whose shorter side is `k`, stacked by the other; where ASGO takes columns, transposed."""
    found: dict[int, list[Tensor]] = {}
    for param, view in views:
        if param.grad is not None:
            for stack in view.matrices(param.grad):
                if k == min(stack.shape[1:]):
                    turned = stack if stack.shape[1] < stack.shape[2] else stack.mT
                    found.setdefault(turned.shape[2], []).append(turned)
    return {n: torch.cat(stacks) for n, stacks in found.items()}


KINDS: dict[str, Make] = {"signal": signal, "first": first, "identity": identity, "real": real}
"""What ``--matrices`` can name."""


SCALED = "gradient x "
"""How the names of cases begin whose gradients are the same but for a factor."""


@dataclass(frozen=True)
class Case:
    """A problem that breaks solvers. A matrix that is not finite should be reported, and touch no other.

    Args:
        name: what it is.
        problem: its matrices.
    """

    name: str
    problem: Problem


def cases(device: torch.device, seed: int) -> list[Case]:
    """The cases of a robustness table, each of a few matrices of 128 or 384 rows."""

    def scaled(factor: float) -> Problem:
        base = signal(128, device, seed, 0)
        return Problem(base.grams * factor * factor, tuple(matrix * factor for matrix in base.directions))

    def with_one(value: float) -> Problem:
        base = signal(128, device, seed, 0)
        base.grams[1] = value
        return base

    return [
        Case("rank 8 of 128, step 1", low_rank(128, 8, device, seed)),
        Case("rank 1 of 128, step 1", low_rank(128, 1, device, seed)),
        Case("rank 64 of 384, step 1", low_rank(384, 64, device, seed)),
        Case("real 384, step 1", real(384, device, seed, 1)),
        Case("identity", identity(128, device, seed, 0)),
        *(Case(f"{SCALED}{factor:g}", scaled(factor)) for factor in (1.0, 1e-12, 1e-18, 1e15)),
        Case("one zero matrix of 4", with_one(0.0)),
        Case("one infinite matrix of 4", with_one(float("inf"))),
        Case("one NaN matrix of 4", with_one(float("nan"))),
    ]
