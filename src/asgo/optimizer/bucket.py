"""Equal-shaped stacks of different parameters, read and written as one stack.

The batch law makes this free: a structure gives a stack what it gives each matrix alone. The state of a bucket
is one tensor per key; what stands in ``optimizer.state[p]`` are views into it, so no state is copied per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.optimizer.root_retry import RootRetry
from asgo.optimizer.rounding import BITS, Rounding, add_rounded_, seed_of
from asgo.optimizer.state import state_dtype
from asgo.parts import Due, ParameterPart
from asgo.state_keys import part_key
from asgo.structures import Structure

BUCKET_BYTES = {"cpu": 20 * 2**20, "other": 2**28}
"""Size of a bucket's stack; what a step needs beside the state is a few times this. On a CPU larger temporaries would
be given back to the system and cleared anew every step (glibc's threshold is 32 MiB): ten times the cost of a pass;
of 5, 10, 20 and 32 MiB, 20 was the fastest for GPT-2's shapes."""


class Bucket:
    """Parts of parameters whose stacks have one shape ``(b, m, n)``, pattern, dtype, device and strategy.

    It stacks gradients and state, and takes updates apart; what ranks send each other is its strategy's.

    Args:
        all_parts: the parts, in the order in which their matrices stand in the bucket's stack.
        states: the states of their parameters; their tensors are rebound to views into the bucket's.
        keys: the keys of a part's state.

    Attributes:
        strategy: where the parameters live.
        parts: the parts whose momentum this rank holds.
        state: of `parts`, one tensor for each key.
        own: the matrices of which this rank holds the statistic.
        memory: their state.
        matrices_per_param: how many consecutive matrices of the stack belong to one parameter.
        matrix_numel: numel of one unsharded matrix.
        layout: what the strategy works out once for this bucket.
    """

    def __init__(self, all_parts: Sequence[ParameterPart], states: Sequence[State], keys: Sequence[str]) -> None:
        first, self.all_parts = all_parts[0], list(all_parts)
        self.strategy, self.index = first.strategy, first.index  # the others are read by the same pattern
        self.view = self.strategy.matrix_view
        self.parts = [part for part in all_parts if part.holds_state]
        like = torch.empty(self.strategy.worked_shape(first.param), device="meta")
        self.shape = self.view.cut(like)[self.index].shape
        self.matrices_per_param, m, n = self.strategy.stacks(first.param)[self.index]
        self.matrix_shape, self.matrix_numel = (m, n), m * n
        self.dtype = state_dtype(first.param)
        deferred = first.param.device.type != "cpu"
        self.root_retry = RootRetry(deferred, retries=not (deferred and self.strategy.shares_roots))
        self.state: State = {}
        self.layout: Any = None
        self._bound: list[tuple[State, str, Tensor]] = []
        self._states = {part.param: state for part, state in zip(all_parts, states, strict=True)}
        self._bind([state for part, state in zip(all_parts, states, strict=True) if part.holds_state], keys)
        self.own = self._own()
        self.memory = {key: x if key in self.strategy.owner_keys else x[self.own] for key, x in self.state.items()}

    def _bind(self, states: Sequence[State], keys: Sequence[str]) -> None:
        """Put the tensors of the states side by side, and views into the result in their place."""
        for key in keys if states else ():
            names = [part_key(key, part.index) for part in self.parts]
            tensors = [state[name] for state, name in zip(states, names, strict=True)]
            self.state[key] = self._joined(tensors) if key == "exp_avg" else _cat(tensors)
            pieces = self.state[key].split([len(tensor) for tensor in tensors])
            for state, name, rows in zip(states, names, pieces, strict=True):
                state[name] = rows
                self._bound.append((state, name, rows))

    def _own(self) -> slice:
        if not self.strategy.sums_statistics:
            return slice(None)
        own = [i for i, part in enumerate(self.all_parts) if part.is_owner]  # side by side, as `make_buckets` sorts
        start = own[0] if own else 0
        return slice(start * self.matrices_per_param, (start + len(own)) * self.matrices_per_param)

    def is_bound(self, states: Mapping[Tensor, State]) -> bool:
        """Whether the states still hold this bucket's tensors; not after user code has replaced one."""
        is_here = all(states.get(param) is state for param, state in self._states.items())
        return is_here and all(state.get(name) is rows for state, name, rows in self._bound)

    def release(self) -> None:
        """Give the states that still hold views into this bucket memory of their own, once it is no longer used."""
        for state, name, rows in self._bound:
            if state.get(name) is rows:
                state[name] = compact(rows)

    def gradients(self) -> Stack:
        """The gradients of the parts as one stack: a copy, but for a single part of the state's dtype."""
        return self.view.stack_all(self.index, self.strategy.gradients(self)).to(self.dtype)

    def whole_norms(self, norms: Tensor) -> Tensor:
        """Norms ``(b, 1, 1)`` of matrices from norms of this rank's shards; a collective, every rank calls it."""
        wait = self.strategy.reduce_norms(norms)
        if wait is not None:
            wait()
        return norms

    def all_norms(self, norms: Tensor) -> Tensor:
        """Norms ``(parameters, matrices)`` of all matrices of each parameter, from norms of those on this rank."""
        return self.strategy.all_norms(self, norms)

    def due_rows(self, due: Due) -> list[slice]:
        """The runs of matrices, in `own`, that this rank refreshes and that are due, as few and long as possible."""
        runs: list[slice] = []
        for i, part in enumerate(self.parts):
            start, stop = (j * self.matrices_per_param - (self.own.start or 0) for j in (i, i + 1))
            if not (part.is_owner and due(part)):
                continue
            if runs and runs[-1].stop == start:
                start = runs.pop().start
            runs.append(slice(start, stop))
        return runs

    def write(
        self,
        written: Sequence[tuple[ParameterPart, Callable[[Tensor], Tensor]]],
        updates: Sequence[Tensor],
        decay: float | Tensor,
        rounding: Rounding,
    ) -> None:
        """Multiply entries of parameters by `decay`, then add updates to them, in place and rounded once.

        Args:
            written: parts, each with a function that selects the entries to update from what this rank holds.
            updates: one for each of them.
            decay: a factor for the entries.
            rounding: see `asgo.optimizer.rounding`.
        """
        if not written:
            return
        # Detached: a graph that breaks here would meet views of leaves, which it cannot take up again.
        targets = [select(part.strategy.held(part.param.detach())) for part, select in written]
        residuals = seeds = None
        if rounding == "compensated" and targets[0].dtype in BITS:
            residuals = [select(self._states[part.param]["residual"]) for part, select in written]
        elif rounding == "stochastic":
            seeds = [seed_of(self._states[part.param]["step"], part.place) for part, _ in written]
        add_rounded_(targets, decay, updates, rounding if residuals or seeds else "nearest", residuals, seeds)

    def pieces(self, update: Stack | None) -> list[Tensor]:
        """The update of every part, in the shape of the part."""
        if update is None:
            return []
        return list(self.view.unstack_all(self.index, update, self.shape, len(self.parts)))

    def _joined(self, momenta: list[Tensor]) -> Stack:
        """Momenta in the memory order that gradients will have, so that both run along memory together."""
        parts = [self.view.unstack(self.index, momentum, self.shape) for momentum in momenta]
        return compact(momenta[0]) if len(parts) == 1 else self.view.stack_all(self.index, parts)


def compact(tensor: Tensor) -> Tensor:
    """The tensor itself if it is all of its memory, else a copy in the same order of memory."""
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone()


def _cat(tensors: list[Tensor]) -> Tensor:
    return compact(tensors[0]) if len(tensors) == 1 else torch.cat(tensors)


def make_buckets(parts: Sequence[ParameterPart], structure: Structure, states: Mapping[Tensor, State]) -> list[Bucket]:
    """Sort parts of parameters into buckets of one shape, pattern, dtype and device, alike on all ranks.

    A bucket's stack has at most `BUCKET_BYTES`, or one part. Parts of one refresh phase are adjacent, and so
    are parts of one owner. With owners, every bucket has parts of each, so that no rank waits for another's bucket.
    """
    sorts: dict[tuple[Any, ...], list[ParameterPart]] = {}
    for part in parts:
        param, shape = part.param, tuple(part.param.shape)
        stack = part.view.shapes(shape)[part.index]
        if 0 not in stack:
            piece = tuple(part.view.cut(torch.empty(shape, device="meta"))[part.index].shape)
            pattern = part.view.pattern_of(part.index)
            key = (stack, pattern, piece, state_dtype(param), param.device, *part.strategy.bucket_key(param))
            sorts.setdefault(key, []).append(part)
    keys = ["exp_avg", *structure.init(torch.empty(1, 1, 1)), "failures"]
    buckets = []
    for (stack, *_), alike in sorts.items():
        for some in _batches(alike, -(-math.prod(stack) // alike[0].strategy.shards())):
            buckets.append(Bucket(some, [states[part.param] for part in some], keys))
    return buckets


def _batches(parts: list[ParameterPart], numel: int) -> list[list[ParameterPart]]:
    """Split a list of parts as evenly as possible into buckets of at most `BUCKET_BYTES`."""
    param = parts[0].param
    limit = BUCKET_BYTES.get(param.device.type, BUCKET_BYTES["other"])
    most = max(1, limit // (numel * state_dtype(param).itemsize))
    count = -(-len(parts) // most)
    parts = sorted(parts, key=lambda part: (-1 if part.owner is None else part.owner, part.refresh_phase))
    if parts[0].owner is not None:
        return [parts[i::count] for i in range(count)]
    return [parts[len(parts) * i // count : len(parts) * (i + 1) // count] for i in range(count)]
