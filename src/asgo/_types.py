"""The nouns that every module shares, and the letters of their shapes.

``b`` matrices in a stack, each ``m`` rows by ``n`` columns; ``k`` is the size of a square statistic
(``m`` or ``n``); ``d`` is the size of a head; ``r`` is a rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Stack: TypeAlias = Float[Tensor, "b m n"]
else:
    Stack: TypeAlias = Tensor
    """A stack of independent matrices: ``Float[Tensor, "b m n"]``."""

State: TypeAlias = dict[str, Tensor]
"""What an optimizer remembers about one parameter: tensors only, as ``load_state_dict`` mangles the rest."""


class Root(Protocol):
    """A batched inverse square root, ``(A, eps) -> (Z, ok)``.

    ``A`` holds symmetric positive semidefinite matrices, ``Z`` their damped inverse square roots in A's
    dtype, and ``ok`` (on A's device) is False for each matrix whose root failed, so that the caller can keep
    its last good one. How ``eps`` damps is the root's own affair; see `asgo.linalg.inverse_root`.

    Apply a root as ``Z @ M`` or ``M @ Z.mT``: rounding may leave it less than symmetric.
    """

    def __call__(self, A: Float[Tensor, "b k k"], eps: float) -> tuple[Float[Tensor, "b k k"], Bool[Tensor, "b"]]:
        """Return the roots of the stack ``A`` and which of them can be trusted."""
        ...
