"""Equal-shaped stacks of different parameters, read and written as one stack.

The batch law makes this free: a structure gives a stack what it gives each matrix alone. The state of a bucket
is one tensor per key; what stands in ``optimizer.state[p]`` are views into it, so no state is copied per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.distributed.collectives import Wait
from asgo.distributed.placement import Placement, gradient, holds_state, local
from asgo.optimizer.root_retry import RootRetry
from asgo.optimizer.rounding import BITS, Rounding, add_rounded_, seed_of
from asgo.optimizer.state import state_dtype
from asgo.state_keys import part_key
from asgo.structures import Structure
from asgo.views import View

BUCKET_BYTES = {"cpu": 20 * 2**20, "other": 2**28}
"""Size of a bucket's stack; what a step needs beside the state is a few times this. On a CPU larger temporaries would
be given back to the system and cleared anew every step (glibc's threshold is 32 MiB): ten times the cost of a pass;
of 5, 10, 20 and 32 MiB, 20 was the fastest for GPT-2's shapes."""


@dataclass(frozen=True, eq=False)
class Member:
    """One part of one parameter.

    Args:
        param: the parameter.
        view: through which all of it is read.
        part: the number of the part.
        refresh_phase: the step (modulo the refresh interval) on which its turn comes.
        placement: where the parameter's entries are.
        owner: the place in the placement's ranks of the one that refreshes its roots; None: all do.
        place: a number that the same part has on all ranks and no other part has, for random numbers.
    """

    param: Tensor
    view: View
    part: int
    refresh_phase: int
    placement: Placement
    owner: int | None
    place: int = 0

    @property
    def is_owner(self) -> bool:
        """Whether this rank refreshes its roots."""
        return self.owner is None or self.owner == self.placement.group_rank


class Bucket:
    """Parts of parameters whose stacks have one shape ``(b, m, n)``, pattern, dtype and device.

    What travels between ranks begins in `gather`, `join`, `sum`, `share`, `bring` and `add`; each answers how to wait
    for it, or None.

    Args:
        all_parts: the parts, in the order in which their matrices stand in the bucket's stack.
        states: the states of their parameters; their tensors are rebound to views into the bucket's.
        keys: the keys of a part's state.

    Attributes:
        slices: how many consecutive matrices of the stack belong to one parameter.
        entries: of a whole matrix; here may be a shard of it.
        own: the matrices of which this rank has the memory.
        memory: the state of those.
    """

    def __init__(self, all_parts: Sequence[Member], states: Sequence[State], keys: Sequence[str]) -> None:
        first, self.all_parts = all_parts[0], list(all_parts)
        self.part, self.placement = first.part, first.placement  # the others are read by the same pattern
        self.view: View = first.placement.view  # pyright: ignore[reportAttributeAccessIssue]
        self.members = [member for member in all_parts if holds_state(member.placement, member.owner)]
        whole = (
            tuple(first.param.shape) if first.placement.kind == "owner_computes" else tuple(local(first.param).shape)
        )
        self.shape = self.view.cut(torch.empty(whole, device="meta"))[self.part].shape  # all have the same
        self.slices, m, n = self.view.shapes(first.param.shape if first.placement.cut else whole)[self.part]
        self.entries, self.own = m * n, slice(None)
        self.dtype = state_dtype(first.param)
        self.root_retry = RootRetry(deferred=first.param.device.type != "cpu")
        self.state: State = {}
        self._bound: list[tuple[State, str, Tensor]] = []
        self._states = {member.param: state for member, state in zip(all_parts, states, strict=True)}
        kept = [state for m, state in zip(all_parts, states, strict=True) if holds_state(m.placement, m.owner)]
        for key in keys if kept else ():
            names = [part_key(key, member.part) for member in self.members]
            tensors = [state[name] for state, name in zip(kept, names, strict=True)]
            self.state[key] = self._joined(tensors) if key == "exp_avg" else _cat(tensors)
            pieces = self.state[key].split([len(tensor) for tensor in tensors])
            for state, name, rows in zip(kept, names, pieces, strict=True):
                state[name] = rows
                self._bound.append((state, name, rows))
        self.memory = self.state

    def is_bound(self, states: Mapping[Tensor, State]) -> bool:
        """Whether the states still hold this bucket's tensors: false once somebody put others there."""
        is_here = all(states.get(param) is state for param, state in self._states.items())
        return is_here and all(state.get(name) is rows for state, name, rows in self._bound)

    def release(self) -> None:
        """Give the states that still hold views into this bucket memory of their own, once it is no longer used."""
        for state, name, rows in self._bound:
            if state.get(name) is rows:
                state[name] = compact(rows)

    def gather(self) -> Wait | None:
        """Start to bring the gradients of the members here: they are."""
        return None

    def gradients(self) -> Stack:
        """The members' gradients as one stack: a copy, but for a single member of the state's dtype."""
        return self.view.stack_all(self.part, self._parts([gradient(m.param) for m in self.members])).to(self.dtype)

    def with_side_of(self, structure: Structure) -> Structure:
        """The structure for what is here of the matrices: all."""
        return structure

    def join(self, norms: Tensor) -> Wait | None:
        """Start to make the norms ``(b, 1, 1)`` of what is here those of whole matrices, in place: they are."""
        return None

    def whole(self, norms: Tensor) -> Tensor:
        """The norms of whole matrices, once they are here."""
        wait = self.join(norms)
        if wait is not None:
            wait()
        return norms

    def sum(self, measurement: Tensor) -> Wait | None:
        """Start to add up the measurements of shards of matrices, those of `own`, in place: there are no shards."""
        return None

    def precondition(self, structure: Structure, direction: Stack) -> Stack:
        """The direction rescaled."""
        return structure.precondition(self.state, direction)

    def rows(self, due: Callable[[Member], bool]) -> list[slice]:
        """The runs of matrices, in `own`, that this rank refreshes and that are due, as few and long as possible."""
        runs: list[slice] = []
        for i, member in enumerate(self.members):
            start, stop = (j * self.slices - (self.own.start or 0) for j in (i, i + 1))
            if not (member.is_owner and due(member)):
                continue
            if runs and runs[-1].stop == start:
                start = runs.pop().start
            runs.append(slice(start, stop))
        return runs

    def share(self, due: Callable[[Member], bool], keys: Sequence[str]) -> Wait | None:
        """Start to bring what other ranks have refreshed here: nothing."""
        return None

    def bring(self, update: Stack) -> Wait | None:
        """Start to bring updates here that other ranks have computed, with what they remember: nothing."""
        return None

    def everywhere(self, norms: Tensor) -> Tensor:
        """The norms ``(members, slices)`` of all matrices of every member, wherever they are."""
        return norms

    def add(self, update: Stack | None, decay: float | Tensor, rounding: Rounding) -> Wait | None:
        """Multiply the members by `decay`, then add the update to them, in place and rounded once."""
        written = [(member, partial(part_of, member)) for member in self.members]
        self.write(written, self._pieces(update), decay, rounding)
        return None

    def write(
        self,
        written: Sequence[tuple[Member, Callable[[Tensor], Tensor]]],
        updates: Sequence[Tensor],
        decay: float | Tensor,
        rounding: Rounding,
    ) -> None:
        """Bring updates into what this rank holds of members.

        Args:
            written: members, each with what takes the part to update out of what this rank holds of its parameter.
            updates: one for each of them.
            decay: by which the members are multiplied first.
            rounding: see `asgo.optimizer.rounding`.
        """
        if not written:
            return
        # Detached: a graph that breaks here would meet views of leaves, which it cannot take up again.
        targets = [cut(local(member.param.detach())) for member, cut in written]
        residuals = seeds = None
        if rounding == "compensated" and targets[0].dtype in BITS:
            residuals = [cut(self._states[member.param]["residual"]) for member, cut in written]
        elif rounding == "stochastic":
            seeds = [seed_of(self._states[member.param]["step"], member.place) for member, _ in written]
        add_rounded_(targets, decay, updates, rounding if residuals or seeds else "nearest", residuals, seeds)

    def _pieces(self, update: Stack | None) -> list[Tensor]:
        """The update of every member, in the shape of its part."""
        if update is None:
            return []
        return list(self.view.unstack_all(self.part, update, self.shape, len(self.members)))

    def _parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [part_of(member, x) for x, member in zip(tensors, self.members, strict=True)]

    def _joined(self, momenta: list[Tensor]) -> Stack:
        """Momenta in the memory order that gradients will have, so that both run along memory together."""
        parts = [self.view.unstack(self.part, momentum, self.shape) for momentum in momenta]
        return compact(momenta[0]) if len(parts) == 1 else self.view.stack_all(self.part, parts)


def view_here(member: Member) -> View:
    """Through which what this rank holds of a member's parameter is read."""
    return member.placement.view  # pyright: ignore[reportReturnType]


def part_of(member: Member, held: Tensor) -> Tensor:
    """The part of a member, as a view into what this rank holds of its parameter."""
    return view_here(member).cut(held)[member.part]


def compact(tensor: Tensor) -> Tensor:
    """The tensor itself if it is all of its memory, else a copy in the same order of memory."""
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone()


def _cat(tensors: list[Tensor]) -> Tensor:
    return compact(tensors[0]) if len(tensors) == 1 else torch.cat(tensors)


def make_buckets(
    members: Sequence[Member],
    structure: Structure,
    states: Mapping[Tensor, State],
    kinds: Mapping[str, type[Bucket]],
) -> list[Bucket]:
    """Sort parts of parameters into buckets of one shape, pattern, dtype and device, alike on all ranks.

    A bucket's stack has at most `BUCKET_BYTES`, or one member. Members of one turn stand side by side; those of one
    owner too, and then every bucket has some of each owner, so that no rank waits for another's bucket.
    """
    sorts: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        param, where, shape = member.param, member.placement, tuple(member.param.shape)
        stack = member.view.shapes(shape)[member.part]
        if 0 not in stack:
            piece = tuple(member.view.cut(torch.empty(shape, device="meta"))[member.part].shape)
            pattern = member.view.pattern_of(member.part)
            key = (stack, pattern, piece, state_dtype(param), param.device, where.kind, where.ranks)
            if where.ranks:
                key = (*key, param.dtype, where.boxes if where.kind in ("whole_slices", "partial_sums") else ())
            sorts.setdefault(key, []).append(member)
    keys = ["exp_avg", *structure.init(torch.empty(1, 1, 1)), "failures"]
    buckets = []
    for (stack, *_), alike in sorts.items():
        shards = 1 if alike[0].placement.cut is None else len(alike[0].placement.cut.ranks)
        for some in _batches(alike, -(-math.prod(stack) // shards)):
            buckets.append(kinds[some[0].placement.kind](some, [states[member.param] for member in some], keys))
    return buckets


def _batches(members: list[Member], numel: int) -> list[list[Member]]:
    """As even as possible, each within `BUCKET_BYTES`."""
    param = members[0].param
    limit = BUCKET_BYTES.get(param.device.type, BUCKET_BYTES["other"])
    most = max(1, limit // (numel * state_dtype(param).itemsize))
    count = -(-len(members) // most)
    members = sorted(members, key=lambda member: (-1 if member.owner is None else member.owner, member.refresh_phase))
    if members[0].owner is not None:
        return [members[i::count] for i in range(count)]
    return [members[len(members) * i // count : len(members) * (i + 1) // count] for i in range(count)]
