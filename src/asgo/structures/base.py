"""The contract of a structure."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.linalg.inverse_root import ROOTS
from asgo.linalg.masked import known_all_true, masked_lerp_, where

Axis: TypeAlias = Literal["rows", "columns"]
"""Along which a matrix is cut into shards."""


RENAMED = {
    "measure": "compute_statistic",
    "fold": "update_statistic",
    "cost": "root_flops",
    "work": "step_flops",
    "derived": "root_keys",
    "spread": "sharded_keys",
    "entrywise": "linear_statistic",
    "additive": "is_shard_additive",
    "fixed": "with_side_of",
}
"""Methods of a structure by their names in version 0.1."""


STATE_KEYS: set[str] = set()
"""The keys of the state of all structures that are defined; any other key of a state may be a wrapper's."""


class Structure(ABC):
    """A statistic of gradients and the preconditioner it defines, for a stack ``(b, m, n)`` at once.

    Every tensor of the state has the stack's `b` as its first axis, so that states of several parameters can
    stand in one tensor. A structure holds settings only; the state belongs to the optimizer.

    Laws (tested for every structure): a stack gives what each matrix gives alone; the result equals the
    textbook formula in float64; shards of a matrix give what the matrix gives where the structure says so
    (`is_shard_additive`); the state of a matrix whose gradient is zero does not change.
    """

    state_keys: ClassVar[tuple[str, ...]] = ()
    """The keys of the state that `init` gives, with those of options that are off."""

    def __init_subclass__(cls) -> None:
        """Register the keys of the state, and let structures with the method names of version 0.1 work.

        Their `refresh` got a root and eps.
        """
        super().__init_subclass__()
        STATE_KEYS.update(cls.state_keys)
        own = vars(cls)
        for old, new in RENAMED.items():
            if new not in own and (callable(own.get(old)) or isinstance(own.get(old), property)):
                warnings.warn(f"{cls.__name__}.{old} is called {new} now.", DeprecationWarning, stacklevel=2)
                setattr(cls, new, own[old])
        if "refresh" in own and "compute_root" not in own:
            warnings.warn(f"{cls.__name__}.refresh is compute_root(state) now.", DeprecationWarning, stacklevel=2)
            refresh: Callable[..., Tensor] = own["refresh"]
            cls.compute_root = lambda self, state: refresh(self, state, ROOTS["auto"], 1e-6)

    def is_shard_additive(self, axis: Axis, m: int, n: int) -> bool:
        """Whether shards of an ``m x n`` matrix, cut along an axis, give what the matrix gives.

        That is two laws for `with_side_of`: the statistics of shards add up to the statistic of the matrix; and a shard
        of the direction, preconditioned by the state of the matrix, of which only `sharded_keys` are cut, is the shard
        of the preconditioned matrix.
        """
        return False

    def with_side_of(self, m: int, n: int) -> Structure:
        """This structure with what it chooses for an ``m x n`` matrix: a shard of it could suggest another side."""
        return self

    @property
    def root_keys(self) -> tuple[str, ...]:
        """The keys of the state that `compute_root` computes from the others: ranks that share its work send these."""
        return ()

    @property
    def symmetric(self) -> tuple[str, ...]:
        """The keys of the state that hold symmetric matrices ``(..., k, k)``: what `Packed` keeps as triangles."""
        return ()

    @property
    def linear_statistic(self) -> bool:
        """True if the statistic is an entrywise moving average or sum, so that it can be updated in packed form."""
        return False

    @property
    def sharded_keys(self) -> tuple[str, ...]:
        """The keys of the state that are cut where the matrix is, along an axis that is `is_shard_additive`."""
        return ()

    @property
    def added(self) -> Mapping[str, float]:
        """Those of `state_keys` that checkpoints of earlier versions lack, each with the value that they imply."""
        return {}

    @abstractmethod
    def init(self, like: Stack) -> State:
        """The state before the first gradient, in the dtype and on the device of `like`; the statistic first."""

    @abstractmethod
    def compute_statistic(self, grad: Stack) -> Tensor:
        """The statistic of one gradient, e.g. ``G G^T``."""

    @abstractmethod
    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Average a statistic into the state, in place; with ``beta2`` of 1 add it up (AdaGrad's sum)."""

    @abstractmethod
    def compute_root(self, state: State) -> Tensor:
        """Recompute the roots from the statistic, in place: the only cubic work.

        Returns:
            ``(b,)`` bool: whether the root could be computed. Where not, the last good one stays.
        """

    def retried(self) -> Structure | None:
        """This structure with a more exact root, by which a matrix whose root failed is tried once more, or None."""
        return None

    @abstractmethod
    def precondition(self, state: State, direction: Stack) -> Stack:
        """Rescale a direction by the roots; called in every step. It may return the direction itself, unchanged."""

    def precondition_shard(self, state: State, direction: Stack, whole: Callable[[Tensor], Tensor]) -> Stack:
        """As `precondition`, for shards along an axis that is `is_shard_additive`.

        Args:
            state: of the matrices; `sharded_keys` hold the values of the shards.
            direction: the shards.
            whole: from norms of the shards, or of their rows or columns, norms of the matrices, entry by entry:
                ``sqrt(sum of squares)``. A collective: every rank that holds a shard must call it.
        """
        return self.precondition(state, direction)

    def converted(self, state: State) -> State:
        """A saved state of one part, in the form that this structure keeps; itself where it knows no other form.

        Args:
            state: of one part, its momentum and failures among it.
        """
        return state

    @abstractmethod
    def root_flops(self, m: int, n: int) -> float:
        """Multiplications of one refresh of one ``m x n`` matrix, up to the root's number of products."""

    @abstractmethod
    def step_flops(self, m: int, n: int) -> float:
        """Multiplications of statistic, average and preconditioning of one ``m x n`` matrix, the leading term."""


class OneCall(Structure):
    """A structure that takes a gradient in and preconditions a direction in one call, see `SquareRoot`."""

    @abstractmethod
    def update(
        self, state: State, direction: Stack, seen: Stack, beta2: float, out: Stack | None = None
    ) -> tuple[Stack, Tensor]:
        """For whole matrices: the preconditioned direction, and ``(b,)`` bool: whether it could be computed.

        Args:
            state: changed in place.
            direction: ``(b, m, n)``.
            seen: what enters the statistic; `direction` itself for its own statistic.
            beta2: decay of the statistic; 1 adds up.
            out: a tensor like `direction` that the result may be written to, in place of a new one: `direction` itself
                where the caller does without it.
        """

    @abstractmethod
    def update_from(
        self, state: State, direction: Stack, R: Tensor, beta2: float, whole: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Stack, Tensor]:
        """For shards: as `update`, with the measurement of whole matrices, summed over ranks."""


class Algebra(Structure):
    """A structure whose preconditioners are all positive matrices of one matrix algebra K.

    Seen as a vector of ``d = m n`` entries (rows one after the other), a gradient has the statistic ``g g^T``.
    `compute_statistic` keeps its orthogonal projection on K, up to a constant factor, and `precondition` applies the
    inverse square root of the sum or average of those. Of all H in K, ``sqrt(P_K(A))`` minimises ``<A, H^-1> + tr H``:
    it is the best preconditioner in K for the gradients seen ("Structured Preconditioners in Adaptive Optimization: A
    Unified Analysis", Xie, Wang, Reddi, Kumar and Li 2025).
    """

    @abstractmethod
    def project(self, A: Tensor, m: int, n: int) -> Tensor:
        """The orthogonal projection on K of a symmetric ``(m n, m n)`` matrix: dense, to read and to test by."""


def active_mask(seen: Tensor) -> Tensor:
    """``(b, 1, 1)``: 1 for each matrix with an entry that is not zero, 0 for a zero matrix."""
    for part in (seen[:, :1], seen):  # the first row, which is enough where it is known to hold
        active = torch.any(part, dim=tuple(range(1, seen.ndim)))
        if known_all_true(active):
            break
    return active.to(seen.dtype)[:, None, None]


def masked_ema_(memory: Tensor, seen: Tensor, beta2: float, active: Tensor) -> None:
    """``memory <- b2 memory + (1 - b2) seen`` in place, or their sum with ``beta2`` of 1; inactive matrices keep
    theirs.

    Args:
        memory: ``(b, ...)``.
        seen: of the same shape.
        beta2: the decay.
        active: ``(b, 1, 1)``, as from `active_mask`.
    """
    if beta2 == 1:
        memory.add_(seen if known_all_true(active > 0) else seen * active)
    else:
        masked_lerp_(memory, seen, 1 - beta2, active > 0)


def update_ema_weight(weight: Tensor, beta: float, active: Tensor) -> None:
    """Average a constant 1 into `weight`, in place: what an average that started from zero must be divided by."""
    if beta != 1:
        weight.lerp_(torch.ones_like(weight), (1 - beta) * active)


def ema_denominator(weight: Tensor) -> Tensor:
    """What to divide an average by: its weight, or 1 where the weight is 0 (a sum, or nothing averaged yet)."""
    return where(weight > 0, weight, 1.0)


@lru_cache(maxsize=256)
def reach(beta1: float, beta2: float, statistic: str = "gradient", nesterov: bool = False) -> float:
    """Largest norm of a row, column or run of entries of a direction that a fresh root of its statistic allows.

    Statistic of the momentum: ``V >= (1 - b2) D D^T``, so no row of ``V^(-1/2) D`` is longer than
    ``1 / sqrt(1 - b2)``. Statistic of the gradient: the largest norm that a constant gradient attains, which after t
    steps is ``(1 - b1^t) / sqrt(1 - b2^t)`` (t + 1 in the numerator with Nesterov's momentum) and tends to 1. A sum: 1.
    """
    if beta2 == 1:
        return 1.0
    if statistic == "momentum":
        return 1 / math.sqrt(1 - beta2)
    return max(1.0, *((1 - beta1 ** (t + nesterov)) / math.sqrt(1 - beta2**t) for t in range(1, 1000)))


def limit_of(group: Mapping[str, Any]) -> float | None:
    """The `reach` of a group's directions where its roots grow older than a step; None where all are fresh."""
    if group["precondition_frequency"] == 1:
        return None
    return reach(*group["betas"], group.get("statistic", "gradient"), group.get("nesterov", False))


def norms_along(stack: Stack, axis: int) -> Tensor:
    """Norms along an axis, kept. Where memory runs along another, torch's own take 20 times as long on a CPU."""
    if stack.device.type != "cpu" or stack.stride(axis) == 1:
        return torch.linalg.vector_norm(stack, dim=axis, keepdim=True)
    return stack.square().sum(axis, keepdim=True).sqrt_()


def shorten(stack: Tensor, lengths: Tensor, limit: float) -> Tensor:
    """The stack with what is longer than `limit` brought down to it.

    Args:
        stack: ``(b, ...)``.
        lengths: of its rows, columns or runs, to be broadcast over them.
        limit: the longest that stays as it is.
    """
    fits = lengths <= limit
    return stack if known_all_true(fits) else stack * torch.where(fits, 1.0, limit / lengths)


def all_ok(state: State) -> Tensor:
    """``(b,)`` ones, what `compute_root` returns where there is no root that could fail."""
    first = next(iter(state.values()))
    return torch.ones(len(first), dtype=torch.bool, device=first.device)
