"""AGD: the momentum divided by the size of its changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo.optimizer.hyperparameters import SHARED, STEP_DEFAULTS, Constraint, from_arguments, positive
from asgo.optimizer.rounding import Rounding
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets.info import OptimInfo
from asgo.structures import MomentumChange
from asgo.views import View
from asgo.views import patterns as partition


class AGD(StructuredOptimizer):
    r"""Auto-switchable: adaptive where the gradient changes, SGD with momentum where it does not.

    For every entry, at step t::

        M <- b1 M + (1 - b1) G
        H  = M / (1 - b1^t)
        v <- b2 v + (1 - b2) (H - H_before)^2              H_before = 0 at the first step
        W <- (1 - lr weight_decay) W - lr H / max(sqrt(v / (1 - b2^t)), delta)

    "AGD: an Auto-switchable Optimizer using Stepwise Gradient Difference for Preconditioning Matrix", Yue, Ye, Jiang,
    Liu and Zhang 2023 (arXiv 2312.01658), as in the authors' program without its options ``amsgrad`` and ``win``.
    Where ``sqrt(v)`` is below delta, the step is momentum SGD with ``lr / delta``.

    Memory: ``3 m n``, one ``m n`` more than the authors', because the previous H is stored and not recomputed.
    Cost: a few operations per entry. Parameters may have any number of axes; ``view=None`` still means AdamW.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, a number or a tensor; as released.
        betas: decay of the momentum and of the statistic, as released; a second value of 1 sums instead.
        delta: smallest divisor of H; 1e-5 as released, 1e-14 for the paper's transformers.
        weight_decay: decoupled, multiplied by ``lr``.
        maximize: ascend instead of descend.
        rounding: how bfloat16 and float16 parameters are written, see `asgo.optimizer.rounding`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of parameters without a view, where they differ from
            the matrices' ``lr``, ``(0.9, 0.95)``, ``1e-8`` and 0.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, a view that does not fit.
        TypeError: complex or integer parameters.
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {**SHARED, "delta": positive("1e-5")}
    info: ClassVar[OptimInfo] = OptimInfo(
        paper=(
            "AGD: an Auto-switchable Optimizer using Stepwise Gradient Difference for Preconditioning Matrix"
            " (Yue, Ye, Jiang, Liu, Zhang)"
        ),
        year=2023,
        memory="3 d",
        cost="8 d",
        lr=6e-4,
    )
    step_defaults: ClassVar[Mapping[str, Any]] = {**STEP_DEFAULTS, "statistic": "momentum"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        delta: float = 1e-5,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(params, from_arguments(locals()), adamw)

    def default_views(
        self, members: Sequence[tuple[str | None, Tensor]], group: Mapping[str, Any]
    ) -> list[View | None]:
        """The whole parameter as one row: entries have no neighbours."""
        return [partition.flat(param.ndim) for _, param in members]

    def structure(self, group: dict[str, Any]) -> MomentumChange:
        """The mean square of the differences of momenta."""
        return MomentumChange(group["betas"][0], group["delta"])
