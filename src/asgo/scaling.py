"""How large an update is, once its direction is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from asgo._types import Stack

if TYPE_CHECKING:
    from jaxtyping import Float

    PerMatrix: TypeAlias = Float[Tensor, "b 1 1"]

RMS = 0.2
"""Root mean square of AdamW's updates in practice, so that learning rates tuned for AdamW carry over
("Muon is Scalable for LLM Training", Liu et al. 2025; the released ASGO uses the same constant)."""


def match_rms(update: Stack, slices: int, everywhere: Callable[[Tensor], Tensor] | None = None) -> PerMatrix:
    """The factor to a root mean square of 0.2 over each run of `slices` matrices, i.e. over a whole parameter.

    ``0.2 * sqrt(moving * m * n) / ||U||_F`` with `moving` the number of matrices of the run that are not zero,
    so that an expert that rests does not enlarge the steps of the others.

    Args:
        update: ``(b, m, n)``, `b` a multiple of `slices`.
        slices: how many consecutive matrices belong to one parameter.
        everywhere: gives the norms of all matrices of a parameter, also of those on other ranks; None: all are here.
    """
    here = torch.linalg.vector_norm(update, dim=(1, 2)).view(-1, slices)
    norms = here if everywhere is None else everywhere(here)
    size = (norms > 0).to(update.dtype).sum(1, keepdim=True) * (update.shape[1] * update.shape[2])
    norm = torch.linalg.vector_norm(norms, dim=1, keepdim=True)
    factor = torch.where(norm > 0, RMS * size.sqrt() / norm, 0.0)
    return factor.expand_as(here).reshape(-1, 1, 1)


def match_rms_per_slice(update: Stack, slices: int, everywhere: Callable[[Tensor], Tensor] | None = None) -> PerMatrix:
    """The factor of every matrix of the stack by itself to a root mean square of 0.2."""
    return match_rms(update, 1)


def unscaled(update: Stack, slices: int, everywhere: Callable[[Tensor], Tensor] | None = None) -> PerMatrix:
    """1: leave the size to the preconditioner: the theory form, whose steps decay like AdaGrad's."""
    return update.new_ones(1, 1, 1)


SCALINGS: dict[str | None, Callable[[Stack, int, Callable[[Tensor], Tensor] | None], PerMatrix]] = {
    "rms": match_rms,
    "slice_rms": match_rms_per_slice,
    None: unscaled,
}
"""The values of ``adjust_lr``: each gives the factor ``(b, 1, 1)`` of an update."""
