"""Equal-shaped stacks of different parameters, read and written as one stack.

The batch law makes this free: a structure gives a stack what it gives each matrix alone. The state of a bucket
is one tensor per key; what stands in ``optimizer.state[p]`` are views into it, so no state is copied per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.ladder import Ladder
from asgo.structures import Structure
from asgo.views import View

BUCKET_BYTES = {"cpu": 20 * 2**20, "other": 2**28}
"""Size of a bucket's stack; what a step needs beside the state is a few times this. On a CPU larger temporaries would
be given back to the system and cleared anew every step (glibc's threshold is 32 MiB): ten times the cost of a pass;
of 5, 10, 20 and 32 MiB, 20 was the fastest for GPT-2's shapes."""


def state_dtype(param: Tensor) -> torch.dtype:
    """The precision of a parameter's state: float64 for float64, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def part_key(key: str, part: int) -> str:
    """The name in ``optimizer.state[p]`` of a key of one part: bare for the first, ``gram.1`` for the second."""
    return key if part == 0 else f"{key}.{part}"


@dataclass(frozen=True)
class Member:
    """One part of one parameter, and the step (modulo the refresh interval) on which its turn comes."""

    param: Tensor
    part: int
    turn: int


class Bucket:
    """Parts of parameters whose stacks have one shape ``(b, m, n)``, pattern, dtype and device.

    Args:
        view: the view through which all members are read.
        slices: ``b``, the number of matrices of each member.
        members: in the order in which their matrices stand in the bucket's stack.
        states: the states of the members' parameters; their tensors are rebound to views into the bucket's.
        keys: the keys of a part's state.
    """

    def __init__(
        self, view: View, slices: int, members: Sequence[Member], states: Sequence[State], keys: Sequence[str]
    ) -> None:
        self.view, self.slices, self.members = view, slices, list(members)
        self.part = self.members[0].part  # the others are read by the same pattern
        self.shape = view.cut(self.members[0].param)[self.part].shape
        self.ladder = Ladder(deferred=self.members[0].param.device.type != "cpu")
        self.state: State = {}
        self._bound: list[tuple[State, str, Tensor]] = []
        for key in keys:
            names = [part_key(key, member.part) for member in members]
            tensors = [state[name] for state, name in zip(states, names, strict=True)]
            self.state[key] = self._joined(tensors) if key == "exp_avg" else _cat(tensors)
            for state, name, rows in zip(states, names, self.state[key].split(slices), strict=True):
                state[name] = rows
                self._bound.append((state, name, rows))

    def is_bound(self) -> bool:
        """Whether the states still hold this bucket's tensors: false once somebody put others there."""
        return all(state.get(name) is rows for state, name, rows in self._bound)

    def gradients(self, dtype: torch.dtype) -> Stack:
        """The members' gradients as one stack: a copy, but for a single member of that dtype."""
        return self.view.stack_all(self.part, self._parts([m.param.grad for m in self.members])).to(dtype)  # pyright: ignore[reportArgumentType]

    def add(self, update: Stack, decay: float | Tensor) -> None:
        """Multiply the members by `decay`, then add the update to them, in place."""
        # Detached: a graph that breaks here would meet views of leaves, which it cannot take up again.
        targets = self._parts([member.param.detach() for member in self.members])
        torch._foreach_mul_(targets, decay)
        sources = self.view.unstack_all(self.part, update, self.shape, len(targets))
        torch._foreach_add_(targets, list(sources))

    def rows(self, due: Callable[[Member], bool]) -> list[slice]:
        """The runs of matrices whose members are due, as few and long as possible."""
        runs: list[slice] = []
        for i, member in enumerate(self.members):
            start, stop = i * self.slices, (i + 1) * self.slices
            if not due(member):
                continue
            if runs and runs[-1].stop == start:
                start = runs.pop().start
            runs.append(slice(start, stop))
        return runs

    def _parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.view.cut(x)[m.part] for x, m in zip(tensors, self.members, strict=True)]

    def _joined(self, momenta: list[Tensor]) -> Stack:
        """Momenta in the memory order that gradients will have, so that both run along memory together."""
        parts = [self.view.unstack(self.part, momentum, self.shape) for momentum in momenta]
        return momenta[0] if len(parts) == 1 else self.view.stack_all(self.part, parts)


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def init_state(param: Tensor, view: View, structure: Structure) -> State:
    """The state of a parameter before its first step, part by part: momentum, the structure's own, failures."""
    dtype, state = state_dtype(param), {}
    for part, piece in enumerate(view.cut(param)):
        momentum = view.stack(part, torch.zeros(piece.shape, dtype=dtype, device=param.device))
        own = {"exp_avg": momentum} | structure.init(momentum)
        own["failures"] = torch.zeros(len(momentum), dtype=torch.int64, device=param.device)
        state |= {part_key(key, part): tensor for key, tensor in own.items()}
    return state


def turns(costs: Sequence[float], interval: int) -> list[int]:
    """A step in ``[0, interval)`` for each cost so that all steps carry about the same (greedy, dearest first)."""
    load = [0.0] * interval
    result = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        result[i] = load.index(min(load))
        load[result[i]] += costs[i]
    return result


def make_buckets(
    params: Sequence[Tensor],
    states: Sequence[State],
    view: View,
    structure: Structure,
    turn_of: dict[tuple[Tensor, int], int],
) -> list[Bucket]:
    """Sort the parts of parameters with gradients into buckets of one shape, pattern, dtype and device.

    A bucket's stack has at most `BUCKET_BYTES`, or one member. Members of one turn stand side by side.
    """
    kinds: dict[tuple[object, ...], list[tuple[Member, State]]] = {}
    for param, state in zip(params, states, strict=True):
        for part, (piece, shape) in enumerate(zip(view.cut(param), view.shapes(param.shape), strict=True)):
            if 0 not in shape:
                key = (shape, view.pattern_of(part), piece.shape, state_dtype(param), param.device)
                kinds.setdefault(key, []).append((Member(param, part, turn_of[param, part]), state))
    keys = ["exp_avg", *structure.init(torch.empty(1, 1, 1)), "failures"]
    buckets = []
    for pairs in kinds.values():
        pairs.sort(key=lambda pair: pair[0].turn)
        stack = view.shapes(pairs[0][0].param.shape)[pairs[0][0].part]
        for some in _batches(pairs, math.prod(stack)):
            buckets.append(Bucket(view, stack[0], [m for m, _ in some], [s for _, s in some], keys))
    return buckets


def _batches(pairs: list[tuple[Member, State]], numel: int) -> list[list[tuple[Member, State]]]:
    """As even as possible, each within `BUCKET_BYTES`."""
    param = pairs[0][0].param
    limit = BUCKET_BYTES.get(param.device.type, BUCKET_BYTES["other"])
    most = max(1, limit // (numel * state_dtype(param).itemsize))
    count = -(-len(pairs) // most)
    return [pairs[len(pairs) * i // count : len(pairs) * (i + 1) // count] for i in range(count)]
