"""AdaGram: full-matrix AdaGrad in low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo.optimizer.hyperparameters import FLAG, SHARED, Constraint, from_arguments, is_whole, one_of
from asgo.optimizer.param_groups import views_of
from asgo.optimizer.rounding import Rounding
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets.info import OptimInfo
from asgo.structures import LowRankFactor, LowRankSymmetric, Structure
from asgo.views import View
from asgo.views import patterns as partition


class AdaGram(StructuredOptimizer):
    r"""Full-matrix AdaGrad whose statistic ``G = eps I + sum g g^T`` is kept in low rank.

    For a parameter as one vector of d entries::

        h = L^-1 g,  s = sqrt(1 + |h|^2)                  G = L L^T before this gradient
        L^-1 <- (I - (1 - 1/s) u u^T) L^-1                u = h / |h|;   L^-1 = eps^(-1/2) (I - P Q^T)
        w <- w - lr h / s                                 = lr L^-1 g with the new L

    so each gradient adds a column to P and Q, until `rank` of them; then an integrator reduces ``P Q^T`` with the
    new column to that rank. "Dynamic Low-rank Approximation of Full-Matrix Preconditioner for Training Generalized
    Linear Models", Matveeva, Katrutsa and Frolov 2025 (arXiv 2508.21106).

    The paper's direction has the norm of ``G^(-1/2) g`` but another angle, and is not always a descent direction. With
    ``direction="symmetric"`` (ours) the statistic itself is kept as ``delta I + U diag(s^2) U^T`` and its exact inverse
    root is applied; with enough rank that is full-matrix AdaGrad.

    Memory: ``2 d r + d`` (factor) or ``d (r + 1)`` (symmetric), beside the momentum that every optimizer here holds.
    Cost: ``O(d r^2)``, no root. Without a limit, memory ``d^2`` and cost ``d^2`` (factor) or ``d^3`` (symmetric). The
    last gradient is always represented in full, so no step is longer than lr, whatever the gradient; where rounding
    would make one longer, as where gradients differ in size by more than their dtype resolves, it is cut to lr.
    Parameters may have any number of axes; each matrix of a view is a vector of its own; ``view=None`` is still AdamW.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups.
        lr: step size, a number or a tensor; the paper's 0.1.
        eps: initial multiple of I in the statistic. 1e-2 as in the paper, whose tuned values are 0.1 to 0.5.
        rank: number of columns of P and Q, at most the number of entries; None for no limit.
            ``"auto"`` is the paper's 5. A number above the entries of every parameter is refused.
        direction: ``"factor"`` (the paper) or ``"symmetric"``.
        integrator: how a matrix of rank r + 1 is reduced to rank r:

            - ``"psi"``: a projector-splitting step (the paper); it ignores what is orthogonal to the subspace;
            - ``"bug"``: a basis update and Galerkin step, which may rotate both bases before it projects;
            - ``"eig"``: the best approximation, by a decomposition of size r + 1;
            - None: ``"psi"`` for ``"factor"``, ``"eig"`` for ``"symmetric"``, which ``"psi"`` would not keep symmetric.
        compensate: with ``"symmetric"``, distribute the sum of the dropped eigenvalues evenly over all directions
            outside U; ``"factor"`` has no such form.
        maximize: ascend instead of descend.
        rounding: how bfloat16 and float16 parameters are written, see `asgo.optimizer.rounding`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of parameters without a view, where they differ from
            the matrices' ``lr``, ``(0.9, 0.95)``, ``1e-8`` and 0.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, a rank above the number of entries.
        TypeError: complex or integer parameters.
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        **SHARED,
        "rank": Constraint(
            lambda value: value in (None, "auto") or is_whole(value), "'auto', None or a whole number >= 1"
        ),
        "direction": one_of("factor", "symmetric"),
        "integrator": one_of(None, "psi", "bug", "eig"),
        "compensate": FLAG,
    }
    info: ClassVar[OptimInfo] = OptimInfo(
        paper=(
            "Dynamic Low-rank Approximation of Full-Matrix Preconditioner for Training Generalized Linear Models"
            " (Matveeva, Katrutsa, Frolov)"
        ),
        year=2025,
        memory="d (2 r + 2)",
        cost="16 d r^2",
        lr=3e-1,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-1,
        eps: float = 1e-2,
        rank: int | Literal["auto"] | None = "auto",
        direction: Literal["factor", "symmetric"] = "factor",
        integrator: Literal["psi", "bug", "eig"] | None = None,
        compensate: bool = True,
        *,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(params, from_arguments(locals()), adamw)
        views = [view for group in self.param_groups for view in views_of(group)]
        _check_rank(rank, views, [param for group in self.param_groups for param in group["params"]])

    def default_views(
        self, members: Sequence[tuple[str | None, Tensor]], group: Mapping[str, Any]
    ) -> list[View | None]:
        """The whole parameter as one row."""
        return [partition.flat(param.ndim) for _, param in members]

    def check_members(self, group: Mapping[str, Any], views: Sequence[View | None], params: Sequence[Tensor]) -> None:
        """Refuse an integrator that does not fit the direction, and a group's own rank above all of its matrices."""
        if (group["direction"], group["integrator"]) == ("symmetric", "psi"):
            raise ValueError(
                "AdaGram: integrator 'psi' does not keep a matrix symmetric, as direction='symmetric' needs: pass "
                "'bug', 'eig' or None."
            )
        if group["rank"] != self.defaults["rank"]:
            _check_rank(group["rank"], views, params)

    def structure(self, group: dict[str, Any]) -> Structure:
        """A factor of the statistic, or the statistic itself."""
        rank, eps, integrator = group["rank"], group["eps"], group["integrator"]
        rank = 5 if rank == "auto" else rank
        if group["direction"] == "factor":
            return LowRankFactor(rank, eps, integrator or "psi")
        return LowRankSymmetric(rank, eps, integrator or "eig", group["compensate"])


def _check_rank(rank: int | Literal["auto"] | None, views: Sequence[View | None], params: Sequence[Tensor]) -> None:
    shapes = [view.shapes(param.shape) for view, param in zip(views, params, strict=True) if view is not None]
    largest = max((m * n for stacks in shapes for _, m, n in stacks), default=0)
    if isinstance(rank, int) and rank > largest > 0:
        raise ValueError(
            f"AdaGram: rank={rank} is above the {largest} entries of the largest matrix: pass {largest} or less, or "
            "None for no limit."
        )
