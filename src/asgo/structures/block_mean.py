"""One number per block: the mean of squares over a matrix, its rows, its columns, or single entries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.structures.base import Algebra, Axis, active_mask, all_ok, ema_denominator, masked_ema_, update_ema_weight

Blocks = Literal["matrix", "row", "column", "entry", "auto"]
AXES: dict[str, tuple[int, ...]] = {"matrix": (1, 2), "row": (2,), "column": (1,), "entry": ()}
"""The axes of a stack over which squares are averaged."""


@dataclass(frozen=True)
class BlockMean(Algebra):
    """The mean square of every block, and the direction divided by its root.

    ``v_b <- b2 v_b + (1 - b2) mean(G_b^2)``, or the sum of the means; direction ``M_b / (sqrt(v_b) + eps)``. With
    blocks of one entry it is the diagonal preconditioner of AdaGrad and Adam, with one block per column DASGO's, with
    other blocks that of BAG, BAGM and Adam-mini.

    The algebra consists of the diagonal matrices that are constant on each block; its projection takes the mean of the
    diagonal over each block.

    State: ``exp_avg_sq (b, 1, 1)``, ``(b, m, 1)``, ``(b, 1, n)`` or ``(b, m, n)``; with `corrected`, ``weight`` and,
    with `momentum`, ``momentum_weight``, both ``(b, 1, 1)``: the averages of a constant 1, by which averages that
    started from zero are divided.

    Args:
        blocks: what a block is: the whole matrix, a row, a column or an entry; ``"auto"`` takes rows or columns,
            whichever are fewer, and the columns of a square matrix.
        eps: added to the root of v, or to v itself with `inside`.
        total: take the sum of squares over a block, not the mean.
        inside: put eps under the root.
        corrected: divide the average by its weight, as Adam does; a sum has none.
        momentum: the decay of the momentum, to correct that in the same way; None leaves it as it is.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg_sq", "weight", "momentum_weight")

    blocks: Blocks
    eps: float
    total: bool = False
    inside: bool = False
    corrected: bool = False
    momentum: float | None = None

    def block(self, m: int, n: int) -> Blocks:
        """What a block of an ``m x n`` matrix is."""
        return self.blocks if self.blocks != "auto" else ("row" if m < n else "column")

    def is_shard_additive(self, axis: Axis, m: int, n: int) -> bool:
        """Sums over what is cut add up; means do not, and blocks along the cut have numbers of their own."""
        return self.total and self.block(m, n) in ("matrix", "column" if axis == "rows" else "row")

    def with_side_of(self, m: int, n: int) -> BlockMean:
        """With the blocks that ``"auto"`` would take."""
        return replace(self, blocks=self.block(m, n))

    def init(self, like: Stack) -> State:
        """Zero mean squares and weights."""
        b, m, n = like.shape
        shape = {"matrix": (b, 1, 1), "row": (b, m, 1), "column": (b, 1, n), "entry": (b, m, n)}[self.block(m, n)]
        state = {"exp_avg_sq": like.new_zeros(shape)}
        if self.corrected:
            state["weight"] = like.new_zeros(b, 1, 1)
        if self.momentum is not None:
            state["momentum_weight"] = like.new_zeros(b, 1, 1)
        return state

    def compute_statistic(self, grad: Stack) -> Tensor:
        """The mean or sum of squares over each block."""
        square, axes = grad.square(), AXES[self.block(*grad.shape[1:])]
        if not axes:
            return square
        return square.sum(axes, keepdim=True) if self.total else square.mean(axes, keepdim=True)

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Average the squares in, or add them up with ``beta2`` of 1."""
        active = active_mask(measurement)
        masked_ema_(state["exp_avg_sq"], measurement, beta2, active)
        if self.corrected:
            update_ema_weight(state["weight"], beta2, active)
        if self.momentum is not None:
            update_ema_weight(state["momentum_weight"], self.momentum, active)

    def compute_root(self, state: State) -> Tensor:
        """No-op: `precondition` takes the square roots of single numbers."""
        return all_ok(state)

    def precondition(self, state: State, direction: Stack) -> Stack:
        """The direction divided by the root of its block's mean square."""
        square = state["exp_avg_sq"] / ema_denominator(state["weight"]) if self.corrected else state["exp_avg_sq"]
        size = (square + self.eps).sqrt() if self.inside else square.sqrt().add_(self.eps)
        return direction / (size if self.momentum is None else size * ema_denominator(state["momentum_weight"]))

    def root_flops(self, m: int, n: int) -> float:
        """0: there is no matrix root."""
        return 0.0

    def step_flops(self, m: int, n: int) -> float:
        """``2 m n``: a square and a quotient per entry."""
        return 2.0 * m * n

    def project(self, A: Tensor, m: int, n: int) -> Tensor:
        """The diagonal, averaged over each block."""
        diagonal = A.diagonal().reshape(1, m, n)
        axes = AXES[self.block(m, n)]
        mean = diagonal.mean(axes, keepdim=True) if axes else diagonal
        return torch.diag(mean.expand(1, m, n).reshape(-1))
