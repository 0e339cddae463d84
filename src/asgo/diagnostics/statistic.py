"""How well conditioned the statistic of a structure is, and how exact the root that was made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asgo._types import State
from asgo.diagnostics.spectra import eigenvalues
from asgo.linalg import spectral
from asgo.linalg.inverse_root import relative, resolve, undamped
from asgo.linalg.matmul import exact_matmul, gram
from asgo.state_keys import part_key
from asgo.structures import OneSided, Packed, Structure, TwoSided, opened

if TYPE_CHECKING:
    from jaxtyping import Float


def damped(A: Float[Tensor, "b k k"], root: str, eps: float) -> Float[Tensor, "b k k"]:
    """The matrix that a root of `asgo.linalg.inverse_root.ROOTS` is the inverse square root of, in float64.

    As its `formula` says; eigenvalues that A's dtype does not resolve are raised first where the root raises them.
    """
    found = resolve(root)
    if found.formula in (relative, undamped):  # linear in A: no eigendecomposition, and defined where A is not finite
        A = A.double()
        added = torch.linalg.vector_norm(A, dim=(1, 2), keepdim=True) * (found.formula is relative)
        return A + eps * added * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    values, vectors = spectral.decompose(torch.where(A.isfinite().flatten(1).all(1)[:, None, None], A, 0).double())
    values = values.clamp(min=0)
    values = found.formula(spectral.resolved(values, A.dtype) if found.raises else values, eps)
    return gram(vectors * values.sqrt()[:, None])


def condition(A: Float[Tensor, "b k k"]) -> Float[Tensor, "b"]:
    """Largest over smallest eigenvalue: infinite for a singular matrix, NaN for zero and for one not finite."""
    values = eigenvalues(A)
    return values[:, -1] / values[:, 0].clamp(min=0)


def residual(A: Float[Tensor, "b k k"], Z: Float[Tensor, "b k k"], power: float = 0.5) -> Float[Tensor, "b"]:
    """``||Z A Z^T - I||_F / sqrt(k)`` for ``Z = A^(-1/2)``, in float64; for a power of 1/4, with ``Z Z`` in place of Z.

    0 for an exact root; about 1 where Z is far too small, as the root 0 of a zero matrix is.
    """
    A, Z = A.double(), Z.double()
    with exact_matmul(A.device):
        Z = Z if power == 0.5 else Z @ Z
        product = Z @ A @ Z.mT
    product.diagonal(dim1=1, dim2=2).sub_(1)
    return torch.linalg.vector_norm(product, dim=(1, 2)) / A.shape[-1] ** 0.5


def conditioning(
    structure: Structure, group: Mapping[str, Any], state: State, part: int
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]] | None:
    """Condition of the damped statistic and residual of the root in use, ``(b,)`` each; None for other structures.

    Of the structures with a gram and a root of it, packed or not: `OneSided`, and `TwoSided`, of whose two sides the
    worse counts.
    A root that is not refreshed at every step (`precondition_frequency`) is held against the statistic of now, so
    that its residual shows how stale it is.
    """
    inner = structure.inner if isinstance(structure, Packed) else structure
    if not isinstance(inner, (OneSided, TwoSided)):
        return None
    _, own = opened(structure, {key: state[part_key(key, part)] for key in inner.symmetric})
    if isinstance(inner, OneSided):
        A = damped(own["gram"], group["root"], group["eps"])
        return condition(A), residual(A, own["root"])
    sides = [side for side in ("left", "right") if own[side].numel()]
    found = []
    for side in sides:
        A = damped(own[side], "inside", group["eps"])
        found.append((condition(A), residual(A, own[f"{side}_root"], 0.5 / len(sides))))
    return (torch.stack([c for c, _ in found]).amax(0), torch.stack([r for _, r in found]).amax(0)) if found else None
