"""Adam-mini: one learning rate per head, output neuron or token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from asgo.optimizer.hyperparameters import from_arguments
from asgo.optimizer.rounding import Rounding
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets.info import OptimInfo
from asgo.structures import BlockMean
from asgo.views import View
from asgo.views import patterns as partition
from asgo.views.routing import Rule, route


class AdamMini(StructuredOptimizer):
    r"""Adam with one learning rate per head, output neuron or token in place of one per entry.

    For every block b of ``d_b`` entries, at step t::

        M   <- b1 M + (1 - b1) G
        v_b <- b2 v_b + (1 - b2) ||G_b||^2 / d_b
        W_b <- (1 - lr weight_decay) W_b - lr (M_b / (1 - b1^t)) / (sqrt(v_b / (1 - b2^t)) + eps)

    "Adam-mini: Use Fewer Learning Rates To Gain More", Zhang, Chen, Li, Ding, Wu, Kingma, Ye, Luo and Sun 2024
    (arXiv 2406.16793). Blocks follow the view: a head of queries or keys where the view is per head, else a row: one
    output neuron of a matrix, one token of an embedding. A vector is one block. The authors' program finds its
    blocks by parts of names; `groups` finds them by module types, as `asgo.route` does.

    Memory: ``m n`` and one number per block, half of Adam's. Cost: a few operations per entry. Parameters may have any
    number of axes; ``view=None`` still means AdamW, so for Adam-mini's memory build it from ``AdamMini.groups(model)``.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups; ``AdamMini.groups(model)`` makes good ones.
        lr: step size, a number or a tensor: Adam's.
        betas: decay of the momentum and of the statistic, Adam's. A second value of 1 sums instead.
        eps: outside the root, as in Adam.
        weight_decay: decoupled, multiplied by ``lr``; 0.1 as in the paper's language models.
        maximize: ascend instead of descend.
        rounding: how bfloat16 and float16 parameters are written, see `asgo.optimizer.rounding`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of parameters without a view, where they differ from
            the matrices' ``lr``, ``(0.9, 0.95)``, ``1e-8`` and 0.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, a view that does not fit.
        TypeError: complex or integer parameters.
    """

    info: ClassVar[OptimInfo] = OptimInfo(
        paper="Adam-mini: Use Fewer Learning Rates To Gain More (Zhang, Chen, Li, Ding, Wu, Kingma, Ye, Luo, Sun)",
        year=2024,
        memory="d + blocks",
        cost="4 d",
        lr=7e-3,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(params, from_arguments(locals()), adamw)

    @staticmethod
    def groups(model: nn.Module, rules: Sequence[Rule] = ()) -> list[dict[str, Any]]:
        """Groups of all parameters of a model with a block per head of queries and keys, and none for AdamW.

        Args:
            model: any module.
            rules: what should differ, as in `asgo.route`. What would go to AdamW is read in rows, without weight
                decay unless a rule says otherwise.
        """
        groups = route(model, rules, per_head=True)
        for group in groups:
            if not any(group["views"]):
                group["name"] = group["name"].replace("adamw", "rows")
                group.setdefault("weight_decay", 0.0)
            pairs = zip(group["params"], group["views"], strict=True)
            group["views"] = [partition.rows(param.ndim) if view is None else view for (_, param), view in pairs]
        return groups

    def default_views(
        self, members: Sequence[tuple[str | None, Tensor]], group: Mapping[str, Any]
    ) -> list[View | None]:
        """One row per output feature; a vector is one row."""
        return [partition.rows(param.ndim) for _, param in members]

    def read(self, view: View, group: Mapping[str, Any]) -> View:
        """A view of heads is read with one row per head."""
        return partition.head_rows(view)

    def structure(self, group: dict[str, Any]) -> BlockMean:
        """The corrected running mean square of each row."""
        return BlockMean("row", group["eps"], corrected=True, momentum=group["betas"][0])
