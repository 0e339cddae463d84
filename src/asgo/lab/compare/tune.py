"""Learning rates chosen with the same number of runs for every optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Args:
        lr: the best learning rate.
        tried: every learning rate with its final loss, in the order they were tried; infinite for a run that
            diverged.
        bracketed: whether the best has a worse one tried on either side.
    """

    lr: float
    tried: tuple[tuple[float, float], ...]
    bracketed: bool


def search(start: float, budget: int, loss: Callable[[float], float]) -> Tuning:
    """Find a learning rate in `budget` runs, from `start` in factors of two.

    Each run goes to an untried neighbour of the best so far, the larger one first, so the search walks on
    while the best is at the edge; when both neighbours have been tried, the factor becomes its square root.
    While every run diverges, it goes down.

    Args:
        start: the first learning rate.
        budget: how many runs, at least 1.
        loss: final validation loss at a learning rate.
    """
    tried = {0.0: loss(start)}
    step = 1.0
    while len(tried) < budget:
        best = _best(tried)
        neighbours = (best + step, best - step) if math.isfinite(tried[best]) else (best - step,)
        new = [exponent for exponent in neighbours if exponent not in tried]
        if not new:
            step /= 2
            continue
        tried[new[0]] = loss(start * 2.0 ** new[0])
    best = _best(tried)
    bracketed = min(tried) < best < max(tried)
    return Tuning(start * 2.0**best, tuple((start * 2.0**e, value) for e, value in tried.items()), bracketed)


def _best(tried: dict[float, float]) -> float:
    """The exponent of the lowest loss; the lowest exponent while all runs diverge."""
    finite = {exponent: loss for exponent, loss in tried.items() if math.isfinite(loss)}
    return min(finite, key=finite.__getitem__) if finite else min(tried)
