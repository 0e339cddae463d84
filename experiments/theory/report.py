"""What the plays found: rows, slopes, the answer in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.jobs import Results
from experiments.runner import Report
from experiments.theory.draw import draw_curves, draw_map, draw_steps
from experiments.theory.play import FIELDS, TheoryJob
from experiments.theory.problems import PROBLEMS

ROUNDING = 1e-9
"""A regret above its bound by this share of it is not above it."""


@dataclass(frozen=True, eq=False)
class Observation:
    """The result of a job: arrays ``(marks, repeats, steps)``; losses and bounds in units of ``F(0) - F(W*)``.

    Args:
        job: what was played.
        values: the fields of `Record`, and eta; NaN where there is none.
    """

    job: TheoryJob
    values: dict[str, np.ndarray]

    @staticmethod
    def of(job: TheoryJob, result: Any) -> Observation:
        """From the ledger, which has None for what is not finite."""
        values = {name: np.array(inner, dtype=float) for name, inner in result.items()}
        unit = values.pop("unit")
        for name in FIELDS:
            if name not in ("distance", "trace"):
                values[name] = values[name] / unit
        return Observation(job, values)

    def mean(self, name: str) -> np.ndarray:
        """Mean over rounds so far and repeats, ``(marks, steps)``."""
        return self.values[name].mean(1) / np.array(self.job.marks)[:, None]

    def best(self) -> int:
        """The step size with the smallest regret in the end."""
        return int(np.argmin(_worst(self.mean("regret")[-1])))

    def ratio(self) -> np.ndarray:
        """Regret over its bound: the largest over marks and repeats, for each step size."""
        return _worst(self.values["regret"] / self.values["bound"]).max((0, 1))

    def above(self) -> np.ndarray:
        """Where the regret is above its bound, or is not a number."""
        return ~(self.values["regret"] <= self.values["bound"] * (1 + ROUNDING))

    def slope(self, name: str) -> float | None:
        """Of the logarithm of a mean over that of rounds, over the last tenfold, at the best step."""
        at, means = np.array(self.job.marks), self.mean(name)[:, self.best()]
        last = (at >= at[-1] / 10) & np.isfinite(means) & (means > 0)
        if last.sum() < 3:
            return None
        return float(np.polyfit(np.log(at[last]), np.log(means[last]), 1)[0])


def _worst(values: np.ndarray) -> np.ndarray:
    """What is not a number counts as infinite: a run that has diverged."""
    return np.where(np.isnan(values), math.inf, values)


@dataclass(frozen=True)
class Row:
    """A line of ``table.csv``: a method on a problem at a step size. Means are over rounds and repeats.

    Args:
        problem: which.
        method: which.
        step: size, as a multiple of the one at which the bound is smallest.
        eta: step size itself, mean over repeats.
        best: whether the regret is the smallest at this step size.
        distance: largest distance from W* of the method's iterates, in the norm of its bound; mean over repeats.
        trace: of its bound, mean over repeats.
        regret: ``f_t(W_t) - f_t(W*)`` over ``F(0) - F(W*)``.
        excess: ``F(W_t) - F(W*)`` over ``F(0) - F(W*)``.
        bound: the regret bound, in the same unit.
        rate: the bound of the theorem for nonsmooth or smooth problems, by the problem's constants; None for shampoo.
        largest_ratio: largest of regret over bound along the way and over repeats.
        breaks: runs in which the regret was above its bound.
        regret_slope: exponent of T fitted to the mean regret over the last tenfold, at the best step.
        bound_slope: that of the bound.
        rate_slope: that of the theorem's bound.
    """

    problem: str
    method: str
    step: float
    eta: float
    best: bool
    distance: float
    trace: float
    regret: float
    excess: float
    bound: float
    rate: float | None
    largest_ratio: float
    breaks: int
    regret_slope: float | None
    bound_slope: float | None
    rate_slope: float | None


def rows_of(seen: Observation) -> list[Row]:
    """A row for each step size."""
    best, ratio, last = seen.best(), seen.ratio(), {n: seen.values[n][-1].mean(0) for n in ("eta", "distance", "trace")}
    means = {name: seen.mean(name)[-1] for name in ("regret", "excess", "bound", "rate")}
    slopes = {f"{name}_slope": seen.slope(name) for name in ("regret", "bound", "rate")}
    above = seen.above().any(0).sum(0)
    rows = []
    for k, step in enumerate(seen.job.steps):
        numbers: dict[str, Any] = {name: float(values[k]) for name, values in {**last, **means}.items()}
        numbers["rate"] = None if math.isnan(numbers["rate"]) else numbers["rate"]
        numbers |= slopes if k == best else dict.fromkeys(slopes)
        where = {"problem": seen.job.dials.problem, "method": seen.job.method, "step": step, "best": k == best}
        rows.append(Row(**where, **numbers, largest_ratio=float(ratio[k]), breaks=int(above[k])))
    return rows


def curve_rows(seen: Observation) -> list[dict[str, Any]]:
    """Lines of ``curves.csv``: what the picture shows."""
    best = seen.best()
    means = {name: seen.mean(name)[:, best] for name in ("regret", "bound", "rate")}
    return [
        {"problem": seen.job.dials.problem, "method": seen.job.method, "step": seen.job.steps[best], "rounds": mark}
        | {name: None if math.isnan(values[i]) else float(values[i]) for name, values in means.items()}
        for i, mark in enumerate(seen.job.marks)
    ]


def map_row(seen: Observation) -> dict[str, Any]:
    """A line of ``sweep.csv``: a method at a point of the map, each number at its own best step size."""
    dials, regret, bound = seen.job.dials, seen.mean("regret")[-1], seen.mean("bound")[-1]
    return {
        "problem": dials.problem,
        "rank": dials.rank,
        "spread": dials.spread,
        "method": seen.job.method,
        "step": seen.job.steps[seen.best()],
        "regret": float(_worst(regret).min()),
        "bound": float(_worst(bound).min()),
        "largest_ratio": float(seen.ratio().max()),
        "breaks": int(seen.above().any(0).sum()),
    }


# ---- findings ------------------------------------------------------------------------------------

COLUMNS = ("problem and method", "step", "regret", "bound", "largest regret / bound", "slope", "bound's slope")


def conclude(plays: Sequence[TheoryJob], maps: Sequence[TheoryJob], done: Results) -> Report:
    """Tables, pictures and words."""
    seen = [Observation.of(job, done[job.key]) for job in plays]
    points = [map_row(Observation.of(job, done[job.key])) for job in maps]
    rows = [row for each in seen for row in rows_of(each)]
    curves = [line for each in seen for line in curve_rows(each)]
    first, table = plays[0], [asdict(row) for row in rows]
    files: dict[str, bytes | Sequence[dict[str, Any]]] = {"curves.csv": curves, "steps.png": draw_steps(table)}
    if points:
        files |= {"sweep.png": draw_map(points), "sweep.csv": points}
    return Report(
        rows=table,
        head=COLUMNS,
        cells=[_cells(row, rows) for row in rows if row.best],
        title=f"{first.dials.rows} x {first.dials.columns}, {first.rounds} rounds, {first.dials.repeats} repeats",
        lines=words(rows, points, seen),
        picture=draw_curves(curves),
        note="Regret: mean of f_t(W_t) - f_t(W*) over rounds and repeats, as a share of F(0) - F(W*), at the step size "
        "(a multiple of the one at which the bound is smallest) where it is smallest. Bound: of the regret, alike. "
        "Largest regret / bound: over all step sizes, marks and repeats. Slopes: of the logarithms, over the last "
        "tenfold of rounds.",
        files=files,
    )  # fmt: skip


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    own = [other for other in rows if (other.problem, other.method) == (row.problem, row.method)]
    largest = max(other.largest_ratio for other in own)
    slopes = ["-" if slope is None else f"{slope:.2f}" for slope in (row.regret_slope, row.bound_slope)]
    return [f"{row.problem} {row.method}", f"{row.step:g}", f"{row.regret:.4f}", f"{row.bound:.3g}", f"{largest:.2f}",
            *slopes]  # fmt: skip


def words(rows: Sequence[Row], points: Sequence[dict[str, Any]], seen: Sequence[Observation]) -> list[str]:
    """What the numbers say."""
    lines = [_holds(method, rows, points, seen) for method in dict.fromkeys(row.method for row in rows)]
    lines += [line for line in map(_theorem, seen) if line]
    lines += [_winner(problem, rows) for problem in dict.fromkeys(row.problem for row in rows)]
    return lines + [_wins(problem, points) for problem in dict.fromkeys(point["problem"] for point in points)]


def _holds(method: str, rows: Sequence[Row], points: Sequence[dict[str, Any]], seen: Sequence[Observation]) -> str:
    own = [row for row in rows if row.method == method]
    on_map = [point for point in points if point["method"] == method]
    breaks = sum(row.breaks for row in own) + sum(point["breaks"] for point in on_map)
    runs = len(own) * seen[0].job.dials.repeats
    mapped = len(on_map) * seen[0].job.dials.repeats * len(seen[0].job.steps)
    also = f" and {mapped} of the map" if mapped else ""
    if breaks:
        return f"{method}: the regret is above its bound in {breaks} of {runs} runs{also}"
    largest = max([*(row.largest_ratio for row in own), *(point["largest_ratio"] for point in on_map)])
    return f"{method}: the regret is below its bound in all {runs} runs{also}; at most {largest:.2f} times it"


def _theorem(seen: Observation) -> str | None:
    """Of ASGO: whether the excess is below the theorem's bound, which is by the problem's constants."""
    problem, job = seen.job.dials.problem, seen.job
    if job.method != "asgo":
        return None
    sure = PROBLEMS[problem].smooth and not job.dials.noise
    excess, rate = _worst(seen.values["excess"]), seen.values["rate"]
    ratio = excess / rate if sure else excess.mean(1) / rate.mean(1)
    each = "in every run" if sure else "on average over repeats"
    return (
        f"asgo on {problem}: the excess is at most {ratio.max():.2f} times the bound of the "
        f"{'smooth' if PROBLEMS[problem].smooth else 'nonsmooth'} theorem ({each})"
    )


def _winner(problem: str, rows: Sequence[Row]) -> str:
    own = sorted((row for row in rows if row.problem == problem and row.best), key=lambda row: row.regret)
    order = ", ".join(f"{row.method} {row.regret:.4f}" for row in own)
    return f"{problem}: smallest mean regret first: {order}"


def winner(points: Sequence[dict[str, Any]], by: str) -> str:
    """The method with the smallest number at a point of the map."""
    return str(min(points, key=lambda point: point[by])["method"])


def _wins(problem: str, points: Sequence[dict[str, Any]]) -> str:
    cells: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for point in points:
        if point["problem"] == problem:
            cells.setdefault((point["rank"], point["spread"]), []).append(point)
    measured = {at: winner(cell, "regret") for at, cell in cells.items()}
    bound = {at: winner(cell, "bound") for at, cell in cells.items()}
    agree = sum(measured[at] == bound[at] for at in cells)
    return (
        f"{problem}, map of {len(cells)} points: smallest regret {_counts(measured)}; smallest bound {_counts(bound)}; "
        f"the same method at {agree}"
    )


def _counts(winners: dict[tuple[int, float], str]) -> str:
    names = list(winners.values())
    return ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names), key=names.count, reverse=True))
