"""Symmetric state as triangles: half the memory of every statistic and root."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from asgo._types import Stack, State
from asgo.linalg.masked import where
from asgo.linalg.packed_symmetric import pack, size, unpack
from asgo.structures.base import Axis, Structure


@dataclass(frozen=True)
class Packed(Structure):
    """Another structure, its symmetric matrices kept as triangles ``(b, k + 1, k / 2)``, see
    `asgo.linalg.packed_symmetric`.

    Nothing is rounded: a statistic is the same to the bit, and so is a root that is computed symmetric, as every
    root by eigendecomposition is. Of another ("minimax") the mean with its transpose is kept; one triangle alone would
    be far off. Matrices are whole only while they are used, one bucket at a time.

    State: the inner structure's, its `symmetric` keys packed.

    Args:
        inner: the structure.
    """

    inner: Structure

    def is_shard_additive(self, axis: Axis, m: int, n: int) -> bool:
        """The inner structure's: packing does not change which statistics add up."""
        return self.inner.is_shard_additive(axis, m, n)

    def with_side_of(self, m: int, n: int) -> Packed:
        """The inner structure with its side fixed, packed."""
        return Packed(self.inner.with_side_of(m, n))

    @property
    def sharded_keys(self) -> tuple[str, ...]:
        """The inner structure's keys: they are not symmetric, so not packed."""
        return self.inner.sharded_keys

    @property
    def added(self) -> Mapping[str, float]:
        """The inner structure's keys and values."""
        return self.inner.added

    @property
    def root_keys(self) -> tuple[str, ...]:
        """The inner structure's keys; ranks send the triangles."""
        return self.inner.root_keys

    def init(self, like: Stack) -> State:
        """The inner structure's state, packed."""
        state = self.inner.init(like)
        return {key: pack(tensor) if key in self.inner.symmetric else tensor for key, tensor in state.items()}

    def compute_statistic(self, grad: Stack) -> Tensor:
        """The inner structure's statistic, packed if it is averaged entry by entry."""
        seen = self.inner.compute_statistic(grad)
        return pack(seen) if self.inner.linear_statistic else seen

    def update_statistic(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Update the triangles where the statistic is linear, else unpack, update and pack."""
        if self.inner.linear_statistic:
            self.inner.update_statistic(state, measurement, beta2)
            return
        whole = self.whole(state, self._memory())
        self.inner.update_statistic(whole, measurement, beta2)
        for key in self._memory():
            state[key].copy_(pack(whole[key]))

    def compute_root(self, state: State) -> Tensor:
        """Compute the inner structure's roots; the mean of each with its transpose is stored."""
        memory, roots = self._memory(), self._roots()
        fresh = {key: _blank(state[key]) for key in roots}  # its last root is kept here, not there
        ok = self.inner.compute_root(self.whole(state, memory) | fresh)
        for key in roots:
            new = pack(fresh[key]).lerp_(pack(fresh[key].mT), 0.5)
            state[key].copy_(where(ok.view(-1, *[1] * (new.ndim - 1)), new, state[key]))
        return ok

    def retried(self) -> Packed | None:
        """The inner structure with a more exact root, packed; None if it has none."""
        inner = self.inner.retried()
        return None if inner is None else Packed(inner)

    def precondition(self, state: State, direction: Stack) -> Stack:
        """Unpack the roots and precondition with the inner structure."""
        return self.inner.precondition(self.whole(state, self._roots()), direction)

    def precondition_shard(self, state: State, direction: Stack, whole: Callable[[Tensor], Tensor]) -> Stack:
        """Unpack the roots and precondition shards with the inner structure."""
        return self.inner.precondition_shard(self.whole(state, self._roots()), direction, whole)

    def converted(self, state: State) -> State:
        """The state that the inner structure converts to, packed."""
        found = self.inner.converted(state)
        if found is state:
            return state
        return {key: pack(x) if key in self.inner.symmetric else x for key, x in found.items()}

    def root_flops(self, m: int, n: int) -> float:
        """The inner structure's: packing multiplies nothing."""
        return self.inner.root_flops(m, n)

    def step_flops(self, m: int, n: int) -> float:
        """The inner structure's: packing multiplies nothing."""
        return self.inner.step_flops(m, n)

    def whole(self, state: State, keys: Iterable[str]) -> State:
        """The state with some of its packed matrices whole, in memory of their own."""
        return state | {key: unpack(state[key]) for key in keys}

    def _memory(self) -> list[str]:
        return [key for key in self.inner.symmetric if key not in self.root_keys]

    def _roots(self) -> list[str]:
        return [key for key in self.inner.symmetric if key in self.root_keys]


def _blank(P: Tensor) -> Tensor:
    k = size(P)
    return P.new_empty(*P.shape[:-2], k, k)


def opened(structure: Structure, state: State) -> tuple[Structure, State]:
    """The structure inside and its state with whole matrices; both as they are where nothing is packed."""
    if not isinstance(structure, Packed):
        return structure, state
    return structure.inner, structure.whole(state, structure.inner.symmetric)


def packed_if(wanted: bool, structure: Structure) -> Structure:
    """The structure, `Packed` if that is wanted."""
    return Packed(structure) if wanted else structure
