"""Which rank owns which matrix: the costliest first, each to the rank with the least work."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from asgo._types import State
from asgo.distributed.collectives import register_group
from asgo.distributed.dtensor import is_dtensor
from asgo.distributed.owner_computes import OwnerComputes
from asgo.distributed.placement import everywhere, find, replicated
from asgo.distributed.strategies import Elementwise, PartialSums, Placed, RootSharing, WholeSlices
from asgo.parts import GroupPlan, Strategy, on_one_process
from asgo.structures import Structure
from asgo.views import View

STRATEGIES: dict[str, type[Placed]] = {
    cls.kind: cls for cls in (Placed, RootSharing, OwnerComputes, WholeSlices, PartialSums, Elementwise)
}
"""The strategy of every kind of placement."""


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


def owners(units: Sequence[WorkItem]) -> list[int]:
    """An owner for each unit: the costliest first, each to the rank with the least work in its phase, then in all.

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
        in_phase, in_all = loads(units[i])
        if chosen[i] < 0:
            chosen[i] = min(range(len(in_all)), key=lambda rank: (in_phase[rank], in_all[rank]))
        for each in (in_phase, in_all):
            each[chosen[i]] += units[i].cost
    return chosen


class WorkPartition:
    """Which rank does what for the parameters of one optimizer; plain data, so that optimizers can be copied.

    Attributes:
        begun: whether all groups of the optimizer's constructor are known.
    """

    def __init__(self) -> None:
        self.begun = False
        self._owners: dict[Tensor, list[int]] = {}
        self._strategies: dict[Tensor, Strategy] = {}
        self._shared: tuple[tuple[int, ...], int, bool] | None = None
        self._chosen: type[Placed] | None = None

    def strategy(self, param: Tensor, view: View | None, structure: Structure) -> Strategy:
        """Where the entries of a parameter are, and so how it is stepped with the structure of its group."""
        if self._shared is None and not is_dtensor(param):
            return on_one_process(view)
        if param not in self._strategies:
            found = find(param, view, "a parameter", structure)
            chosen = None
            if found.kind == "local" and self._shared is not None:
                (ranks, me, sharded), chosen = self._shared, self._chosen
                given = None if chosen is None else everywhere(chosen.kind, param, view, ranks, me)
                found = given or replicated(param, view, ranks, me, sharded)
            self._strategies[param] = (chosen or STRATEGIES[found.kind])(found)
        return self._strategies[param]

    def owners(self, param: Tensor, view: View | None) -> Sequence[int | None]:
        """The owner of every part, a place in the placement's ranks; None: no rank owns it."""
        return self._owners.get(param) or [None] * (1 if view is None else view.parts)

    def divide(
        self,
        groups: Sequence[GroupPlan],
        phases: Callable[[Sequence[GroupPlan]], Mapping[tuple[Tensor, int], int]],
    ) -> None:
        """Choose owners for parameters that should have some and have none yet.

        Args:
            groups: of the optimizer.
            phases: gives the refresh phase of every part of all groups; called if there are owners to choose.
        """
        self.begun = True
        items: dict[tuple[Tensor, int], WorkItem] = {}
        phase_of: Mapping[tuple[Tensor, int], int] | None = None
        for group in groups:
            for param, view in group.views.items():
                strategy = self.strategy(param, view, group.structure)
                if view is None or not strategy.has_owners(group.structure):
                    continue
                phase_of = phases(groups) if phase_of is None else phase_of
                known = self.owners(param, view)
                for part, shape in enumerate(view.shapes(param.shape)):
                    cost, phase = strategy.owner_cost(group.structure, shape), (group.interval, phase_of[param, part])
                    items[param, part] = WorkItem(cost, strategy.ranks, phase, known[part])
        chosen: dict[Tensor, list[int]] = {}
        for (param, _), owner in zip(items, owners(list(items.values())), strict=True):
            chosen.setdefault(param, []).append(owner)
        self._owners |= chosen

    def forget(self, present: Mapping[Tensor, object]) -> None:
        """Forget parameters that are not present."""
        for param in (self._owners.keys() | self._strategies.keys()) - present.keys():
            self.forget_one(param)

    def forget_one(self, param: Tensor) -> None:
        """Find out anew where a parameter is."""
        self._owners.pop(param, None)
        self._strategies.pop(param, None)

    def share(
        self, caller: str, group: ProcessGroup | None, sharded: bool, strategy: type[Placed] | None = None
    ) -> None:
        """From now on, the ranks of a group share the work on parameters that all of them hold whole.

        Raises:
            ValueError: they do already, or both ways to do it are asked for.
            RuntimeError: there are no groups.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{caller}: distribute needs torch.distributed, which is not initialized. Call "
                "torch.distributed.init_process_group first, or leave distribute out on a single process."
            )
        if self._shared is not None:
            raise ValueError(f"{caller}: its work is distributed already; call distribute once.")
        if sharded and strategy is not None:
            raise ValueError(f"{caller}: distribute got shard_state and a strategy; the strategy decides what is kept.")
        ranks = register_group(group)
        if len(ranks) > 1:
            self._shared, self._chosen = (ranks, ranks.index(dist.get_rank()), sharded), strategy
            self._strategies.clear()

    def keep_own(self, groups: Sequence[GroupPlan], states: Mapping[Tensor, State]) -> None:
        """Let go of the state that other ranks keep from now on."""
        for group in groups:
            for param, view in group.views.items():
                strategy = self.strategy(param, view, group.structure)
                strategy.keep_own(states[param], param, self.owners(param, view))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_strategies": {}}
