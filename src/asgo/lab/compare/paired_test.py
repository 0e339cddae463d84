"""What several seeds say about the difference of two optimizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev

SEEDS_NEEDED = 3
"""Fewest paired seeds for which a test is made."""
LEVEL = 0.05
"""A difference with a smaller p is called a win or a loss, any other a tie; intervals have confidence 1 - LEVEL."""
VERDICTS = {"win": "better", "tie": "not significant", "loss": "worse", "-": "not tested"}
"""`PairedTest.verdict` in the words of reports."""


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
        low: of the 95 % interval of the difference.
        high: likewise.
    """

    first: str
    second: str
    seeds: int
    difference: float
    standard_error: float
    t: float
    p: float
    low: float = math.nan
    high: float = math.nan

    @property
    def verdict(self) -> str:
        """Of the first: win or loss where p is below `LEVEL`, else tie; "-" without a test."""
        if math.isnan(self.p):
            return "-"
        return "tie" if self.p >= LEVEL else "win" if self.difference < 0 else "loss"

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
    t, reach = mean / error, error * float(student.ppf(1 - LEVEL / 2, count - 1))
    p = 2 * float(student.sf(abs(t), count - 1))
    return PairedTest(first, second, count, mean, error, t, p, mean - reach, mean + reach)


@dataclass(frozen=True)
class TargetRatio:
    """Steps, or seconds, of a reference to a loss, divided by those of another optimizer, seed by seed.

    Args:
        what: "steps" or "seconds".
        first: the optimizer.
        reference: the reference.
        seeds: seeds that both finished.
        missed: on how many of them one of the two did not reach the loss.
        ratio: geometric mean; above 1 where `first` takes fewer. NaN where seeds are missed, or there are none.
        low: of its 95 % interval, by the t-test on logarithms; NaN if no test.
        high: likewise.
        p: two-sided; NaN if no test.
    """

    what: str
    first: str
    reference: str
    seeds: int
    missed: int
    ratio: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan

    def __str__(self) -> str:
        head = f"{self.what} of {self.reference} / {self.what} of {self.first} to the target: "
        if self.missed:
            return head + f"not reached by both on {self.missed} of {self.seeds} seeds"
        if math.isnan(self.p):
            return head + ("no seed that both finished" if math.isnan(self.ratio) else f"{self.ratio:.3f}, no test")
        return head + f"{self.ratio:.3f} (95 % interval {self.low:.3f} to {self.high:.3f}, p = {self.p:.4f})"


def target_ratio(
    what: str, first: str, reference: str, pairs: Sequence[tuple[float | None, float | None]]
) -> TargetRatio:
    """Compare what `first` and the reference took to a loss on each seed; None where it was not reached."""
    reached = [(math.log(a), math.log(b)) for a, b in pairs if a and b]
    missed = len(pairs) - len(reached)
    if missed or not pairs:
        return TargetRatio(what, first, reference, len(pairs), missed, math.nan)
    test = paired_test(first, reference, [(b, a) for a, b in reached])
    low, ratio, high = (math.exp(x) for x in (test.low, test.difference, test.high))
    return TargetRatio(what, first, reference, len(pairs), 0, ratio, low, high, test.p)


def all_pairs(losses: dict[str, dict[int, float]], reference: str | None = None) -> list[PairedTest]:
    """The test of every two optimizers over the seeds that both have; ``losses[optimizer][seed]``.

    With a reference, of every other optimizer against it alone.
    """
    pairs = combinations(losses, 2) if reference is None else ((a, reference) for a in losses if a != reference)
    return [
        paired_test(a, b, [(losses[a][seed], losses[b][seed]) for seed in losses[a] if seed in losses[b]])
        for a, b in pairs
    ]
