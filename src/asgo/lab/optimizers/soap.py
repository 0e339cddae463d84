"""SOAP and Shampoo with running averages: the peers with statistics of both sides, on the library's own step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo._types import Stack, State
from asgo.linalg.masked import where
from asgo.linalg.matmul import gram
from asgo.linalg.spectral import decompose
from asgo.optimizer.hyperparameters import (
    FLAG,
    SHARED,
    STEP_DEFAULTS,
    Constraint,
    from_arguments,
    is_number,
    one_of,
    or_none,
)
from asgo.optimizer.step import StructuredOptimizer
from asgo.structures import Structure
from asgo.structures.base import active_mask, all_ok, masked_ema_
from asgo.structures.one_sided import Cross, cross_square, init_cross, normalized

Sides: TypeAlias = Literal["both", "short"]
"""Of which sides there are statistics: both, or the shorter one alone (the right one of a square matrix)."""


@dataclass(frozen=True)
class _Sided(Structure):
    """Running averages of ``G G^T`` and ``G^T G``.

    Args:
        sides: "both" or "short".
    """

    sides: Sides = "both"

    def of(self, m: int, n: int) -> tuple[tuple[str, int, int], ...]:
        """The sides that have statistics: name, length, axis of the stack."""
        both = ("left", m, 1), ("right", n, 2)
        return both if self.sides == "both" else both[:1] if m < n else both[1:]

    def statistics(self, like: Stack, derived: str) -> State:
        """Zero statistics, and identities called `root_keys` beside them; empty for a side that has none."""
        state, sizes = {}, {side: k for side, k, _ in self.of(*like.shape[1:])}
        for side in ("left", "right"):
            k = sizes.get(side, 0)
            state[side] = like.new_zeros(len(like), k, k)
            state[f"{side}_{derived}"] = torch.eye(k, dtype=like.dtype, device=like.device).repeat(len(like), 1, 1)
        return state

    def compute_statistic(self, grad: Stack) -> Tensor:
        """The gradient itself: its two grams have no common shape."""
        return grad

    def root_flops(self, m: int, n: int) -> float:
        """The cubes of the sides."""
        return float(sum(k**3 for _, k, _ in self.of(m, n)))

    def step_flops(self, m: int, n: int) -> float:
        """A gram and a product with a root for each side."""
        return 2.0 * m * n * sum(k for _, k, _ in self.of(m, n))


@dataclass(frozen=True)
class EigenAdam(_Sided):
    """Adam in the eigenbasis of Shampoo's statistics.

    With ``P = Q_L^T G Q_R``: ``v <- b2 v + (1 - b2) P^2``, direction ``Q_L (Q_L^T M Q_R / (sqrt(v) + eps)) Q_R^T``;
    then ``L <- b2 L + (1 - b2) G G^T``, R alike, and, where a refresh is due, a step of orthogonal iteration:
    ``Q_L <- qr(L Q_L)``, its columns in order of ``Q_L^T L Q_L``, and v with them. The first basis is by `eigh`. A side
    without statistic has the identity.

    The bases are renewed where the next step begins, of the statistics that the last one left, which is the order of
    the published program.

    State: ``left``, ``right`` and their bases ``(b, k, k)``, ``square (b, m, n)``, ``due`` and ``renewed`` ``(b,)``.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("square", "due", "renewed", "left", "right", "left_basis", "right_basis")

    eps: float = 1e-8

    def init(self, like: Stack) -> State:
        """Zeros and identities."""
        flags = {"due": like.new_zeros(len(like)), "renewed": like.new_zeros(len(like))}
        return {"square": torch.zeros_like(like)} | flags | self.statistics(like, "basis")

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Renew the bases that are due, then average the gradient into everything."""
        rows = state["due"].nonzero()[:, 0]
        if len(rows):
            self._renew(state, rows)
        moved = active_mask(measurement)
        masked_ema_(state["square"], self._turn(state, measurement).square_(), beta2, moved)
        for side, _, axis in self.of(*measurement.shape[1:]):
            masked_ema_(state[side], gram(measurement if axis == 1 else measurement.mT), beta2, moved)

    def compute_root(self, state: State) -> Tensor:
        """Mark the bases as due; the next `update_statistic` renews them."""
        state["due"].fill_(1.0)
        return all_ok(state)

    def precondition(self, state: State, direction: Stack) -> Stack:
        """Into the basis, divided, and back."""
        return self._turn(state, self._turn(state, direction).div_(state["square"].sqrt().add_(self.eps)), back=True)

    def _turn(self, state: State, stack: Stack, back: bool = False) -> Stack:
        for side, _, axis in self.of(*stack.shape[1:]):
            basis = state[f"{side}_basis"] if back else state[f"{side}_basis"].mT
            stack = basis @ stack if axis == 1 else stack @ basis.mT
        return stack if stack is not state["square"] else stack.clone()

    def _renew(self, state: State, rows: Tensor) -> None:
        first = state["renewed"][rows] == 0
        for side, _, axis in self.of(*state["square"].shape[1:]):
            A, Q, v = state[side][rows], state[f"{side}_basis"][rows], state["square"][rows]
            order = torch.einsum("bki,bkl,bli->bi", Q, A, Q).argsort(1, descending=True)
            moved = order[:, :, None] if axis == 1 else order[:, None, :]
            v = v.gather(axis, moved.expand_as(v))
            Q = torch.linalg.qr(A @ Q.gather(2, order[:, None, :].expand_as(Q))).Q
            if first.any():
                Q = torch.where(first[:, None, None], decompose(A)[1].flip(2), Q)
            fine = Q.isfinite().all(1).all(1)[:, None, None]
            state[f"{side}_basis"][rows] = where(fine, Q, state[f"{side}_basis"][rows])
            state["square"][rows] = v
        state["renewed"][rows] += 1
        state["due"][rows] = 0.0


@dataclass(frozen=True)
class Inverse(_Sided):
    """Roots of running averages: ``L^(-p) M R^(-p)``, of one side ``L^(-p) M``.

    ``L <- b2 L + (1 - b2) S S^T``, R alike, of the gradient or the momentum S; to both roots ``eps`` times the largest
    eigenvalue is added. No factor corrects the averages: the rescaling of the update takes it out.

    State: ``left``, ``right``, their roots ``(b, k, k)``.

    Args:
        power: p of each side; None: 1/4 with two sides and 1/2 with one.
        cut: leave out directions with eigenvalues below ``eps`` times the largest, in place of damping them.
        eps: damping, times the largest eigenvalue.
        cross_normalize: as of `asgo.structures.OneSided`, along the shorter side.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("left", "right", "left_root", "right_root", "cross", "cross_weight")

    power: float | None = None
    cut: bool = False
    eps: float = 1e-6
    cross_normalize: Cross = False

    def init(self, like: Stack) -> State:
        """Zeros and identities."""
        cross = init_cross(like, self._left(like), self.cross_normalize) if self.cross_normalize else {}
        return self.statistics(like, "root") | cross

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Average the grams in."""
        moved = active_mask(measurement)
        for side, _, axis in self.of(*measurement.shape[1:]):
            masked_ema_(state[side], gram(measurement if axis == 1 else measurement.mT), beta2, moved)

    @property
    def root_keys(self) -> tuple[str, ...]:
        """The roots."""
        return ("left_root", "right_root")

    def compute_root(self, state: State) -> Tensor:
        """New roots where they are finite."""
        ok = all_ok(state)
        for side in ("left", "right"):
            if state[side].numel():
                fresh = self._root(state[side], self.power or (0.25 if self.sides == "both" else 0.5))
                fine = fresh.isfinite().all(1).all(1)
                state[f"{side}_root"].copy_(where(fine[:, None, None], fresh, state[f"{side}_root"]))
                ok = ok & fine
        return ok

    def precondition(self, state: State, direction: Stack) -> Stack:
        """The roots times the direction."""
        for side, _, axis in self.of(*direction.shape[1:]):
            direction = state[f"{side}_root"] @ direction if axis == 1 else direction @ state[f"{side}_root"]
        if not self.cross_normalize:
            return direction
        square = cross_square(direction, self._left(direction), self.cross_normalize)
        return normalized(state, direction, square, active_mask(direction) > 0)

    def _left(self, stack: Stack) -> bool:
        return stack.shape[1] < stack.shape[2]

    def _root(self, A: Tensor, power: float) -> Tensor:
        trace = A.diagonal(dim1=1, dim2=2).sum(1)[:, None]
        scale = where(trace > 0, trace, 1.0)
        values, vectors = decompose(A / scale[:, :, None])
        least = self.eps * values.amax(1, keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
        weights = (values.clamp(min=least) if self.cut else values.clamp(min=0) + least).mul_(scale).pow(-power)
        if self.cut:
            weights = torch.where(values > least, weights, 0.0)
        return gram(vectors * weights.sqrt()[:, None])


class SOAP(StructuredOptimizer):
    """Adam in the eigenbasis of Shampoo's statistics, see `EigenAdam`, with the rescaling of `ASGO`.

    "SOAP: Improving and Stabilizing Shampoo using Adam", Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson and
    Kakade 2024; one-sided with ``sides="short"``, which its section on cost proposes. Vectors, embeddings and output
    heads are AdamW's.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, on the scale of `ASGO`'s.
        betas: decay of the momentum, and of the second moment and the statistics.
        weight_decay: decoupled, multiplied by ``lr``.
        precondition_frequency: steps between two bases; 10 as published.
        sides: "both" or "short".
        nesterov: look ahead with the current gradient; the paper does not.
        statistic: "gradient" (the paper) or "momentum".
        adjust_lr: None leaves the size of the step to Adam's quotient, as published.
    """

    step_defaults: ClassVar[Mapping[str, Any]] = {**STEP_DEFAULTS, "root": "eigh64"}
    constraints: ClassVar[Mapping[str, Constraint]] = {**SHARED, "sides": one_of("both", "short")}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.95, 0.95),
        weight_decay: float = 0.1,
        precondition_frequency: int = 10,
        sides: Sides = "both",
        nesterov: bool = False,
        statistic: Literal["gradient", "momentum"] = "gradient",
        adjust_lr: Literal["rms", "slice_rms"] | None = "rms",
    ) -> None:
        super().__init__(params, {**from_arguments(locals()), "maximize": False})

    def structure(self, group: dict[str, Any]) -> Structure:
        """The eigenbases of the group's sides."""
        return EigenAdam(group["sides"])


class AveragedShampoo(StructuredOptimizer):
    """Shampoo with running averages, see `Inverse`, with the rescaling of `ASGO` in the place of grafting.

    "Shampoo: Preconditioned Stochastic Tensor Optimization", Gupta, Koren and Singer 2018, with the averages of
    "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo Optimizer", Shi, Lee, Iwasaki,
    Gallego-Posada, Li, Rangadurai, Mudigere and Rabbat 2023. With ``statistic="momentum"`` it is ASGO with statistics
    of both sides. Vectors, embeddings and output heads are AdamW's.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, on the scale of `ASGO`'s.
        betas: decay of the momentum and of the statistics.
        eps: damping inside the roots, times the largest eigenvalue.
        weight_decay: decoupled, multiplied by ``lr``.
        precondition_frequency: steps between refreshes of the roots.
        sides: "both" or "short".
        power: minus the exponent of every root; None: 1/4 with two sides, 1/2 with one.
        cut: a pseudo-inverse: eigenvalues below ``eps`` times the largest are left out, not damped.
        cross_normalize: as of `ASGO`.
        nesterov: look ahead with the current gradient.
        statistic: "gradient" or "momentum".
        adjust_lr: None leaves the size of the step to the roots.
    """

    step_defaults: ClassVar[Mapping[str, Any]] = {**STEP_DEFAULTS, "root": "eigh64"}
    constraints: ClassVar[Mapping[str, Constraint]] = {
        **SHARED,
        "sides": one_of("both", "short"),
        "power": or_none(Constraint(lambda value: is_number(value, 0) and 0 < value <= 1, "a number in (0, 1]")),
        "cut": FLAG,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        precondition_frequency: int = 10,
        sides: Sides = "both",
        power: float | None = None,
        cut: bool = False,
        cross_normalize: Cross = False,
        nesterov: bool = False,
        statistic: Literal["gradient", "momentum"] = "gradient",
        adjust_lr: Literal["rms", "slice_rms"] | None = "rms",
    ) -> None:
        super().__init__(params, {**from_arguments(locals()), "maximize": False})

    def structure(self, group: dict[str, Any]) -> Structure:
        """The averages of the group's sides."""
        return Inverse(group["sides"], group["power"], group["cut"], group["eps"], group["cross_normalize"])
