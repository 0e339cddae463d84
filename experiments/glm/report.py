"""What the fits say, as rows, a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, geometric_mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asgo.lab.figures import STYLES, label, png
from experiments.glm import claim
from experiments.glm.claim import Trial, Verdict
from experiments.glm.contenders import parse


@dataclass(frozen=True)
class Entry:
    """One contender on one problem with one batch size.

    Args:
        problem: the data set.
        model: which generalized linear model.
        parameters: how many numbers are fitted.
        batch: examples per step.
        contender: as it was written.
        lr: the chosen learning rate.
        eps: the chosen start of the statistic; None where it was not to be chosen.
        bracketed: whether rates on both sides of it were tried.
        tuned: slowness on the tuning seeds.
        slowness: on each seed.
        held: held-out loss on each seed; None after divergence.
        steps: when the loss was measured.
        excess: ``(loss - optimum) / (first loss - optimum)`` at each of them, geometric mean over seeds.
    """

    problem: str
    model: str
    parameters: int
    batch: int
    contender: str
    lr: float
    eps: float | None
    bracketed: bool
    tuned: float
    slowness: Sequence[float]
    held: Sequence[float | None]
    steps: Sequence[int]
    excess: Sequence[float]

    @staticmethod
    def of(problem: str, batch: int, contender: str, steps: Sequence[int], fit: Mapping[str, Any]) -> Entry:
        """From the result of a fit."""
        optimum, curves = fit["optimum"], fit["curves"]
        excess = zip(*(claim.excess(curve, optimum) for curve in curves), strict=True)
        names = ("model", "parameters", "lr", "eps", "bracketed", "tuned", "held")
        return Entry(
            problem=problem,
            batch=batch,
            contender=contender,
            steps=steps,
            slowness=[claim.slowness(curve, optimum) for curve in curves],
            excess=[geometric_mean(column) for column in excess],
            **{name: fit[name] for name in names},
        )


def trials_of(entries: Sequence[Entry]) -> list[Trial]:
    """The entries, one trial for each problem and batch size."""
    groups: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.problem, entry.batch), []).append(entry)
    return [
        Trial(*key, {e.contender: e.tuned for e in group}, {e.contender: e.slowness for e in group})
        for key, group in groups.items()
    ]


@dataclass(frozen=True)
class Row:
    """A line of ``table.csv``.

    Args:
        problem: the data set.
        model: which generalized linear model.
        parameters: how many numbers are fitted.
        batch: examples per step.
        contender: as it was written.
        lr: the chosen learning rate.
        eps: the chosen start of the statistic; None where it was not to be chosen.
        bracketed: whether rates on both sides of it were tried.
        slowness: geometric mean over seeds.
        spread: standard deviation of its logarithm over seeds; None below two.
        excess: at the last step as a share of the first, geometric mean over seeds.
        held_loss: mean held-out loss; None after a divergence.
        rival: the diagonal method that was fastest on the tuning seeds; None without one.
        ratio: slowness over the rival's, geometric mean over seeds.
        p: of the two-sided paired t-test of the logarithms; None if none is possible.
        outcome: faster, as fast, slower or open; None for the rival itself.
    """

    problem: str
    model: str
    parameters: int
    batch: int
    contender: str
    lr: float
    eps: float | None
    bracketed: bool
    slowness: float
    spread: float | None
    excess: float
    held_loss: float | None
    rival: str | None
    ratio: float | None
    p: float | None
    outcome: str | None


def summarize(entries: Sequence[Entry], trials: Sequence[Trial], margin: float) -> list[Row]:
    """A row for each entry."""
    by_key = {(trial.problem, trial.batch): trial for trial in trials}
    return [_row(entry, by_key[entry.problem, entry.batch], margin) for entry in entries]


def _row(entry: Entry, trial: Trial, margin: float) -> Row:
    rivals = [text for text in trial.tuned if parse(text).name in claim.DIAGONAL]
    rival = trial.best(rivals) if rivals else None
    judged = None
    if rival is not None:
        pairs = zip(entry.slowness, trial.slowness[rival], strict=True)
        judged = claim.judge([math.log(a / b) for a, b in pairs], margin)
    held = [loss for loss in entry.held if loss is not None]
    shared = ("problem", "model", "parameters", "batch", "contender", "lr", "eps", "bracketed")
    return Row(
        **{name: getattr(entry, name) for name in shared},
        slowness=geometric_mean(entry.slowness),
        spread=stdev(map(math.log, entry.slowness)) if len(entry.slowness) > 1 else None,
        excess=entry.excess[-1],
        held_loss=fmean(held) if len(held) == len(entry.held) else None,
        rival=rival,
        ratio=judged.ratio if judged else None,
        p=None if judged is None or math.isnan(judged.p) else judged.p,
        outcome=None if judged is None or rival == entry.contender else judged.outcome,
    )


# ---- the table ---------------------------------------------------------------------------------


def short(text: str) -> str:
    """A contender in few characters: ``adagram 5 factor/psi``."""
    form = parse(text).form()
    if form is None:
        return text.partition(":")[0]
    if form.rank is None:
        return f"adagram full {form.direction}"
    return f"adagram {form.rank} {form.direction}/{form.integrator}"


OUTCOMES = ("faster", "as fast", "slower", "open")


def head(rows: Sequence[Row], by: str) -> list[str]:
    """The titles of a table: a column for each batch size or problem, all of them, and counts of outcomes."""
    return ["optimizer", *(f"{by} {v}" if by == "batch" else str(v) for v in _values(rows, by)), "all", *OUTCOMES]


def cells(rows: Sequence[Row], contenders: Sequence[str], by: str) -> list[list[str]]:
    """A line for each contender: ratios to the best diagonal method, geometric means; - where it was not run."""
    lines = []
    for text in contenders:
        own = [row for row in rows if row.contender == text]
        ratios = [[row.ratio for row in own if getattr(row, by) == value] for value in _values(rows, by)]
        counts = [str(sum(row.outcome == outcome for row in own)) for outcome in OUTCOMES]
        lines.append([short(text), *map(_mean, ratios), _mean([row.ratio for row in own]), *counts])
    return lines


def _values(rows: Sequence[Row], by: str) -> list[Any]:
    return list(dict.fromkeys(getattr(row, by) for row in rows))


def _mean(ratios: Sequence[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{geometric_mean(known):.2f}" if known else "-"


def plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain data."""
    each = [
        {"problem": problem, "batch": batch, "contender": own, "rival": rival, **asdict(judged)}
        for (problem, batch), (own, rival, judged) in verdict.each.items()
    ]
    sets = {problem: asdict(judged) for problem, judged in verdict.sets.items()}
    return {"variant": asdict(verdict.variant), "each": each, "sets": sets, "overall": asdict(verdict.overall)}


# ---- the picture -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Curves of one problem with one batch size.

    Args:
        row: the problem.
        column: the batch size.
        lines: label to steps and excess.
    """

    row: str
    column: int
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]]


def panels(entries: Sequence[Entry], trials: Sequence[Trial], found: Sequence[Verdict]) -> list[Panel]:
    """All contenders but AdaGram, and of each of its variants the rank that the tuning seeds chose."""
    result = []
    for trial in trials:
        chosen = {text: short(text) for text in trial.tuned if parse(text).form() is None}
        for verdict in found:
            name = f"adagram, rank <= {claim.LARGEST_RANK}, {verdict.variant.direction}/{verdict.variant.integrator}"
            chosen[verdict.each[trial.problem, trial.batch][0]] = name
        own = {e.contender: e for e in entries if (e.problem, e.batch) == (trial.problem, trial.batch)}
        lines = {name: (own[text].steps, own[text].excess) for text, name in chosen.items()}
        result.append(Panel(trial.problem, trial.batch, lines))
    return result


def draw(panels: Sequence[Panel]) -> bytes:
    """Excess against steps, one row of panels per problem and one column per batch size."""
    rows, columns = (list(dict.fromkeys(getattr(p, name) for p in panels)) for name in ("row", "column"))
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    figure = Figure(figsize=(4 * len(columns) + 1, 2.6 * len(rows) + 1), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for panel in panels:
        axes = grid[rows.index(panel.row), columns.index(panel.column)]
        _draw_panel(axes, panel, names)
        label(axes, "steps" if panel.row == rows[-1] else "", "excess / first" if panel.column == columns[0] else "")
    lines = {name: line for axes in grid.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in grid.flat:
        axes.get_legend().remove()
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=3, frameon=False, handlelength=3.5)
    return png(figure)


def _draw_panel(axes: Axes, panel: Panel, names: Sequence[str]) -> None:
    for name, (steps, excess) in panel.lines.items():
        color, style, marker = STYLES[names.index(name) % len(STYLES)]
        every = max(1, len(steps) // 5)
        axes.plot(steps, excess, color=color, linestyle=style, marker=marker, markersize=4, markevery=every, label=name)
    axes.set_yscale("log")
    axes.set_ylim(top=2, bottom=max(axes.get_ylim()[0], claim.FLOOR / 2))
    axes.set_title(f"{panel.row}, batch {panel.column}", fontsize=10)
