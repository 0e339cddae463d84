"""What a stream of gradients at fixed weights says about how a parameter should be preconditioned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.diagnostics.noise import Moments
from asgo.diagnostics.spectra import eigenvalues, singular_values, stable_rank
from asgo.linalg.inverse_root import ROOTS
from asgo.linalg.matmul import exact_matmul
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
        self.momenta: dict[str, Tensor] = {}
        self.states: dict[tuple[str, int], State] = {}
        self.stale: dict[tuple[str, int], State] = {}
        self.cosines: dict[tuple[str, int], float] = {}

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """One more gradient, of the parameter's shape."""
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        with exact_matmul(gradient.device):
            for word, view in self.views.items():
                for part, stack in enumerate(view.matrices(gradient)):
                    self._fold(word, part, stack)
            for moments, stack in zip(self.moments, self.default.matrices(gradient), strict=True):
                moments.add(stack)
            for statistic in STATISTICS:
                self._simulate(statistic, gradient)
        self.seen += 1

    def _fold(self, word: str, part: int, stack: Stack) -> None:
        for left, side in ((True, stack), (False, stack.mT)):
            if 0 < side.shape[1] <= LONGEST:
                product = side.double() @ side.mT.double()
                key = word, part, left
                self.grams[key] = self.grams[key].add_(product) if key in self.grams else product

    def _simulate(self, statistic: str, gradient: Tensor) -> None:
        """A step of ASGO that moves nothing: are the directions by an old root those by a fresh one?"""
        beta1, beta2 = STATISTICS[statistic]
        momentum = self.momenta.setdefault(statistic, torch.zeros_like(gradient))
        momentum.lerp_(gradient, 1 - beta1)
        direction = momentum.lerp(gradient, 1 - beta1)
        lag, pairs = self.seen - self.anchor, []
        for part, stack in enumerate(self.default.matrices(direction)):
            if min(stack.shape[1:]) > LONGEST or stack.numel() == 0:
                continue
            structure, key = OneSided(), (statistic, part)
            state = self.states.setdefault(key, structure.init(stack))
            own = stack if statistic == "momentum" else self.default.matrices(gradient)[part]
            structure.fold(state, structure.measure(own), beta2)
            if lag == 0 or lag in LAGS.values():
                structure.refresh(state, ROOTS["auto"], EPS)
            if lag == 0:
                self.stale[key] = {name: tensor.clone() for name, tensor in state.items()}
            if lag in LAGS.values():
                pairs.append((structure.precondition(self.stale[key], stack), structure.precondition(state, stack)))
        if pairs:
            old, fresh = (torch.cat([pair[i].flatten().double() for pair in pairs]) for i in (0, 1))
            interval = next(interval for interval, oldest in LAGS.items() if oldest == lag)
            self.cosines[statistic, interval] = float(torch.nn.functional.cosine_similarity(old, fresh, dim=0))

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
            shapes = view.shapes(self._shape)
            for side in SIDES:
                keys = [(word, part, OneSided(side).left(m, n)) for part, (_, m, n) in enumerate(shapes)]
                if all(key in sums for key in keys):
                    bound[word, side] = sum(sums[key] for key in keys)
                    cost[word, side] = sum(b * OneSided(side).cost(m, n) for b, m, n in shapes)
        return bound, cost

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(next(iter(self.momenta.values())).shape)

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
