"""What several seeds say about the difference of two optimizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev

SEEDS_NEEDED = 3
"""Fewest paired seeds for which a test is made."""


@dataclass(frozen=True)
class PairedTest:
    """The final losses of two optimizers, compared seed by seed.

    Args:
        first: one optimizer.
        second: the other.
        seeds: seeds that both finished.
        difference: mean of first minus second; negative where the first is better. NaN without seeds.
        standard_error: standard deviation of the differences over the root of their number; NaN if no test.
        t: difference over its standard error; NaN if no test.
        p: two-sided probability of so large a t without a true difference (seeds - 1 degrees of freedom).
    """

    first: str
    second: str
    seeds: int
    difference: float
    standard_error: float
    t: float
    p: float

    def __str__(self) -> str:
        head = f"{self.first} - {self.second}: "
        if not self.seeds:
            return head + "no seed that both finished"
        if self.seeds < SEEDS_NEEDED:
            return head + f"{self.difference:+.4f}; no test is possible with {self.seeds} paired seed(s), it needs 3"
        if math.isnan(self.t):
            return head + f"{self.difference:+.4f} on every seed; no test is possible without spread"
        p = "p < 0.0001" if self.p < 1e-4 else f"p = {self.p:.4f}"
        return head + (
            f"{self.difference:+.4f}, standard error {self.standard_error:.4f} ({self.seeds} paired seeds, "
            f"t = {self.t:.2f}, {p})"
        )


def paired_test(first: str, second: str, pairs: Sequence[tuple[float, float]]) -> PairedTest:
    """Compare two optimizers by a two-sided paired t-test on `pairs` of losses, one per seed."""
    from scipy.stats import t as student  # noqa: PLC0415 (takes a second; --help should not)

    differences = [a - b for a, b in pairs]
    count, mean = len(differences), fmean(differences) if differences else math.nan
    error = stdev(differences) / math.sqrt(count) if count >= SEEDS_NEEDED else math.nan
    if not error > 0:
        return PairedTest(first, second, count, mean, math.nan, math.nan, math.nan)
    t = mean / error
    return PairedTest(first, second, count, mean, error, t, 2 * float(student.sf(abs(t), count - 1)))


def all_pairs(losses: dict[str, dict[int, float]]) -> list[PairedTest]:
    """The test of every two optimizers over the seeds that both have; ``losses[optimizer][seed]``."""
    return [
        paired_test(a, b, [(losses[a][seed], losses[b][seed]) for seed in losses[a] if seed in losses[b]])
        for a, b in combinations(losses, 2)
    ]
