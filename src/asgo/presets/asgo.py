"""ASGO and its forms: the paper's, the theory's and the released program's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo.optimizer.hyperparameters import adjust_lr_of, from_arguments
from asgo.optimizer.rounding import Rounding
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets.info import OptimInfo
from asgo.structures import OneSided, SquareRoot, Structure, limit_of, packed_if


class ASGO(StructuredOptimizer):
    r"""Adaptive Structured Gradient Optimization: a one-sided matrix preconditioner on the momentum.

    For a weight read as ``W (m, n)`` with ``m < n`` (else the products stand on the right), every step does::

        M <- b1 M + (1 - b1) G                       momentum
        D  = b1 M + (1 - b1) G  if nesterov else M   direction
        V <- b2 V + (1 - b2) S S^T                   S = G or D, see `statistic`
        U  = (V + eps ||V||_F I)^(-1/2) D            every `precondition_frequency` steps a new root
        rows of U longer than 1 / sqrt(1 - b2) are scaled to that length       if precondition_frequency > 1
        U <- U / sqrt(EMA of the mean of U^2 over rows, bias-corrected)        if cross_normalize
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(m n) U / ||U||_F

    "ASGO: Adaptive Structured Gradient Optimization", An, Liu, Pan, Ren, Ma, Goldfarb and Zhang 2025
    (arXiv 2503.20762), Algorithm 2. The paper's own choices are `ASGO.paper`; its theory form (Algorithm 1) is
    `ASGO.theory`; the authors' released program, to check against, `ASGO.reference`.

    Groups (see `asgo.route`) set their own ``view`` and any of the hyperparameters below, and ``side``
    (``"auto"``, ``"left"``, ``"right"``). A group with ``view=None`` is AdamW with ``betas=(0.9, 0.95)``,
    ``eps=1e-8``, ``weight_decay=0`` and the shared ``lr`` unless it sets others.

    State per parameter, in float32 (float64 for float64): per matrix ``exp_avg`` of m x n, ``gram`` and
    ``root`` of k x k with ``k = min(m, n)``, ``cross``, ``cross_weight``, ``failures``; created when the optimizer is.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups; usually ``asgo.route(model)``.
        lr: step size, a number or a one-element tensor. Updates have a root mean square of 0.2 times it, as AdamW's
            have in practice, but the best rates differ: 0.0141 against 0.0057 in ``benchmarks/shakespeare``.
        betas: decay of the momentum and of the statistic; with a second value of 1 the statistic is a sum.
        eps: damping inside the root relative to the Frobenius norm of ``V``. 1e-6 is a little above the spacing of
            float32 (1.2e-7), below which eigenvalues of a float32 statistic are rounding.
        weight_decay: decoupled, multiplied by ``lr`` as in AdamW; 0.1 as released.
        precondition_frequency: steps between refreshes of a root; more is cheaper and less exact. Matrices are
            refreshed at different steps; the first ten steps refresh all. Above 1, rows of the result are
            limited to the largest norm that a fresh root allows, see `asgo.structures.base.reach`.
        statistic: of the ``"gradient"`` (the paper) or the ``"momentum"``. The latter, with ``betas[1] = 0`` and no
            `cross_normalize`, is Muon ("Muon: An optimizer for hidden layers", Jordan et al. 2024); a larger
            ``betas[1]`` averages over more steps.
        nesterov: look ahead with the current gradient, as Muon does; the paper does not.
        cross_normalize: normalise the other side by a running second moment; ``"element"``: every entry by its own, as
            AdaMuon does after Muon's step ("AdaMuon: Adaptive Muon Optimizer", Si, Zhang and Shen 2025), for m n more
            numbers of state. The paper does neither.
        adjust_lr: ``"rms"`` rescales each parameter's update to a root mean square of 0.2, ``"slice_rms"`` each
            matrix of a stack by itself, None not at all.
        adjust_lr_fn: as in `torch.optim.Muon`: ``"match_rms_adamw"`` is another name of ``adjust_lr="rms"``.
        root: one of `asgo.linalg.inverse_root.ROOTS`; ``"auto"`` is an eigendecomposition on a CPU for sides above 128
            and in float64, else matrix products.
            ``"square_root"`` keeps ``V^(1/2)`` in place of ``V`` and its root, in half the memory or less,
            and in half precision takes matrix products alone, see `asgo.structures.SquareRoot`; ``eps`` is not used
            then, and there is no `precondition_frequency`.
        maximize: ascend instead of descend.
        rounding: how bfloat16 and float16 parameters are written, see `asgo.optimizer.rounding`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of parameters without a view, where they differ from
            the matrices' ``lr``, ``(0.9, 0.95)``, ``1e-8`` and 0.
        capturable: keep the count of steps on the device, so that a CUDA graph can hold the whole step; needs a
            `precondition_frequency` of 1, and an ``lr`` that is a tensor on the device if it is to change.
        packed_state: keep ``gram`` and ``root`` as triangles, in half their memory, see `asgo.structures.Packed`.
        max_size: AdamW steps a parameter with a matrix whose shorter side is above this, with a warning and a line in
            `asgo.report`: statistic and root would take ``8 k^2`` bytes and ``k^3`` work. None: no limit. No
            layer of published models up to 405B parameters has a shorter side above 16,384.
        precision: of the products of root ``"square_root"``; ``"auto"`` is float16 on CUDA, bfloat16 on CPUs with units
            for it (float32 there with the gradient statistic), else float32. In float32 a CPU decomposes the statistic.
            ``"bf16_deep"`` and ``"fp16_deep"`` take one step more and damp a tenth.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key in a group, a view that does not fit.
        TypeError: complex or integer parameters.

    Example:
        >>> optimizer = ASGO(asgo.route(model), lr=1e-2)   # doctest: +SKIP
    """

    info: ClassVar[OptimInfo] = OptimInfo(
        paper="ASGO: Adaptive Structured Gradient Optimization (An, Liu, Pan, Ren, Ma, Goldfarb, Zhang)",
        year=2025,
        memory="d + 2 k^2 + 2 o",
        cost="4 d k + root k^3",
        lr=1.4e-2,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.95, 0.2),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        precondition_frequency: int = 1,
        statistic: Literal["gradient", "momentum"] = "momentum",
        nesterov: bool = True,
        cross_normalize: Literal[True, False, "element"] = True,
        adjust_lr: Literal["rms", "slice_rms"] | None = "rms",
        *,
        root: str = "auto",
        maximize: bool = False,
        rounding: Rounding = "nearest",
        adamw: Mapping[str, Any] | None = None,
        capturable: bool = False,
        packed_state: bool = False,
        max_size: int | None = 16384,
        precision: Literal["auto", "bf16", "bf16_deep", "fp16", "fp16_deep", "fp32"] = "auto",
        adjust_lr_fn: Literal["match_rms_adamw"] | None = None,
    ) -> None:
        given = {**from_arguments(locals()), "side": "auto"}
        given["adjust_lr"] = adjust_lr_of(type(self).__name__, adjust_lr, adjust_lr_fn)
        super().__init__(params, given, adamw)

    @classmethod
    def paper(
        cls,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.8),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        precondition_frequency: int = 1,
    ) -> ASGO:
        """Algorithm 2 with the paper's choices: gradient statistic, plain momentum, nothing on the other side.

        Only the damping differs: the released ``eps`` has no effect on the root (see `reference`).
        """
        return cls(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            statistic="gradient",
            nesterov=False,
            cross_normalize=False,
        )

    @classmethod
    def theory(cls, params: ParamsT, lr: float | Tensor, eps: float = 1e-8) -> ASGO:
        """Algorithm 1: ``V <- V + G G^T; W <- W - lr (V^(1/2) + eps I)^(-1) G``, from the shorter side.

        No momentum, no decay, no rescaling; ``eps`` is absolute and outside the root, and never below what the
        precision of V can resolve. The paper's text always uses the left side: ``side="left"`` in the groups.
        """
        return cls(
            params,
            lr=lr,
            betas=(0.0, 1.0),
            eps=eps,
            weight_decay=0.0,
            statistic="gradient",
            nesterov=False,
            cross_normalize=False,
            adjust_lr=None,
            root="outside",
        )

    @classmethod
    def reference(
        cls,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.8),
        eps: float = 1e-10,
        weight_decay: float = 0.1,
    ) -> ASGO:
        """The authors' released program: its side rule, its ten-step iteration, its inert ``eps``, its defaults.

        For comparison only: on rank-deficient statistics its root is noise (the effective damping lies below
        the rounding error of float32).
        """
        return cls(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            statistic="gradient",
            nesterov=False,
            cross_normalize=False,
            root="reference",
        )

    def largest_side(self, group: Mapping[str, Any]) -> int | None:
        """`max_size`, for the shorter side."""
        return group["max_size"]

    def structure(self, group: dict[str, Any]) -> Structure:
        """The gram matrix of the group's side."""
        if group["root"] == "square_root":
            return SquareRoot(group["side"], group["precision"], group["cross_normalize"])
        structure = OneSided(
            group["side"], group["cross_normalize"], limit=limit_of(group), root=group["root"], eps=group["eps"]
        )
        return packed_if(group["packed_state"], structure)
