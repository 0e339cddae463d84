"""Equal-shaped stacks of different parameters, read and written as one stack.

The batch law makes this free: a structure gives a stack what it gives each matrix alone. The state of a bucket
is one tensor per key; what stands in ``optimizer.state[p]`` are views into it, so nothing is copied per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.structures import Structure
from asgo.views import View


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
    """Parts of parameters whose stacks have one shape ``(b, m, n)``, dtype and device.

    Args:
        view: the view through which all members are read.
        slices: ``b``, the number of matrices of each member.
        members: in the order in which their matrices stand in the bucket's stack.
        states: the states of the members' parameters; their tensors are rebound to views into the bucket's.
        keys: the keys of the structure's state.
    """

    def __init__(
        self, view: View, slices: int, members: Sequence[Member], states: Sequence[State], keys: Sequence[str]
    ) -> None:
        self.view, self.slices, self.members = view, slices, list(members)
        self.state: State = {}
        self._bound: list[tuple[State, str, Tensor]] = []
        for key in keys:
            names = [part_key(key, member.part) for member in members]
            tensors = [state[name] for state, name in zip(states, names, strict=True)]
            self.state[key] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            for state, name, rows in zip(states, names, self.state[key].split(slices), strict=True):
                state[name] = rows
                self._bound.append((state, name, rows))

    def is_bound(self) -> bool:
        """Whether the states still hold this bucket's tensors: false once somebody put others there."""
        return all(state.get(name) is rows for state, name, rows in self._bound)

    def gather(self, tensor_of: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Stack:
        """A new stack of what `tensor_of` gives for each member's parameter."""
        return torch.cat([self.view.stack(m.part, self._part(m, tensor_of)).to(dtype) for m in self.members])

    def scatter(self, stack: Stack, tensor_of: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pairs of (target, source): each member's part of `tensor_of`, and its rows of `stack` in that shape."""
        targets = [self._part(member, tensor_of) for member in self.members]
        rows = zip(self.members, targets, stack.split(self.slices), strict=True)
        return targets, [self.view.unstack(member.part, part, target.shape) for member, target, part in rows]

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

    def _part(self, member: Member, tensor_of: Callable[[Tensor], Tensor]) -> Tensor:
        return self.view.cut(tensor_of(member.param))[member.part]


def init_state(param: Tensor, view: View, structure: Structure) -> State:
    """The state of a parameter before its first step: momentum in its own shape, the rest per part."""
    dtype = state_dtype(param)
    state = {"exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}
    for part, stack in enumerate(view.matrices(state["exp_avg"])):
        own = structure.init(stack) | {"failures": torch.zeros(stack.shape[0], dtype=torch.int64, device=param.device)}
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
    """Sort the parts of parameters with gradients into buckets of one shape, dtype and device."""
    groups: dict[tuple[object, ...], list[tuple[Member, State]]] = {}
    for param, state in zip(params, states, strict=True):
        for part, shape in enumerate(view.shapes(param.shape)):
            if 0 not in shape:
                key = (shape, state_dtype(param), param.device)
                groups.setdefault(key, []).append((Member(param, part, turn_of[param, part]), state))
    keys = [*structure.init(torch.empty(1, 1, 1)), "failures"]
    return [
        Bucket(view, key[0][0], [m for m, _ in pairs], [s for _, s in pairs], keys)  # pyright: ignore[reportIndexIssue]
        for key, pairs in groups.items()
    ]
