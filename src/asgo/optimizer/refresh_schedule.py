"""Which step refreshes which root: about the same work in every step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from asgo.parts import GroupPlan

WARMUP_STEPS = 10
"""The first steps refresh every root, whatever the interval: the statistic changes fastest there."""


def is_due(step: int, interval: int, phase: int) -> bool:
    """Whether a root with this refresh phase is refreshed in a step; the first step is 1."""
    return step <= WARMUP_STEPS or step % interval == phase


def balanced_phases(costs: Sequence[float], interval: int) -> list[int]:
    """A step in ``[0, interval)`` for each cost so that all steps carry about the same (greedy, costliest first)."""
    load = [0.0] * interval
    result = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        result[i] = load.index(min(load))
        load[result[i]] += costs[i]
    return result


def refresh_phases(groups: Sequence[GroupPlan]) -> dict[tuple[Tensor, int], int]:
    """The refresh phase of every part of all parameters: the step, modulo the refresh interval of its group."""
    costs: dict[int, dict[tuple[Tensor, int], float]] = {}
    for group in groups:
        of_interval = costs.setdefault(group.interval, {})
        for param, view in group.views.items():
            for part, (b, m, n) in enumerate(() if view is None else view.shapes(param.shape)):
                of_interval[param, part] = b * group.structure.root_flops(m, n)
    found: dict[tuple[Tensor, int], int] = {}
    for interval, alike in costs.items():
        found |= dict(zip(alike, balanced_phases(list(alike.values()), interval), strict=True))
    return found
