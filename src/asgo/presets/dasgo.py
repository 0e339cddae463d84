"""DASGO: one number per column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo.optimizer.hyperparameters import SHARED, Constraint, adjust_lr_of, from_arguments, one_of
from asgo.optimizer.rounding import Rounding
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets.asgo import ASGO
from asgo.presets.info import OptimInfo
from asgo.structures import BlockMean


class DASGO(StructuredOptimizer):
    r"""Diagonal ASGO: the momentum divided by a running norm of each column.

    For a weight read as ``W (m, n)``, every step does::

        M   <- b1 M + (1 - b1) G                          momentum
        v_j <- b2 v_j + (1 - b2) sum_i G_ij^2             one number per column
        U    = M / sqrt(v + eps)
        W   <- (1 - lr weight_decay) W - lr 0.2 sqrt(m n) U / ||U||_F

    "ASGO: Adaptive Structured Gradient Optimization", An, Liu, Pan, Ren, Ma, Goldfarb and Zhang 2025
    (arXiv 2503.20762), Algorithm 4. It is `asgo.BAGM` with one block per column, the sum of squares in place of
    their mean and eps under the root.

    Memory: ``m n + n`` numbers. Cost: a few operations per entry, no root. Vectors and scalars go to AdamW, as do
    groups with ``view=None``; ``asgo.route(model)`` sends embeddings and output heads there too.

    State per parameter, in float32 (float64 for float64): ``exp_avg`` of its shape and, per matrix, ``exp_avg_sq``
    ``(1, n)`` or ``(m, 1)``, ``failures``.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups; ``asgo.route(model)`` makes good ones.
        lr: step size on AdamW's scale (updates have a root mean square of 0.2), a number or a tensor; 1e-2 as in
            the released configuration.
        betas: decay of the momentum and of the statistic, as released; a second value of 1 sums instead.
        eps: under the root, absolute, as released.
        weight_decay: decoupled, multiplied by ``lr``; 0.1 as released.
        axis: one number per ``"column"`` (as released) or ``"row"``; ``"auto"``: whichever are fewer.
        adjust_lr: ``"rms"`` rescales each parameter's update to a root mean square of 0.2 (the paper),
            ``"slice_rms"`` each matrix of a stack by itself, None not at all.
        maximize: ascend instead of descend.
        rounding: how bfloat16 and float16 parameters are written, see `asgo.optimizer.rounding`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of parameters without a view, where they differ from
            the matrices' ``lr``, ``(0.9, 0.95)``, ``1e-8`` and 0.
        adjust_lr_fn: another name of `adjust_lr`, see `ASGO`.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, a view that does not fit.
        TypeError: complex or integer parameters.
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {**SHARED, "axis": one_of("column", "row", "auto")}
    info: ClassVar[OptimInfo] = replace(ASGO.info, memory="d + n", cost="4 d", lr=5e-3)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        axis: Literal["column", "row", "auto"] = "column",
        adjust_lr: Literal["rms", "slice_rms"] | None = "rms",
        *,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        adamw: Mapping[str, Any] | None = None,
        adjust_lr_fn: Literal["match_rms_adamw"] | None = None,
    ) -> None:
        given = from_arguments(locals()) | {"adjust_lr": adjust_lr_of(type(self).__name__, adjust_lr, adjust_lr_fn)}
        super().__init__(params, given, adamw)

    def structure(self, group: dict[str, Any]) -> BlockMean:
        """The sum of squares of each column or row."""
        return BlockMean(group["axis"], group["eps"], total=True, inside=True)
