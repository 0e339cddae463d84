"""Dense blocks along the columns of a matrix: the preconditioner of AdaBlock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from asgo._types import Stack, State
from asgo.linalg.packed_symmetric import diagonal
from asgo.linalg.spectral import apply_to_eigenvalues
from asgo.structures.base import Algebra, active_mask, ema_denominator, masked_ema_, shorten, update_ema_weight


@dataclass(frozen=True)
class BlockDiagonal(Algebra):
    """The full statistic of every run of `size` entries of a column.

    ``V_b <- b2 V_b + (1 - b2) g_b g_b^T`` of each run g_b, or the sum; direction ``c (V_b^(1/2) + eps I)^(-1) M_b``
    with Adam's corrections ``c = sqrt(1 - b2^t) / (1 - b1^t)``. The last run of a column is filled up with zeros.

    The algebra consists of the block-diagonal matrices; its projection keeps the blocks.

    State: ``gram`` and ``root (b, runs, size, size)``; ``weight``, ``momentum_weight``, ``steps`` and ``root_age``, the
    steps since the root, ``(b, 1, 1)``.

    Args:
        size: entries of a run.
        eps: outside the root.
        momentum: the decay b1 of the momentum, for its correction.
        stale: what takes the place of a root that is not of this step: the last one, or the ``"diagonal"`` of V.
        clip: bounds on the eigenvalues of ``c (V^(1/2) + eps I)^(-1)``, ``clip (1 - 1/(gamma t + 1))`` and
            ``clip (1 + 1/(gamma t))``; None for none.
        gamma: how fast they close.
        limit: the longest that a run of the result may be; None for any. For roots that are older than the statistic,
            see `asgo.structures.base.reach`.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("gram", "root", "weight", "momentum_weight", "steps", "root_age")

    size: int
    eps: float
    momentum: float
    stale: Literal["root", "diagonal"] = "root"
    clip: float | None = None
    gamma: float = 1e-3
    limit: float | None = None

    def runs(self, m: int, n: int) -> tuple[int, int]:
        """How many runs there are, and how long they are: no longer than a column."""
        size = min(self.size, m)
        return n * math.ceil(m / max(size, 1)), size

    @property
    def root_keys(self) -> tuple[str, ...]:
        """What the memory alone determines."""
        return ("root", "root_age")

    @property
    def symmetric(self) -> tuple[str, ...]:
        """Statistic and root."""
        return ("gram", "root")

    @property
    def linear_statistic(self) -> bool:
        """True: the statistic is an average or a sum of ``g g^T``."""
        return True

    def init(self, like: Stack) -> State:
        """Zero statistics and identities as roots."""
        b, m, n = like.shape
        runs, size = self.runs(m, n)
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        ones = {key: like.new_zeros(b, 1, 1) for key in ("weight", "momentum_weight", "steps", "root_age")}
        return {"gram": like.new_zeros(b, runs, size, size), "root": eye.repeat(b, runs, 1, 1), **ones}

    def cut(self, stack: Stack) -> Tensor:
        """The runs of a stack, ``(b, runs, size)``."""
        b, m, n = stack.shape
        runs, size = self.runs(m, n)
        return pad(stack.mT, (0, runs * size // max(n, 1) - m)).reshape(b, runs, size)

    def compute_statistic(self, grad: Stack) -> Tensor:
        """``g g^T`` of every run."""
        g = self.cut(grad)
        return g[..., None] * g[..., None, :]

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Average the products in, or add them up with ``beta2`` of 1."""
        active = active_mask(measurement)
        masked_ema_(state["gram"], measurement, beta2, active[..., None])
        update_ema_weight(state["weight"], beta2, active)
        update_ema_weight(state["momentum_weight"], self.momentum, active)
        state["steps"] += active
        state["root_age"] += active

    def compute_root(self, state: State) -> Tensor:
        """New roots, clipped if asked, where all of a matrix can be computed."""
        gram, (low, high) = state["gram"], self.bounds(state)
        runs = gram.shape[1]
        low, high = (bound[:, 0].double().repeat_interleave(runs, 0) for bound in (low, high))
        fresh, ok = apply_to_eigenvalues(
            gram.flatten(0, 1), lambda s: torch.clamp(1 / (s.sqrt() + self.eps), low, high)
        )
        ok = ok.reshape(len(gram), runs).all(1)
        state["root"].copy_(torch.where(ok[:, None, None, None], fresh.reshape(gram.shape), state["root"]))
        state["root_age"] *= ~ok[:, None, None]
        return ok

    def bounds(self, state: State) -> tuple[Tensor, Tensor]:
        """``(b, 1, 1)``: the bounds on the eigenvalues of ``(V^(1/2) + eps I)^(-1)``, i.e. without c."""
        steps = state["steps"].clamp_min(1) * self.gamma
        if self.clip is None:
            return torch.zeros_like(steps), torch.full_like(steps, math.inf)
        bound = self.clip / self.correction(state)
        return bound * (1 - 1 / (steps + 1)), bound * (1 + 1 / steps)

    def correction(self, state: State) -> Tensor:
        """``c``, and 1 before the first step."""
        return ema_denominator(state["weight"]).sqrt() / ema_denominator(state["momentum_weight"])

    def precondition(self, state: State, direction: Stack) -> Stack:
        """The root of every run times the direction, or the diagonal where the root is stale and that is asked."""
        b, m, n = direction.shape
        x = self.cut(direction)
        result = (state["root"] @ x[..., None])[..., 0]
        if self.stale == "diagonal":
            size = diagonal(state["gram"]).sqrt() + self.eps
            result = torch.where(state["root_age"] == 0, result, x * torch.clamp(1 / size, *self.bounds(state)))
        result = result * self.correction(state)
        if self.limit is not None:
            result = shorten(result, torch.linalg.vector_norm(result, dim=2, keepdim=True), self.limit)
        return result.reshape(b, n, -1)[:, :, :m].mT

    def root_flops(self, m: int, n: int) -> float:
        """``size^3`` for every run."""
        runs, size = self.runs(m, n)
        return float(runs * size**3)

    def step_flops(self, m: int, n: int) -> float:
        """``2 m n size``: the products of every run and one with its root."""
        runs, size = self.runs(m, n)
        return 2.0 * runs * size**2

    def project(self, A: Tensor, m: int, n: int) -> Tensor:
        """A with zeros between entries of different runs."""
        _, size = self.runs(m, n)
        rows, columns = torch.arange(m * n) // n, torch.arange(m * n) % n
        run = columns * m + rows // size
        return torch.where(run[:, None] == run, A, 0)
