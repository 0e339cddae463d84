"""BAG and BAGM: one number per block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo.optimizer.hyperparameters import SHARED, Constraint, from_arguments, is_whole
from asgo.optimizer.rounding import Rounding
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets.info import OptimInfo
from asgo.structures import BlockMean
from asgo.structures.block_mean import Blocks
from asgo.views import View
from asgo.views import patterns as partition

Partition: TypeAlias = Literal["tensor", "row", "kernel", "column"] | int | View

VIEWS: dict[str, Callable[[int], View]] = {
    "tensor": partition.flat,
    "row": partition.entries,
    "kernel": partition.kernels,
    "column": partition.columns,
}
"""How ``blocks`` reads a parameter by its number of axes, where the group names no view."""


def _are_blocks(value: Any) -> bool:
    return is_whole(value) or value in ("tensor", "row", "kernel", "column") or isinstance(value, Mapping)


def _view_of_blocks(blocks: Any, ndim: int) -> View | None:
    if isinstance(blocks, int):
        return partition.equal(blocks, ndim)
    return VIEWS[blocks](ndim) if isinstance(blocks, str) else View.of(blocks)


class Partitioned(StructuredOptimizer):
    """What BAG and BAGM share: parameters of any number of axes, cut into blocks."""

    constraints: ClassVar[Mapping[str, Constraint]] = {
        **SHARED,
        "blocks": Constraint(
            _are_blocks, "'tensor', 'row', 'kernel', 'column', a number of blocks >= 1 or an asgo.View"
        ),
    }
    info: ClassVar[OptimInfo] = OptimInfo(
        paper="Blockwise Adaptivity: Faster Training and Better Generalization in Deep Learning (Zheng, Kwok)",
        year=2019,
        memory="d + blocks",
        cost="4 d",
        lr=1e-2,
    )

    def default_views(
        self, members: Sequence[tuple[str | None, Tensor]], group: Mapping[str, Any]
    ) -> list[View | None]:
        """The views that ``blocks`` describes."""
        blocks = group.get("blocks", self.defaults["blocks"])
        self.constraints["blocks"].check(f"{type(self).__name__}: blocks", self.plain(blocks))
        return [_view_of_blocks(blocks, param.ndim) for _, param in members]

    def read(self, view: View, group: Mapping[str, Any]) -> View:
        """As in `StructuredOptimizer`; ``"kernel"`` and numbers need views of their own, so a given one is refused."""
        blocks = group.get("blocks", self.defaults["blocks"])
        if blocks == "kernel" or isinstance(blocks, int):
            raise ValueError(
                f"{type(self).__name__}: blocks={blocks!r} reads parameters by views of its own, but a group has the "
                f"view {view}. Leave the view out, or pass blocks='row' and a view with one row per block."
            )
        return view

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `StructuredOptimizer`; ``blocks`` are kept as plain data."""
        if isinstance(param_group, dict) and isinstance(param_group.get("blocks"), View):
            param_group["blocks"] = self.plain(param_group["blocks"])
        super().add_param_group(param_group)

    @staticmethod
    def plain(blocks: Partition) -> Any:
        """``blocks`` as a group keeps it: a `View` as its dict."""
        return blocks.to_dict() if isinstance(blocks, View) else blocks

    @staticmethod
    def unit(group: Mapping[str, Any]) -> Blocks:
        """What a block is within a matrix of the group's view."""
        blocks = group["blocks"]
        if blocks in ("row", "kernel") or isinstance(blocks, int):
            return "row"
        return "column" if blocks == "column" else "matrix"


class BAG(Partitioned):
    r"""Blockwise adaptive gradient descent: the gradient divided by one accumulated norm per block.

    For every block b of ``d_b`` entries::

        v_b <- v_b + ||G_b||^2 / d_b
        W_b <- W_b - lr G_b / (sqrt(v_b) + eps)

    "Blockwise Adaptivity: Faster Training and Better Generalization in Deep Learning", Zheng and Kwok 2019
    (arXiv 1905.09899). With blocks of one entry it is AdaGrad.

    Memory: one number per block, beside the momentum that every optimizer here holds. Cost: a few operations per
    entry. Parameters may have any number of axes; ``view=None`` still means AdamW.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, a number or a tensor; not on AdamW's scale, as steps shrink while the sum grows.
        eps: outside the root; 1e-8 as in the paper's synthetic experiment.
        blocks: what a block is:

            - ``"tensor"``: the whole parameter (the paper's B.1);
            - ``"row"``: one output feature or channel (B.2); of a vector, one entry;
            - ``"kernel"``: as ``"row"``, but one kernel of a convolution (B.3);
            - ``"column"``: one input feature or channel (B.4); of a vector, all of it, as it has no inputs;
            - a number: that many runs of equal length of the flattened parameter;
            - an `asgo.View`: every matrix that it reads.

            In a group with a view of its own, ``"tensor"`` is each of its matrices, ``"row"`` each row and
            ``"column"`` each column; ``"kernel"`` and numbers are refused there.
        maximize: ascend instead of descend.
        rounding: how bfloat16 and float16 parameters are written, see `asgo.optimizer.rounding`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of parameters without a view, where they differ from
            the matrices' ``lr``, ``(0.9, 0.95)``, ``1e-8`` and 0.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, blocks that do not fit.
        TypeError: complex or integer parameters.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-8,
        blocks: Partition = "tensor",
        *,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(params, from_arguments(locals()) | {"blocks": self.plain(blocks)}, adamw)

    def structure(self, group: dict[str, Any]) -> BlockMean:
        """The mean square of each block."""
        return BlockMean(self.unit(group), group["eps"])


class BAGM(Partitioned):
    r"""BAG with momentum: the momentum divided by one running norm per block.

    For every block b of ``d_b`` entries, at step t::

        M   <- b1 M + (1 - b1) G
        v_b <- b2 v_b + (1 - b2) ||G_b||^2 / d_b
        W_b <- (1 - lr weight_decay) W_b - lr M_b / (sqrt(v_b / (1 - b2^t)) + eps)

    "Blockwise Adaptivity: Faster Training and Better Generalization in Deep Learning", Zheng and Kwok 2019
    (arXiv 1905.09899). The paper weights step t by ``a_t``; its experiments use ``a_t = 0.999^-t``, and the weighted
    mean ``sum a_t ||G_b||^2 / d_b / sum a_t`` is then exactly the corrected average above with ``b2 = 0.999``. With
    blocks of one entry it is Adam without a correction of the momentum.

    Memory: ``m n`` and one number per block. Cost: a few operations per entry. Parameters may have any number of axes;
    ``view=None`` still means AdamW.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, a number or a tensor; similar to Adam's.
        betas: decay of the momentum and of the statistic; the paper's 0.9 and 0.999. A second value of 1 sums.
        eps: outside the root; 1e-3 as in the paper.
        weight_decay: decoupled, multiplied by ``lr``; ours, the paper's adds to the gradient.
        blocks: what a block is, see `BAG`.
        maximize: ascend instead of descend.
        rounding: how bfloat16 and float16 parameters are written, see `asgo.optimizer.rounding`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of parameters without a view, where they differ from
            the matrices' ``lr``, ``(0.9, 0.95)``, ``1e-8`` and 0.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, blocks that do not fit.
        TypeError: complex or integer parameters.
    """

    info: ClassVar[OptimInfo] = replace(Partitioned.info, lr=5e-3)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        blocks: Partition = "tensor",
        *,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(params, from_arguments(locals()) | {"blocks": self.plain(blocks)}, adamw)

    def structure(self, group: dict[str, Any]) -> BlockMean:
        """The corrected running mean square of each block."""
        return BlockMean(self.unit(group), group["eps"], corrected=True)
