"""ASGO with another function of the statistic's eigenvalues than the inverse square root."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgo._types import State
from asgo.linalg.spectral import apply_to_eigenvalues
from asgo.optimizer.hyperparameters import SHARED, STEP_DEFAULTS, Constraint, from_arguments, is_number
from asgo.optimizer.step import StructuredOptimizer
from asgo.structures import OneSided, Structure
from asgo.structures.one_sided import Cross


@dataclass(frozen=True)
class Spectrum(OneSided):
    """`OneSided` with ``(v + eps ||V||_F)^(-exponent)`` for each eigenvalue v of the statistic, and 0 for small ones.

    Args:
        exponent: 1/2 is ASGO's; less is nearer to the momentum itself.
        cut: eigenvalues below this share of the largest count as 0, and so do their directions in the update
            (a pseudo-inverse).
    """

    exponent: float = 0.5
    cut: float = 0.0

    def compute_root(self, state: State) -> Tensor:
        """By an eigendecomposition in float64."""

        def weigh(values: Tensor) -> Tensor:
            norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
            kept = values >= self.cut * values.amax(-1, keepdim=True)
            return (values + self.eps * norm).pow(-self.exponent) * kept

        fresh, ok = apply_to_eigenvalues(state["gram"], weigh)
        state["root"].copy_(torch.where(ok[:, None, None], fresh, state["root"]))
        return ok

    def retried(self) -> None:
        """There is no more exact root."""


class SpectrumASGO(StructuredOptimizer):
    """`ASGO` with the function of eigenvalues of `Spectrum`. Vectors, embeddings and output heads are AdamW's.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from ``asgo.route(model)``.
        lr: step size, as of `ASGO`.
        betas: decay of the momentum and of the statistic.
        eps: damping, relative to the norm of the statistic.
        weight_decay: decoupled, multiplied by ``lr``.
        exponent: as of `Spectrum`.
        cut: as of `Spectrum`.
        cross_normalize: as of `ASGO`.
        nesterov: as of `ASGO`.
    """

    step_defaults: ClassVar[Mapping[str, Any]] = {**STEP_DEFAULTS, "statistic": "momentum", "adjust_lr": "rms"}
    constraints: ClassVar[Mapping[str, Constraint]] = {
        **SHARED,
        "exponent": Constraint(lambda value: is_number(value, 0) and 0 < value <= 1, "a number above 0, at most 1"),
        "cut": Constraint(lambda value: is_number(value, 0) and value < 1, "a share from 0 to below 1"),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.95, 0.2),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        exponent: float = 0.5,
        cut: float = 0.0,
        cross_normalize: Cross = True,
        nesterov: bool = True,
    ) -> None:
        super().__init__(params, {**from_arguments(locals()), "maximize": False})

    def structure(self, group: dict[str, Any]) -> Structure:
        """One side of the momentum's gram."""
        return Spectrum(
            cross_normalize=group["cross_normalize"],
            eps=group["eps"],
            exponent=group["exponent"],
            cut=group["cut"],
        )
