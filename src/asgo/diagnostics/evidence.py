"""What a stream of gradients at fixed weights says about how a parameter should be preconditioned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from asgo._types import Stack
from asgo.diagnostics.noise import Moments
from asgo.diagnostics.spectra import eigenvalues, singular_values, stable_rank
from asgo.linalg.matmul import exact_matmul
from asgo.presets.asgo import ASGO
from asgo.state_keys import part_key
from asgo.structures import OneSided
from asgo.views import View

Side = Literal["auto", "left", "right"]
Choice = tuple[str, Side]
"""A view by its word, ``whole`` or ``heads``, and a side."""

SIDES: tuple[Side, ...] = ("auto", "left", "right")
LONGEST = 2048
"""A longer side is not measured: its eigenvalues would take longer than all the gradients."""
LAGS = {2: 1, 5: 4, 10: 9}
"""The oldest a root gets, in steps, by the interval between refreshes."""
STATISTICS: dict[str, tuple[float, float]] = {"momentum": (0.95, 0.2), "gradient": (0.9, 0.8)}
"""The two statistics of ASGO with the betas that each is used with: the library's own and the paper's."""
EPS = 1e-6
RARELY = 1000
"""Steps between refreshes where none is wanted; one that comes all the same costs time only."""


@dataclass(frozen=True)
class Evidence:
    """What was measured of a parameter.

    Args:
        bound: for every view and side the factor ``tr (sum G G^T)^(1/2)`` of ASGO's regret bound, over the least.
        cost: of refreshing the roots, up to a common factor.
        noise_share: of one batch's gradient.
        stable_rank: of the mean gradient, the mean over its matrices.
        kept: by statistic and interval, the cosine of the directions by the oldest root and by a fresh one.
    """

    bound: Mapping[Choice, float] = field(default_factory=dict)
    cost: Mapping[Choice, float] = field(default_factory=dict)
    noise_share: float | None = None
    stable_rank: float | None = None
    kept: Mapping[tuple[str, int], float] = field(default_factory=dict)


class Trial:
    """ASGO with a learning rate of 0 on a parameter of its own: the real step, on gradients that move nothing."""

    def __init__(self, like: Tensor, view: View, statistic: str) -> None:
        self.param, self.view, self.beta1 = nn.Parameter(torch.zeros_like(like)), view, STATISTICS[statistic][0]
        group = {"params": [("trial", self.param)], "view": view, "statistic": statistic}
        self.optimizer = ASGO([group], 0.0, STATISTICS[statistic], EPS, cross_normalize=False)
        self.old: list[Tensor] = []

    def take(self, gradient: Tensor, refresh: bool) -> None:
        """One step; without `compute_root`, roots may stay as they are."""
        self.optimizer.param_groups[0]["precondition_frequency"] = 1 if refresh else RARELY
        self.param.grad = gradient
        self.optimizer.step()

    def kept(self, key: str) -> list[Tensor]:
        """A part of the state, for each part of the view."""
        return [self.optimizer.state[self.param][part_key(key, part)] for part in range(self.view.parts)]

    def directions(self, roots: Sequence[Tensor]) -> Tensor:
        """What these roots would make of the step's momentum, as one vector."""
        gradients = self.view.matrices(self.param.grad)  # pyright: ignore[reportArgumentType]
        stacks = [m.lerp(g, 1 - self.beta1) for m, g in zip(self.kept("exp_avg"), gradients, strict=True)]
        found = [OneSided().precondition({"root": Z}, stack) for Z, stack in zip(roots, stacks, strict=True)]
        return torch.cat([direction.flatten().double() for direction in found])


class Collector:
    """Takes the gradients of one parameter, a batch at a time, and keeps what `Evidence` is made of.

    Args:
        views: by word; the first is the default, through which noise and staleness are measured.
        batches: how many gradients will come.
    """

    def __init__(self, views: Mapping[str, View], batches: int) -> None:
        self.views = dict(views)
        self.default = next(iter(self.views.values()))
        self.seen = 0
        self.anchor = max(0, batches - 1 - max(LAGS.values()))
        self.grams: dict[tuple[str, int, bool], Tensor] = {}
        self.moments = [Moments() for _ in range(self.default.parts)]
        self.shape: tuple[int, ...] = ()
        self.trials: dict[str, Trial] = {}
        self.cosines: dict[tuple[str, int], float] = {}

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """One more gradient, of the parameter's shape."""
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        if not self.seen:
            self.shape = tuple(gradient.shape)
            if all(min(stack[1:]) <= LONGEST for stack in self.default.shapes(self.shape)):
                self.trials = {statistic: Trial(gradient, self.default, statistic) for statistic in STATISTICS}
        with exact_matmul(gradient.device):
            for word, view in self.views.items():
                for part, stack in enumerate(view.matrices(gradient)):
                    self._fold(word, part, stack)
            for moments, stack in zip(self.moments, self.default.matrices(gradient), strict=True):
                moments.add(stack)
        self._follow(gradient)
        self.seen += 1

    def _fold(self, word: str, part: int, stack: Stack) -> None:
        for left, side in ((True, stack), (False, stack.mT)):
            if 0 < side.shape[1] <= LONGEST:
                product = side.double() @ side.mT.double()
                key = word, part, left
                self.grams[key] = self.grams[key].add_(product) if key in self.grams else product

    def _follow(self, gradient: Tensor) -> None:
        """Steps of ASGO that move nothing: are the directions by an old root those by a fresh one?"""
        lag = self.seen - self.anchor
        for statistic, trial in self.trials.items():
            trial.take(gradient, lag == 0 or lag in LAGS.values())
            if lag == 0:
                trial.old = [root.clone() for root in trial.kept("root")]
            for interval in (interval for interval, oldest in LAGS.items() if oldest == lag):
                both = trial.directions(trial.old), trial.directions(trial.kept("root"))
                self.cosines[statistic, interval] = float(torch.nn.functional.cosine_similarity(*both, dim=0))

    def evidence(self) -> Evidence:
        """What all gradients together say."""
        bound, cost = self._bounds()
        least = min(bound.values(), default=1.0)
        return Evidence(
            bound={choice: value / least if least else 1.0 for choice, value in bound.items()},
            cost=cost,
            noise_share=self._noise_share(),
            stable_rank=self._stable_rank(),
            kept=dict(self.cosines),
        )

    def _bounds(self) -> tuple[dict[Choice, float], dict[Choice, float]]:
        sums = {key: float(eigenvalues(gram).clamp(min=0).sqrt().sum()) for key, gram in self.grams.items()}
        bound: dict[Choice, float] = {}
        cost: dict[Choice, float] = {}
        for word, view in self.views.items():
            shapes = view.shapes(self.shape)
            for side in SIDES:
                keys = [(word, part, OneSided(side).left(m, n)) for part, (_, m, n) in enumerate(shapes)]
                if all(key in sums for key in keys):
                    bound[word, side] = sum(sums[key] for key in keys)
                    cost[word, side] = sum(b * OneSided(side).root_flops(m, n) for b, m, n in shapes)
        return bound, cost

    def _noise_share(self) -> float | None:
        parts = [moments.split() for moments in self.moments]
        signal, noise = (float(sum(part[i].sum() for part in parts)) for i in (0, 1))
        noise *= self.seen  # of one batch, not of the mean of all
        return noise / (signal + noise) if signal + noise > 0 else None

    def _stable_rank(self) -> float | None:
        means = [moments.mean for moments in self.moments if moments.mean is not None and moments.mean.numel()]
        ranks = torch.cat([stable_rank(singular_values(mean)) for mean in means])
        ranks = ranks[ranks.isfinite()]
        return float(ranks.mean()) if len(ranks) else None
