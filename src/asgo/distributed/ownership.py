"""Who works on what: owners by balanced cost, and what all ranks do with parameters that have no view."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from asgo._types import State
from asgo.distributed.collectives import Wait, all_to_all, register_group
from asgo.distributed.placement import Placement, find, holds_state, local, replicated, whole, within
from asgo.distributed.summing import summed
from asgo.optimizer.bucket import Member
from asgo.structures import OneCall, Structure
from asgo.views import View

ROOT_PRODUCTS = 20.0
"""Products of k x k matrices that a root counts for beside an owner's other work; only the balance depends on it."""


@dataclass(frozen=True)
class WorkItem:
    """One part of one parameter, as a piece of work.

    Args:
        cost: of all its matrices.
        ranks: who may own it.
        refresh_phase: the interval of its roots and the step on which they are due.
        owner: the place of its owner among the ranks; None: not chosen yet.
    """

    cost: float
    ranks: tuple[int, ...]
    refresh_phase: tuple[int, int]
    owner: int | None = None


def owner_cost(structure: Structure, kind: str, shape: tuple[int, int, int]) -> float:
    """What an owner does for a stack ``(b, m, n)``: its roots, and all the rest where the state is the owner's too."""
    b, m, n = shape
    if kind in ("root_sharing", "partial_sums"):
        return b * structure.root_flops(m, n) * (1 if kind == "root_sharing" else ROOT_PRODUCTS)
    return b * (ROOT_PRODUCTS * structure.root_flops(m, n) + structure.step_flops(m, n) + m * n)


def owners(units: Sequence[WorkItem]) -> list[int]:
    """An owner for each unit: the dearest first, each to the rank that has least to do on its turn, then in all.

    Those that have an owner keep it.
    """
    load: dict[Hashable, list[float]] = {}

    def loads(unit: WorkItem) -> list[list[float]]:
        return [
            load.setdefault(key, [0.0] * len(unit.ranks))
            for key in ((unit.ranks, unit.refresh_phase), (unit.ranks, None))
        ]

    chosen = [-1 if unit.owner is None else unit.owner for unit in units]
    for i in sorted(range(len(units)), key=lambda i: (units[i].owner is None, -units[i].cost)):
        on_turn, in_all = loads(units[i])
        if chosen[i] < 0:
            chosen[i] = min(range(len(in_all)), key=lambda rank: (on_turn[rank], in_all[rank]))
        for each in (on_turn, in_all):
            each[chosen[i]] += units[i].cost
    return chosen


def exchange_rows(params: Sequence[Tensor], placements: Sequence[Placement]) -> list[Wait]:
    """Start to bring the rows that other ranks have updated here, of parameters that all ranks hold whole."""
    sorts: dict[tuple[object, ...], list[tuple[Tensor, Placement]]] = {}
    for param, placement in zip(params, placements, strict=True):
        if placement.rows:
            key = (placement.ranks, param.dtype, param.device)
            sorts.setdefault(key, []).append((local(param.detach()), placement))
    waits = []
    for alike in sorts.values():
        like, where = alike[0]
        rows = [
            [param[within(placement.boxes[rank], whole(param))] for param, placement in alike]
            for rank in range(len(where.ranks))
        ]
        outgoing = [rows[where.group_rank] if rank != where.group_rank else [] for rank in range(len(where.ranks))]
        rows[where.group_rank] = []
        waits.append(all_to_all(where.ranks, where.group_rank, outgoing, rows, like))
    return waits


def balanced_phases(costs: Sequence[float], interval: int) -> list[int]:
    """A step in ``[0, interval)`` for each cost so that all steps carry about the same (greedy, dearest first)."""
    load = [0.0] * interval
    result = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        result[i] = load.index(min(load))
        load[result[i]] += costs[i]
    return result


def refresh_phases(
    groups: Sequence[dict[str, Any]],
    views: Mapping[Tensor, View | None],
    structure_of: Callable[[dict[str, Any]], Structure],
) -> dict[tuple[Tensor, int], int]:
    """The step, modulo the refresh interval of its group, of every part of all parameters: so that steps cost alike."""
    costs: dict[int, dict[tuple[Tensor, int], float]] = {}
    for group in groups:
        structure, of_interval = structure_of(group), costs.setdefault(group["precondition_frequency"], {})
        for param in group["params"]:
            view = views[param]
            for part, (b, m, n) in enumerate(() if view is None else view.shapes(param.shape)):
                of_interval[param, part] = b * structure.root_flops(m, n)
    found: dict[tuple[Tensor, int], int] = {}
    for interval, alike in costs.items():
        found |= dict(zip(alike, balanced_phases(list(alike.values()), interval), strict=True))
    return found


class WorkPartition:
    """Which rank does what for the parameters of one optimizer; plain data, so that optimizers can be copied.

    Attributes:
        begun: whether all groups of the optimizer's constructor are known.
    """

    def __init__(self) -> None:
        self.begun = False
        self._owners: dict[Tensor, list[int]] = {}
        self._placements: dict[Tensor, Placement] = {}
        self._shared: tuple[tuple[int, ...], int, bool] | None = None

    def placement(self, param: Tensor, view: View | None, structure: Structure | None) -> Placement:
        """Where the entries of a parameter are, and so how it is stepped; None for both without a view."""
        if param not in self._placements:
            found = find(param, view, "a parameter")
            if view is not None and structure is not None:
                found = summed(found, param, view, structure)
            if found.kind == "local" and self._shared is not None:
                found = replicated(param, view, *self._shared)
            self._placements[param] = found
        return self._placements[param]

    def owners(self, param: Tensor, view: View | None) -> Sequence[int | None]:
        """The owner of every part, a place in the placement's ranks; None: nobody in particular."""
        return self._owners.get(param) or [None] * (1 if view is None else view.parts)

    def members(
        self,
        params: Sequence[Tensor],
        views: Mapping[Tensor, View | None],
        structure: Structure,
        phase_of: Mapping[tuple[Tensor, int], int],
        places: Mapping[Tensor, int],
    ) -> list[Member]:
        """The parts of parameters that have views."""
        return [
            Member(
                param,
                view,
                part,
                phase_of[param, part],
                self.placement(param, view, structure),
                owner,
                places[param] + part,
            )
            for param in params
            if (view := views[param]) is not None
            for part, owner in enumerate(self.owners(param, view))
        ]

    def divide(
        self,
        groups: Sequence[dict[str, Any]],
        views: Mapping[Tensor, View | None],
        structure_of: Callable[[dict[str, Any]], Structure],
    ) -> None:
        """Choose owners for parameters that should have some and have none yet.

        Args:
            groups: of the optimizer.
            views: of all their parameters.
            structure_of: gives the structure of a group.
        """
        self.begun = True
        units: dict[tuple[Tensor, int], WorkItem] = {}
        phase_of: Mapping[tuple[Tensor, int], int] | None = None
        for group in groups:
            structure, interval = structure_of(group), group["precondition_frequency"]
            for param in group["params"]:
                view = views[param]
                where = self.placement(param, view, None if view is None else structure)
                shared = where.kind == "root_sharing" and isinstance(structure, OneCall)
                divided = (
                    where.kind == "owner_computes"
                    or (where.kind in ("root_sharing", "partial_sums") and structure.root_keys)
                    or shared
                )
                if view is None or not divided:
                    continue
                phase_of = phase_of or refresh_phases(groups, views, structure_of)
                known = self.owners(param, view)
                for part, shape in enumerate(view.shapes(param.shape)):
                    price, turn = owner_cost(structure, where.kind, shape), (interval, phase_of[param, part])
                    units[param, part] = WorkItem(price, where.ranks, turn, known[part])
        chosen: dict[Tensor, list[int]] = {}
        for (param, _), owner in zip(units, owners(list(units.values())), strict=True):
            chosen.setdefault(param, []).append(owner)
        self._owners |= chosen

    def forget(self, present: Mapping[Tensor, object]) -> None:
        """Let go of parameters that are not present."""
        for param in (self._owners.keys() | self._placements.keys()) - present.keys():
            self.forget_one(param)

    def forget_one(self, param: Tensor) -> None:
        """Find out anew where a parameter is."""
        self._owners.pop(param, None)
        self._placements.pop(param, None)

    def share(self, caller: str, group: ProcessGroup | None, sharded: bool) -> None:
        """From now on, the ranks of a group share the work on parameters that all of them hold whole.

        Raises:
            ValueError: they do already.
            RuntimeError: there are no groups.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{caller}: distribute needs torch.distributed, which is not initialized. Call "
                "torch.distributed.init_process_group first, or leave distribute out on a single process."
            )
        if self._shared is not None:
            raise ValueError(f"{caller}: its work is distributed already; call distribute once.")
        ranks = register_group(group)
        if len(ranks) > 1:
            self._shared = (ranks, ranks.index(dist.get_rank()), sharded)
            self._placements.clear()

    def keep_own(
        self,
        groups: Sequence[dict[str, Any]],
        views: Mapping[Tensor, View | None],
        states: Mapping[Tensor, State],
        structure_of: Callable[[dict[str, Any]], Structure],
    ) -> None:
        """Let go of the state that other ranks keep."""
        for group in groups:
            structure = structure_of(group)
            for param in group["params"]:
                view = views[param]
                where = self.placement(param, view, None if view is None else structure)
                self._keep_own(states[param], param, where, self.owners(param, view))

    def _keep_own(self, state: State, param: Tensor, where: Placement, owned_by: Sequence[int | None]) -> None:
        for key, tensor in state.items():
            name, _, part = key.partition(".")
            if where.rows and name in ("exp_avg", "exp_avg_sq", "residual"):
                state[key] = tensor[within(where.box, whole(param))].clone()
            elif (
                where.kind == "owner_computes"
                and name not in WHOLE
                and not holds_state(where, owned_by[int(part or 0)])
            ):
                state[key] = tensor[:0].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_placements": {}}


WHOLE = {"step", "spike_sq", "residual"}
"""Keys of a state that are not one part's."""
