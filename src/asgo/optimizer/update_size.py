"""How large an update is, once its direction is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from asgo._types import Stack

if TYPE_CHECKING:
    from jaxtyping import Float

    PerMatrix: TypeAlias = Float[Tensor, "b 1 1"]

RMS = 0.2
"""Root mean square of AdamW's updates in practice, so that learning rates have the same order of magnitude, though
not the same best value: 0.0141 against AdamW's 0.0057 in ``benchmarks/shakespeare``
("Muon is Scalable for LLM Training", Liu et al. 2025; the released ASGO uses the same constant)."""


class UpdateNorms(Protocol):
    """Norms of the full parameters behind a (possibly sharded) stack of updates.

    Attributes:
        matrices_per_param: how many consecutive matrices of the stack belong to one parameter.
        matrix_numel: numel of one unsharded matrix.
    """

    matrices_per_param: int
    matrix_numel: int

    def whole_norms(self, norms: Tensor) -> Tensor:
        """Norms ``(b, 1, 1)`` of matrices from the norms of this rank's shards."""
        ...

    def all_norms(self, norms: Tensor) -> Tensor:
        """Norms ``(parameters, matrices)`` of all matrices of each parameter, from norms of those on this rank."""
        ...


def match_rms(update: Stack, of: UpdateNorms) -> PerMatrix:
    """The factor to a root mean square of 0.2 over a whole parameter.

    ``0.2 * sqrt(active * m * n) / ||U||_F`` with `active` the number of its matrices that are not zero, so that an
    expert that is idle does not enlarge the steps of the others.
    """
    here = _norms(update, of).view(-1, of.matrices_per_param)
    return _factor(of.all_norms(here), of.matrix_numel).expand_as(here).reshape(-1, 1, 1)


def match_rms_per_slice(update: Stack, of: UpdateNorms) -> PerMatrix:
    """The factor of every matrix of the stack by itself to a root mean square of 0.2."""
    return _factor(_norms(update, of).view(-1, 1), of.matrix_numel).view(-1, 1, 1)


def unscaled(update: Stack, of: UpdateNorms) -> PerMatrix:
    """1: leave the size to the preconditioner: the theory form, whose steps decay like AdaGrad's."""
    return update.new_ones(1, 1, 1)


def _norms(update: Stack, of: UpdateNorms) -> PerMatrix:
    return of.whole_norms(torch.linalg.vector_norm(update, dim=(1, 2), keepdim=True))


def _factor(norms: Float[Tensor, "p s"], matrix_numel: int) -> Float[Tensor, "p 1"]:
    """The factor of matrices that have one size of step, a row for each parameter."""
    size = (norms > 0).to(norms.dtype).sum(1, keepdim=True) * matrix_numel
    norm = torch.linalg.vector_norm(norms, dim=1, keepdim=True)
    return torch.where(norm > 0, RMS * size.sqrt() / norm, 0.0)


SCALINGS: dict[str | None, Callable[[Stack, UpdateNorms], PerMatrix]] = {
    "rms": match_rms,
    "slice_rms": match_rms_per_slice,
    None: unscaled,
}
"""The values of ``adjust_lr``: each gives the factor ``(b, 1, 1)`` of an update."""
