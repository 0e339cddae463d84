"""Does "AdaGram of rank 5 or less is as fast as or faster than diagonal methods" hold? Computed, with its test.

The slowness of a run is the geometric mean over its curve of ``(loss - optimum) / (first loss - optimum)``, on all
training rows, an excess below a thousandth counting as a thousandth: a ratio of 0.8 is an excess 20 % lower at an
average step. Choices are made on seeds of their own, the tuning seeds: every method's learning rate and eps, AdaGram's
rank, and which diagonal method is to be beaten, its rival. On the other seeds, the logarithms of AdaGram's slowness
over its rival's are tested, paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import t as student

from asgo.lab.compare.paired_test import paired_test
from experiments.glm.contenders import parse

DIAGONAL = ("sgd", "adagrad")
"""The names of the methods to beat."""

LARGEST_RANK = 5

LEVEL = 0.05
"""Level of every test; they are not corrected for their number."""

CAP = 10.0
"""A loss beyond this many times the first one counts as this: a run that diverges is slow, not infinitely slow."""

FLOOR = 1e-3
"""An excess below this share of the first counts as this. Where classes can be separated, the excess falls without end
as the weights grow, and what is left of it says nothing of the method."""

Curve = Sequence[float | None]
"""Losses in the order they were measured, the first before the first step; None once a run has diverged."""


def excess(curve: Curve, optimum: float) -> list[float]:
    """``(loss - optimum) / (first loss - optimum)`` of every loss, within `FLOOR` and about `CAP`."""
    first = curve[0] or 0.0
    capped = [CAP * first if loss is None else min(loss, CAP * first) for loss in curve]
    return [max(FLOOR, (loss - optimum) / (first - optimum)) for loss in capped]


def slowness(curve: Curve, optimum: float) -> float:
    """The geometric mean of the excess after the first one."""
    return math.exp(fmean(map(math.log, excess(curve, optimum)[1:])))


@dataclass(frozen=True)
class Trial:
    """All contenders on one problem with one batch size.

    Args:
        problem: the data set.
        batch: examples per step.
        tuned: contender to its slowness on the tuning seeds, with its best learning rate.
        slowness: contender to its slowness on each of the compared seeds, in the same order for all.
    """

    problem: str
    batch: int
    tuned: Mapping[str, float]
    slowness: Mapping[str, Sequence[float]]

    def best(self, contenders: Iterable[str]) -> str:
        """The one that was fastest on the tuning seeds."""
        return min((c for c in contenders if c in self.tuned), key=self.tuned.__getitem__)


@dataclass(frozen=True)
class TestResult:
    """A ratio of slownesses and what a paired t-test says of it.

    Args:
        ratio: geometric mean of AdaGram's slowness over its rival's.
        pairs: how many pairs it is of.
        t: of the logarithms; NaN if no test is possible.
        p: two-sided, against a ratio of 1.
        p_margin: one-sided, against a ratio of 1 + margin or more.
        outcome: ``faster`` (p below 5 % and ratio below 1), ``as fast`` (not that, but p_margin below 5 %), ``slower``
            (neither, p below 5 %), ``open`` (none of them).
    """

    ratio: float
    pairs: int
    t: float
    p: float
    p_margin: float
    outcome: str

    @property
    def holds(self) -> bool:
        """Whether "as fast as or faster" is shown."""
        return self.outcome in ("faster", "as fast")


@dataclass(frozen=True)
class Variant:
    """One direction and integrator of AdaGram.

    Args:
        direction: of the step.
        integrator: of the moving subspace.
        contenders: its ranks up to 5, as they are written.
    """

    direction: str
    integrator: str
    contenders: tuple[str, ...]

    def __str__(self) -> str:
        return f"direction={self.direction}, integrator={self.integrator}"


@dataclass(frozen=True)
class Verdict:
    """What the trials say about one variant.

    Args:
        variant: which.
        each: (problem, batch) to the chosen contender, its rival and the judgement over seeds.
        sets: problem to the judgement over seeds, each with the mean logarithm over its batch sizes.
        overall: the judgement over problems, each with the mean logarithm over its batch sizes and seeds; of a single
            problem, that over seeds.
    """

    variant: Variant
    each: Mapping[tuple[str, int], tuple[str, str, TestResult]]
    sets: Mapping[str, TestResult]
    overall: TestResult


def judge(logs: Sequence[float], margin: float) -> TestResult:
    """Test logarithms of ratios, one per pair."""
    test = paired_test("", "", [(value, 0.0) for value in logs])
    ratio = math.exp(test.difference)
    if math.isnan(test.t):
        return TestResult(ratio, len(logs), math.nan, math.nan, math.nan, "open")
    shifted = (test.difference - math.log1p(margin)) / test.standard_error
    p_margin = float(student.cdf(shifted, len(logs) - 1))
    return TestResult(ratio, len(logs), test.t, test.p, p_margin, _outcome(ratio, test.p, p_margin))


def _outcome(ratio: float, p: float, p_margin: float) -> str:
    if p < LEVEL and ratio < 1:
        return "faster"
    if p_margin < LEVEL:
        return "as fast"
    return "slower" if p < LEVEL else "open"


def variants(contenders: Sequence[str]) -> list[Variant]:
    """The directions and integrators of AdaGram among the contenders, with their ranks up to 5."""
    found: dict[tuple[str, str], list[str]] = {}
    for text in contenders:
        form = parse(text).form()
        if form is not None and form.rank is not None and form.rank <= LARGEST_RANK:
            found.setdefault((form.direction, form.integrator), []).append(text)
    return [Variant(*key, tuple(texts)) for key, texts in found.items()]


def verdicts(trials: Sequence[Trial], contenders: Sequence[str], margin: float) -> list[Verdict]:
    """The verdict on every variant; none if there is no diagonal method to beat."""
    rivals = [text for text in contenders if parse(text).name in DIAGONAL]
    return [_verdict(trials, variant, rivals, margin) for variant in variants(contenders)] if rivals else []


def _verdict(trials: Sequence[Trial], variant: Variant, rivals: Sequence[str], margin: float) -> Verdict:
    each: dict[tuple[str, int], tuple[str, str, TestResult]] = {}
    by_problem: dict[str, list[list[float]]] = {}
    for trial in trials:
        own, rival = trial.best(variant.contenders), trial.best(rivals)
        pairs = zip(trial.slowness[own], trial.slowness[rival], strict=True)
        logs = [math.log(a / b) for a, b in pairs]
        each[trial.problem, trial.batch] = (own, rival, judge(logs, margin))
        by_problem.setdefault(trial.problem, []).append(logs)
    means = {problem: [fmean(seed) for seed in zip(*logs, strict=True)] for problem, logs in by_problem.items()}
    sets = {problem: judge(logs, margin) for problem, logs in means.items()}
    over = judge([fmean(logs) for logs in means.values()], margin) if len(sets) > 1 else next(iter(sets.values()))
    return Verdict(variant, each, sets, over)


def summary_lines(found: Sequence[Verdict], margin: float) -> list[str]:
    """The verdicts as sentences, the last one the answer."""
    if not found:
        return ["no AdaGram of rank 5 or less, or no diagonal method, is among the contenders: nothing to judge"]
    outcome = {str(verdict.variant): verdict.overall.outcome for verdict in found}
    groups = {
        "holds": [name for name, seen in outcome.items() if seen in ("faster", "as fast")],
        "does not hold": [name for name, seen in outcome.items() if seen == "slower"],
        "is open": [name for name, seen in outcome.items() if seen == "open"],
    }
    answer = "; ".join(f"{word} with {' and '.join(names)}" for word, names in groups.items() if names)
    return [
        *map(_sentence, found),
        f'"rank 5 or less is as fast as or faster than diagonal methods", over all data sets: {answer}',
        f"holds: a one-sided paired t-test at 5 % rules out being {margin:.0%} slower or more; does not hold: it does "
        "not, and a two-sided one finds it slower; open: neither",
    ]


def _sentence(verdict: Verdict) -> str:
    groups: dict[str, list[str]] = {"faster": [], "as fast": [], "slower": [], "open": []}
    for problem, judgement in verdict.sets.items():
        groups[judgement.outcome].append(problem)
    sets = "; ".join(f"{outcome} on {', '.join(names)}" for outcome, names in groups.items() if names)
    overall = verdict.overall
    test = "no test" if math.isnan(overall.t) else f"t = {overall.t:.2f}, p = {overall.p:.4f}"
    count = f"{len(verdict.sets)} data set{'s' if len(verdict.sets) > 1 else ''}"
    return f"{verdict.variant}: {sets}; over {count} {overall.ratio:.2f} times its rival's slowness ({test})"
