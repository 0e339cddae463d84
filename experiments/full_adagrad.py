"""Full-matrix AdaGrad as it is written: the reference that low-rank methods are measured by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class FullAdaGrad(Optimizer):
    """``H <- H + g g^T, H_0 = eps I; theta <- theta - lr H^(-1/2) g``, `g` the gradient of one model, flattened.

    By an eigendecomposition in every step: ``O(d^3)`` time and ``d^2`` memory, so only for small `d`.
    "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", Duchi, Hazan and Singer, 2011.

    Args:
        params: parameters whose first axis counts independent models: ``(models, ...)``.
        lr: learning rate.
        eps: what the statistic starts from; AdaGram's default.
    """

    def __init__(self, params: ParamsT, lr: float = 0.1, eps: float = 1e-2) -> None:
        if not eps > 0:
            raise ValueError(f"FullAdaGrad: eps is {eps}, it must be above 0: the first statistic has rank 1.")
        if not lr >= 0:
            raise ValueError(f"FullAdaGrad: lr is {lr}, it must be 0 or more.")
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; `closure`, if any, returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    direction = self._precondition(self.state[param], param.grad.flatten(1), group["eps"])
                    param.add_(direction.view_as(param), alpha=-group["lr"])
        return loss

    def _precondition(self, state: dict[str, Tensor], grad: Tensor, eps: float) -> Tensor:
        if "sum" not in state:
            eye = torch.eye(grad.shape[1], dtype=grad.dtype, device=grad.device)
            state["sum"] = eps * eye.repeat(grad.shape[0], 1, 1)
        state["sum"].baddbmm_(grad[:, :, None], grad[:, None, :])
        values, vectors = torch.linalg.eigh(state["sum"])
        # Rounding can leave the smallest eigenvalues a little below eps.
        rotated = vectors.mT @ grad[:, :, None] * values.clamp_min(eps).rsqrt()[:, :, None]
        return (vectors @ rotated)[:, :, 0]
