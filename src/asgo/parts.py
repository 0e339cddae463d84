"""Parts of parameters, and what one process does with them: it holds and steps them all, and sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.structures import Structure
from asgo.views import View

Wait: TypeAlias = Callable[[], None]
"""Waits until a collective has arrived, and puts what it brought into its place."""

Due: TypeAlias = Callable[["ParameterPart"], bool]
"""Whether the roots of a part are refreshed in this step."""


@dataclass(frozen=True, eq=False)
class ParameterPart:
    """One part of one parameter: a stack of matrices.

    Args:
        param: the parameter.
        view: through which all of it is read.
        index: the number of the part.
        strategy: where the parameter lives.
        refresh_phase: the step, modulo the refresh interval, in which its roots are refreshed.
        owner: the group rank that refreshes its roots; None: every rank does.
        place: a number that the same part has on all ranks and no other part has, for random numbers.
    """

    param: Tensor
    view: View
    index: int
    strategy: Strategy
    refresh_phase: int = 0
    owner: int | None = None
    place: int = 0

    @property
    def is_owner(self) -> bool:
        """Whether this rank refreshes its roots."""
        return self.owner is None or self.owner == self.strategy.group_rank

    @property
    def holds_state(self) -> bool:
        """Whether this rank holds its momentum."""
        return self.strategy.holds_state(self.owner)

    def of(self, held: Tensor) -> Tensor:
        """The part, as a view into what this rank holds of its parameter."""
        return self.strategy.matrix_view.cut(held)[self.index]


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """What the hyperparameters of a group make of its parameters, without their state.

    Args:
        structure: how the statistics of its matrices are kept.
        interval: steps between refreshes of a root.
        views: how each of its parameters is read; None is AdamW.
    """

    structure: Structure
    interval: int
    views: Mapping[Tensor, View | None]


class StackedParts(Protocol):
    """What a strategy knows of a bucket, see `asgo.optimizer.bucket.Bucket`."""

    all_parts: list[ParameterPart]
    parts: list[ParameterPart]
    view: View
    index: int
    shape: torch.Size
    dtype: torch.dtype
    state: State
    own: slice
    matrices_per_param: int
    matrix_shape: tuple[int, int]
    layout: Any

    def pieces(self, update: Stack | None) -> list[Tensor]:
        """The update of every part, in the shape of the part."""
        ...

    def write(
        self,
        written: Sequence[tuple[ParameterPart, Callable[[Tensor], Tensor]]],
        updates: Sequence[Tensor],
        decay: float | Tensor,
        rounding: Any,
    ) -> None:
        """Add updates to what this rank holds of parts."""
        ...


class Strategy:
    """Where a parameter lives and what ranks send each other for it. This one: a process that holds everything.

    The verbs of a step (`gather_gradients` to `scatter_updates`) start a collective and return a function that waits
    for it, or None. Subclasses are in `asgo.distributed.strategies`, one for each placement.

    Attributes:
        kind: its name.
        counts_all: whether every rank counts all entries of the parameter; else metrics are added up over ranks.
        shares_roots: whether one rank refreshes a root for all, by which other ranks go on at once.
        sums_statistics: whether this rank holds shards of matrices, whose statistics are summed over ranks.
        owner_keys: keys of the state that the owner of a matrix alone holds.
        ranks: the global ranks that have to do with the parameter, in order; none on one process.
        group_rank: this rank's place among them.
        view: through which this rank reads what it works on; None for AdamW.
    """

    kind: ClassVar[str] = "local"
    counts_all: ClassVar[bool] = True
    shares_roots: ClassVar[bool] = False
    sums_statistics: ClassVar[bool] = False
    owner_keys: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    group_rank: int = 0

    def __init__(self, view: View | None) -> None:
        self.view = view

    @property
    def matrix_view(self) -> View:
        """The view of a parameter that has one."""
        if self.view is None:
            raise ValueError("a parameter without a view has no matrices.")
        return self.view

    # ---- one parameter

    def held(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a parameter or of its gradient: all. It shares its memory."""
        return tensor

    def gradient(self, param: Tensor) -> Tensor:
        """What this rank holds of a gradient."""
        return param.grad  # pyright: ignore[reportReturnType]

    def entries(self, param: Tensor, tensor: Tensor) -> Tensor:
        """What this rank updates of a parameter without a view, or of a tensor like it, on the same memory."""
        return self.held(tensor)

    def worked_shape(self, param: Tensor) -> tuple[int, ...]:
        """The shape that this rank's view reads: of what it holds or, of an owner, of all of the parameter."""
        return tuple(self.held(param).shape)

    def stacks(self, param: Tensor) -> list[tuple[int, int, int]]:
        """``(b, m, n)`` of every part here: of whole matrices, even where this rank holds shards of them."""
        return self.matrix_view.shapes(self.worked_shape(param))

    def shards(self) -> int:
        """Into how many shards matrices are cut."""
        return 1

    def bucket_key(self, param: Tensor) -> tuple[object, ...]:
        """What the parts of one bucket have in common."""
        return self.kind, self.ranks

    def holds_state(self, owner: int | None) -> bool:
        """Whether this rank holds the state of a part with that owner."""
        return True

    @staticmethod
    def has_owners(structure: Any) -> bool:
        """Whether one rank refreshes the roots of a part, or does all of its work."""
        return False

    @staticmethod
    def owner_cost(structure: Any, shape: tuple[int, int, int]) -> float:
        """Multiplications that the owner of a stack ``(b, m, n)`` does, for the balance between ranks."""
        return 0.0

    def local_structure(self, structure: Any, m: int, n: int) -> Any:
        """The structure for what is here of ``m x n`` matrices."""
        return structure

    def initial(self, state: State, owner: int | None) -> State:
        """What this rank keeps of the fresh state of a part."""
        return state

    def keep_own(self, state: State, param: Tensor, owners: Sequence[int | None]) -> None:
        """Drop the state that other ranks keep from now on."""

    def export(self, state: State, param: Tensor, owners: Sequence[int | None]) -> State:
        """The state with the shapes of a single process, see `asgo.distributed.state_dict`."""
        return dict(state)

    # ---- a step of one bucket

    def gather_gradients(self, bucket: StackedParts) -> Wait | None:
        """Bring the gradients of this rank's parts here; no-op: they are local."""
        return None

    def gradients(self, bucket: StackedParts) -> list[Tensor]:
        """The gradients of this rank's parts, once `gather_gradients` has arrived."""
        return [part.of(part.strategy.gradient(part.param)) for part in bucket.parts]

    def reduce_norms(self, norms: Tensor) -> Wait | None:
        """All-reduce norms of shards to norms of matrices, in place; no-op: matrices are not sharded."""
        return None

    def reduce_statistics(self, bucket: StackedParts, statistic: Tensor) -> Wait | None:
        """Sum the statistics of the matrices `bucket.own` over shards, in place; no-op: there are no shards."""
        return None

    def broadcast_roots(self, bucket: StackedParts, due: Due, keys: Sequence[str]) -> Wait | None:
        """Send the roots due this step from their owners to all ranks; no-op: every root is computed here."""
        return None

    def broadcast_updates(self, bucket: StackedParts, update: Stack) -> Wait | None:
        """Send updates that owners have computed, with their state, to all ranks; no-op: each computes its own."""
        return None

    def all_norms(self, bucket: StackedParts, norms: Tensor) -> Tensor:
        """The norms ``(parts, matrices)`` of all matrices of every part, wherever they are; here: as given."""
        return norms

    def scatter_updates(
        self, bucket: StackedParts, update: Stack | None, decay: float | Tensor, rounding: Any
    ) -> Wait | None:
        """Multiply the parameters by `decay` and add the update, rounded once, on all ranks that hold entries."""
        bucket.write([(part, part.of) for part in bucket.parts], bucket.pieces(update), decay, rounding)
        return None

    # ---- a step of parameters without a view

    def all_agree(self, flags: Tensor, strategies: Sequence[Strategy]) -> Tensor:
        """The flags that hold on all ranks with entries of a parameter, one for each strategy."""
        return flags

    def exchange_entries(self, params: Sequence[Tensor], strategies: Sequence[Strategy]) -> list[Wait]:
        """Bring the entries that other ranks have updated here."""
        return []


@lru_cache(maxsize=4096)
def on_one_process(view: View | None) -> Strategy:
    """The strategy of a parameter that this process holds and steps by itself."""
    return Strategy(view)
