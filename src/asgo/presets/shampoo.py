"""Shampoo from one side and from both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo.optimizer.hyperparameters import STEP_DEFAULTS, adjust_lr_of, from_arguments
from asgo.optimizer.rounding import Rounding
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets.info import OptimInfo
from asgo.structures import OneSided, Structure, TwoSided, limit_of, packed_if


class OneSidedShampoo(StructuredOptimizer):
    r"""Full-matrix AdaGrad on one side of a matrix: the mean over the other side, eps inside the root.

    For a weight read as ``W (m, n)`` with ``m < n`` (else the products stand on the right)::

        V <- V + G G^T / n                     V = eps I at first
        W <- W - lr V^(-1/2) G

    "Structured Preconditioners in Adaptive Optimization: A Unified Analysis", Xie, Wang, Reddi, Kumar and Li 2025
    (arXiv 2503.10537). It is `ASGO.theory` with eps inside the root and ``lr sqrt(n)``.

    Memory: ``2 k^2`` with ``k = min(m, n)``, beside the momentum. Cost: ``4 m n k`` operations and an
    eigendecomposition in float64. Vectors and scalars go to AdamW.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, a number or a tensor; not on AdamW's scale unless `adjust_lr` is given.
        eps: absolute, inside the root; clamped from below at the statistic's rounding error, see
            `asgo.linalg.spectral`.
        betas: decay of the momentum and of the statistic. 0 and 1, the paper's: no momentum, a sum. With a second one
            below 1 the statistic is a running average, not corrected.
        weight_decay: decoupled, multiplied by ``lr``.
        side: the side of the statistic: ``"left"`` (the paper's text), ``"right"``, ``"auto"`` the shorter one.
        precondition_frequency: steps between refreshes of a root. Above 1, rows of the result are no longer than
            ``sqrt(n)``, which a fresh root of a sum cannot exceed.
        adjust_lr: None leaves the size of a step to the statistic (the paper); ``"rms"`` and ``"slice_rms"`` rescale
            as in `ASGO`.
        maximize: ascend instead of descend.
        rounding: how bfloat16 and float16 parameters are written, see `asgo.optimizer.rounding`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of parameters without a view, where they differ from
            the matrices' ``lr``, ``(0.9, 0.95)``, ``1e-8`` and 0.
        packed_state: store symmetric matrices as triangles, in half the memory, see `asgo.structures.Packed`.
        adjust_lr_fn: another name of `adjust_lr`, see `ASGO`.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, a view that does not fit.
        TypeError: complex or integer parameters.
    """

    info: ClassVar[OptimInfo] = OptimInfo(
        paper="Structured Preconditioners in Adaptive Optimization: A Unified Analysis (Xie, Wang, Reddi, Kumar, Li)",
        year=2025,
        memory="d + 2 k^2",
        cost="4 d k + root k^3",
        lr=5e-2,
    )
    step_defaults: ClassVar[Mapping[str, Any]] = {**STEP_DEFAULTS, "root": "inside"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.0, 1.0),
        weight_decay: float = 0.0,
        side: Literal["auto", "left", "right"] = "auto",
        precondition_frequency: int = 1,
        adjust_lr: Literal["rms", "slice_rms"] | None = None,
        *,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        adamw: Mapping[str, Any] | None = None,
        adjust_lr_fn: Literal["match_rms_adamw"] | None = None,
        packed_state: bool = False,
    ) -> None:
        given = from_arguments(locals()) | {"adjust_lr": adjust_lr_of(type(self).__name__, adjust_lr, adjust_lr_fn)}
        super().__init__(params, given, adamw)

    def structure(self, group: dict[str, Any]) -> Structure:
        """The mean gram matrix of the group's side."""
        return packed_if(
            group["packed_state"],
            OneSided(group["side"], mean=True, limit=limit_of(group), root=group["root"], eps=group["eps"]),
        )


class Shampoo(StructuredOptimizer):
    r"""A matrix on each side: the baseline of the papers.

    For a weight read as ``W (m, n)``::

        M <- b1 M + (1 - b1) G
        L <- L + G G^T                         L = eps I at first
        R <- R + G^T G                         R = eps I at first
        W <- (1 - lr weight_decay) W - lr L^(-1/4) M R^(-1/4)

    "Shampoo: Preconditioned Stochastic Tensor Optimization", Gupta, Koren and Singer 2018 (arXiv 1802.09568),
    Algorithm 1. Ours reads a convolution as one matrix, the paper as a tensor with a root for every axis; vectors and
    scalars go to AdamW, in the paper they have a matrix of their own. There is no grafting.

    Memory: ``m n + 2 (m^2 + n^2)``. Cost: ``4 m n (m + n)`` operations and two eigendecompositions in float64.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, a number or a tensor; not on AdamW's scale unless `adjust_lr` is given.
        betas: decay of the momentum and of the statistics; 1 as the second is the paper's sum, less a running average,
            not corrected.
        eps: absolute, inside the roots: L and R start from it; clamped from below at their rounding error.
        weight_decay: decoupled, multiplied by ``lr``.
        precondition_frequency: steps between refreshes of the roots. Above 1, rows and columns of the result are no
            longer than 1, which fresh roots of a sum cannot exceed.
        max_size: a longer side has no preconditioner, and the other side takes the power -1/2: a side of 30,000
            would cost 7 GB. None: no limit.
        adjust_lr: None leaves the size of a step to the statistics (the paper); ``"rms"`` and ``"slice_rms"`` rescale
            as in `ASGO`.
        maximize: ascend instead of descend.
        rounding: how bfloat16 and float16 parameters are written, see `asgo.optimizer.rounding`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of parameters without a view, where they differ from
            the matrices' ``lr``, ``(0.9, 0.95)``, ``1e-8`` and 0.
        packed_state: store symmetric matrices as triangles, in half the memory, see `asgo.structures.Packed`.
        adjust_lr_fn: another name of `adjust_lr`, see `ASGO`.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, a view that does not fit.
        TypeError: complex or integer parameters.
    """

    info: ClassVar[OptimInfo] = OptimInfo(
        paper="Shampoo: Preconditioned Stochastic Tensor Optimization (Gupta, Koren, Singer)",
        year=2018,
        memory="d + 2 m^2 + 2 n^2",
        cost="4 d (m + n) + root m^3 + n^3",
        lr=1.0,
    )
    step_defaults: ClassVar[Mapping[str, Any]] = {**STEP_DEFAULTS, "root": "eigh64"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-1,
        betas: tuple[float, float] = (0.9, 1.0),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        precondition_frequency: int = 1,
        max_size: int | None = 8192,
        adjust_lr: Literal["rms", "slice_rms"] | None = None,
        *,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        adamw: Mapping[str, Any] | None = None,
        adjust_lr_fn: Literal["match_rms_adamw"] | None = None,
        packed_state: bool = False,
    ) -> None:
        given = from_arguments(locals()) | {"adjust_lr": adjust_lr_of(type(self).__name__, adjust_lr, adjust_lr_fn)}
        super().__init__(params, given, adamw)

    def structure(self, group: dict[str, Any]) -> Structure:
        """The gram matrices of both sides."""
        return packed_if(group["packed_state"], TwoSided(group["max_size"], limit_of(group), group["eps"]))
