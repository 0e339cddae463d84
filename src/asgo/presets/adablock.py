"""AdaBlock: dense blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo.optimizer.hyperparameters import (
    SHARED,
    STEP_DEFAULTS,
    Constraint,
    from_arguments,
    is_number,
    one_of,
    or_none,
    positive,
    whole,
)
from asgo.optimizer.rounding import Rounding
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets.info import OptimInfo
from asgo.structures import BlockDiagonal, Structure, limit_of, packed_if
from asgo.views import View


class AdaBlock(StructuredOptimizer):
    r"""Adam with a full matrix for every few entries of a column.

    For every run g_b of `block_size` output indices of one input index, at step t::

        M   <- b1 M + (1 - b1) G
        V_b <- b2 V_b + (1 - b2) g_b g_b^T
        W_b <- (1 - lr weight_decay) W_b - lr sqrt(1 - b2^t) / (1 - b1^t) (V_b^(1/2) + eps I)^(-1) M_b

    "AdaBlock: SGD with Practical Block Diagonal Matrix Adaptation for Deep Learning", Yun, Lozano and Yang 2022 (arXiv
    1905.10757). The paper's two options are here too. Spectrum clipping: with `clip`, the eigenvalues of what
    multiplies ``lr M_b`` are kept between ``clip (1 - 1/(gamma t + 1))`` and ``clip (1 + 1/(gamma t))``, which leads
    from AdaBlock to momentum SGD with ``lr clip``. Random layers: with ``stale="diagonal"`` and a
    `precondition_frequency` of tau, a matrix uses its blocks in one of tau steps and their diagonal in the others.

    Of a convolution, a run lies within a kernel, as in the paper. Departures: matrices are refreshed
    at fixed phases, not drawn at random; a run that does not divide is padded with zeros; nothing is added to V
    before the decomposition. Vectors and scalars go to AdamW, as the paper has Adam there.

    Memory: ``m n (1 + 2 block_size)``. Cost: ``4 m n block_size`` operations and a decomposition for every run.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, a number or a tensor: Adam's.
        block_size: entries of a run; 10 as in the paper.
        betas: decay of the momentum and of the statistic, Adam's. A second value of 1 sums instead.
        eps: outside the root; 1e-4 as released. Eigenvalues of V are clamped from below at its rounding error.
        weight_decay: decoupled, multiplied by ``lr``.
        precondition_frequency: steps between refreshes of the roots of a matrix; all are refreshed in the first ten.
        stale: between refreshes, use the last ``"root"`` or the ``"diagonal"`` of the statistic. Under an old root,
            runs of the result are no longer than a constant gradient makes them under fresh ones.
        clip: the rate of the SGD that clipping leads to, in units of lr; None for no clipping.
        gamma: how fast the two bounds approach each other; 1e-3 as released.
        maximize: ascend instead of descend.
        rounding: how bfloat16 and float16 parameters are written, see `asgo.optimizer.rounding`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of parameters without a view, where they differ from
            the matrices' ``lr``, ``(0.9, 0.95)``, ``1e-8`` and 0.
        packed_state: store symmetric matrices as triangles, in half the memory, see `asgo.structures.Packed`.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, a view that does not fit.
        TypeError: complex or integer parameters.
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        **SHARED,
        "block_size": whole(),
        "stale": one_of("root", "diagonal"),
        "clip": or_none(Constraint(lambda value: is_number(value, 0) and value > 0, "a number > 0")),
        "gamma": positive("1e-3"),
    }
    info: ClassVar[OptimInfo] = OptimInfo(
        paper="AdaBlock: SGD with Practical Block Diagonal Matrix Adaptation for Deep Learning (Yun, Lozano, Yang)",
        year=2019,
        memory="d (1 + 2 s)",
        cost="4 d s + root d s^2",
        lr=1e-2,
    )
    step_defaults: ClassVar[Mapping[str, Any]] = {**STEP_DEFAULTS, "root": "eigh64"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        block_size: int = 10,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        precondition_frequency: int = 1,
        stale: Literal["root", "diagonal"] = "root",
        clip: float | None = None,
        gamma: float = 1e-3,
        *,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        adamw: Mapping[str, Any] | None = None,
        packed_state: bool = False,
    ) -> None:
        super().__init__(params, from_arguments(locals()), adamw)

    def default_views(
        self, members: Sequence[tuple[str | None, Tensor]], group: Mapping[str, Any]
    ) -> list[View | None]:
        """Convolutions with their kernels as columns; others as usual."""
        usual = super().default_views(members, group)
        return [
            view if view is None or param.ndim < 3 else _kernels_as_columns(param.ndim)
            for (_, param), view in zip(members, usual, strict=True)
        ]

    def structure(self, group: dict[str, Any]) -> Structure:
        """The statistic of every run."""
        size, eps, beta1, stale = group["block_size"], group["eps"], group["betas"][0], group["stale"]
        limit = limit_of(group) if stale == "root" else None  # else no root is used that is older than its step
        blocks = BlockDiagonal(size, eps, beta1, stale, group["clip"], group["gamma"], limit)
        return packed_if(group["packed_state"], blocks)


def _kernels_as_columns(ndim: int) -> View:
    kernel = " ".join(f"k{i}" for i in range(ndim - 2))
    return View(f"o i {kernel} -> 1 ({kernel}) (o i)")
