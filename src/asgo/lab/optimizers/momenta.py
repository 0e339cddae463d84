"""ASGO with several momenta of different length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo._types import Stack, State
from asgo.linalg.masked import where
from asgo.linalg.matmul import exact_matmul
from asgo.optimizer.hyperparameters import SHARED, STEP_DEFAULTS, Constraint, from_arguments, is_number, one_of, whole
from asgo.optimizer.step import StructuredOptimizer
from asgo.structures import OneCall, OneSided, SquareRoot, Structure
from asgo.structures.base import active_mask, ema_denominator, update_ema_weight
from asgo.structures.one_sided import Cross


@dataclass(frozen=True)
class Momenta(OneCall):
    """Another structure, whose direction and statistic are a mean of several momenta.

    ``M_k <- b_k M_k + (1 - b_k) G``, ``D = mean_k (b_k M_k + (1 - b_k) G) / w_k`` with ``w_k`` the sum of the weights
    that gradients have in it. All methods but `update` are the inner structure's.

    State: the inner structure's, ``momenta (b, K, m, n)`` and ``weights (b, K, 1, 1)``.

    Args:
        inner: what preconditions D.
        decays: ``b_k``.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("momenta", "weights")

    inner: Structure
    decays: tuple[float, ...]

    def init(self, like: Stack) -> State:
        """Zero momenta and weights, beside the state of the inner structure."""
        b, m, n = like.shape
        K = len(self.decays)
        own = {"momenta": like.new_zeros(b, K, m, n), "weights": like.new_zeros(b, K, 1, 1)}
        return self.inner.init(like) | own

    def update(
        self, state: State, direction: Stack, seen: Stack, beta2: float, out: Stack | None = None
    ) -> tuple[Stack, Tensor]:
        """The mean of the momenta of `seen`, the gradient, preconditioned; `direction` is not looked at."""
        D = self._mean(state, seen)
        if isinstance(self.inner, OneCall):
            return self.inner.update(state, D, D, beta2, out=D)
        with exact_matmul(D.device):
            self.inner.update_statistic(state, self.inner.compute_statistic(D), beta2)
            ok = self.inner.compute_root(state)
            return self.inner.precondition(state, D), ok

    def _mean(self, state: State, grad: Stack) -> Stack:
        moved, total = active_mask(grad), torch.zeros_like(grad)
        for k, decay in enumerate(self.decays):
            M, w = state["momenta"][:, k], state["weights"][:, k]
            M.lerp_(grad, (1 - decay) * moved)
            update_ema_weight(w, decay, moved)
            total += M.lerp(grad, 1 - decay) / ema_denominator(w.lerp(torch.ones_like(w), 1 - decay))
        return where(moved > 0, total / len(self.decays), 0.0)

    def update_from(self, state: State, direction: Stack, R: Tensor, beta2: float, whole: Any = None) -> Any:
        """Never called: shards of a matrix are gathered, as no axis is `is_shard_additive`."""
        raise NotImplementedError("several momenta are of whole matrices")

    def compute_statistic(self, grad: Stack) -> Tensor:
        """As the inner structure."""
        return self.inner.compute_statistic(grad)

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """As the inner structure."""
        self.inner.update_statistic(state, measurement, beta2)

    def compute_root(self, state: State) -> Tensor:
        """As the inner structure."""
        return self.inner.compute_root(state)

    def precondition(self, state: State, direction: Stack) -> Stack:
        """As the inner structure."""
        return self.inner.precondition(state, direction)

    def root_flops(self, m: int, n: int) -> float:
        """As the inner structure."""
        return self.inner.root_flops(m, n)

    def step_flops(self, m: int, n: int) -> float:
        """As the inner structure."""
        return self.inner.step_flops(m, n)


class MomentaASGO(StructuredOptimizer):
    """`ASGO` with the mean of several momenta, see `Momenta`, in the place of one.

    Their ages ``1 / (1 - b_k)`` are spaced evenly in logarithms, from the age of ``betas[0]`` divided by `spread`
    to `spread` times it. Vectors, embeddings and output heads are AdamW's.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, as of `ASGO`.
        betas: decay of the momentum in the middle, and of the statistic.
        eps: damping inside the root.
        weight_decay: decoupled, multiplied by ``lr``.
        momenta: how many.
        spread: from the age in the middle to the largest.
        cross_normalize: as of `ASGO`.
        root: "auto", or "square_root", as of `ASGO`.
    """

    step_defaults: ClassVar[Mapping[str, Any]] = {**STEP_DEFAULTS, "adjust_lr": "rms"}
    constraints: ClassVar[Mapping[str, Constraint]] = {
        **SHARED,
        "momenta": whole(low=2),
        "spread": Constraint(lambda value: is_number(value, 1) and value > 1, "a finite number > 1"),
        "root": one_of("auto", "square_root"),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.95, 0.2),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        momenta: int = 3,
        spread: float = 3.0,
        cross_normalize: Cross = True,
        root: Literal["auto", "square_root"] = "auto",
    ) -> None:
        super().__init__(params, {**from_arguments(locals()), "maximize": False})

    def structure(self, group: dict[str, Any]) -> Structure:
        """ASGO's, behind the momenta."""
        cross, root = group["cross_normalize"], group["root"]
        if root == "square_root":
            inner = SquareRoot(cross_normalize=cross)
        else:
            inner = OneSided(cross_normalize=cross, root=root, eps=group["eps"])
        return Momenta(inner, decays(group["betas"][0], group["momenta"], group["spread"]))


def decays(middle: float, number: int, spread: float) -> tuple[float, ...]:
    """Decay rates whose ages are spaced evenly in logarithms around the age of `middle`; none below 0."""
    ages = (spread ** (2 * k / (number - 1) - 1) / (1 - middle) for k in range(number))
    return tuple(max(0.0, 1 - 1 / age) for age in ages)
