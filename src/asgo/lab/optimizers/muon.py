"""Muon, NorMuon and AdaMuon on the library's own step: the peers that see the same matrices as ASGO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo._types import Stack, State
from asgo.linalg.polar import Plan
from asgo.optimizer.hyperparameters import FLAG, SHARED, STEP_DEFAULTS, Constraint, from_arguments, one_of
from asgo.optimizer.step import StructuredOptimizer
from asgo.optimizer.update_size import RMS
from asgo.structures import SquareRoot, Structure
from asgo.structures.base import Axis as ShardAxis
from asgo.structures.base import active_mask, masked_ema_
from asgo.structures.square_root import one_by_one

SecondMoment: TypeAlias = Literal["none", "row", "element"]
"""What the orthogonal factor is divided by: nothing, the running size of its rows, or of its entries."""

COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5
"""Of the quintic steps, as published and as in `torch.optim.Muon`; they take singular values to about [0.7, 1.2]."""
SMALLEST = 1e-3
EPS = 1e-8


@dataclass(frozen=True)
class NewtonSchulz(SquareRoot):
    """The orthogonal factor of a direction by Muon's own five steps, then a second moment.

    ``O = NS5(D)``; with `second_moment` ``v <- b2 v + (1 - b2) mean(O^2)`` over a row (NorMuon) or entry by entry
    (AdaMuon), and ``O / (sqrt(v) + 1e-8)``. No factor corrects v: it would be one for the whole matrix, and the
    rescaling of the update takes that out. Without a second moment ``0.2 sqrt(max(m, n)) O``, as `torch.optim.Muon`
    has it with ``adjust_lr_fn="match_rms_adamw"``.

    State: ``second (b, m, 1)`` or ``(b, m, n)``.

    Args:
        second_moment: "none", "row" or "element".
        sign: take the signs of the direction first.
    """

    state_keys: ClassVar[tuple[str, ...]] = ("second",)

    second_moment: SecondMoment = "none"
    sign: bool = False

    def plan(self, like: Tensor, carried: bool = False) -> Plan:
        """Muon's coefficients, in the precision that is fast on the device."""
        return Plan(super().plan(like).dtype, SMALLEST, COEFFICIENTS, frobenius=True)

    def is_shard_additive(self, axis: ShardAxis, m: int, n: int) -> bool:
        """Shards are not: the factor is of a whole matrix."""
        return False

    def init(self, like: Stack) -> State:
        """A zero second moment; without one an empty tensor, as every structure has state."""
        shape = {"none": (0, 0), "row": (like.shape[1], 1), "element": like.shape[1:]}[self.second_moment]
        return {"second": like.new_zeros(len(like), *shape)}

    def update(
        self, state: State, direction: Stack, seen: Stack, beta2: float, out: Stack | None = None
    ) -> tuple[Stack, Tensor]:
        """The factor of the direction, divided by its second moment."""
        direction = direction.sign() if self.sign else direction
        left = self.left(*direction.shape[1:])
        O, ok = one_by_one(self._by_iteration, state, direction if left else direction.mT, None, 0.0, None)
        O = O if left else O.mT
        if self.second_moment == "none":
            return O.mul_(RMS * math.sqrt(max(O.shape[1:]))), ok
        square = O.square() if self.second_moment == "element" else O.square().mean(2, keepdim=True)
        masked_ema_(state["second"], square, beta2, active_mask(square))
        return O.div_(state["second"].sqrt().add_(EPS)), ok


class Muon(StructuredOptimizer):
    r"""Muon and its two adaptive forms, with Nesterov's momentum and updates of a root mean square of about 0.2.

    For a weight read as ``W (m, n)``::

        M <- b1 M + (1 - b1) G;   D = b1 M + (1 - b1) G
        O = five quintic Newton-Schulz steps on D / ||D||_F
        v <- b2 v + (1 - b2) O^2;   O <- O / (sqrt(v) + 1e-8)          with a second moment
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(m n) O / ||O||_F    with a second moment
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(m, n)) O        without: `torch.optim.Muon`'s step

    "Muon: An optimizer for hidden layers in neural networks", Jordan et al. 2024; "NorMuon: Making Muon more efficient
    and scalable", Li, Liu, Liang, Zheng and Zhao 2025 (``second_moment="row"``); "AdaMuon: Adaptive Muon Optimizer",
    Si, Zhang and Shen 2025 (``"element"``, with `sign`). Vectors, embeddings and output heads are AdamW's.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, on the scale of `ASGO`'s.
        momentum: b1.
        beta2: of the second moment.
        weight_decay: decoupled, multiplied by ``lr``.
        nesterov: look ahead with the current gradient.
        second_moment: "none", "row" or "element".
        sign: orthogonalise the signs of the direction, as AdaMuon does.
        precision: of the products: "auto", "bf16", "fp16" or "fp32"; "auto" is float32 on a CPU without bfloat16 units.
    """

    step_defaults: ClassVar[Mapping[str, Any]] = {**STEP_DEFAULTS, "statistic": "momentum"}
    constraints: ClassVar[Mapping[str, Constraint]] = {
        **SHARED,
        "second_moment": one_of("none", "row", "element"),
        "sign": FLAG,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-2,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        second_moment: SecondMoment = "none",
        sign: bool = False,
        precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    ) -> None:
        given = from_arguments(locals())
        given["betas"] = given.pop("momentum"), given.pop("beta2")
        super().__init__(params, {**given, "adjust_lr": None if second_moment == "none" else "rms", "maximize": False})

    def structure(self, group: dict[str, Any]) -> Structure:
        """The orthogonal factor."""
        options = {key: group[key] for key in ("precision", "second_moment", "sign")}
        return NewtonSchulz(**options)
