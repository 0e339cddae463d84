"""Pictures of runs, as PNG bytes: readable in grey and for the colour-blind."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Colours of Okabe and Ito (2008), which stay apart under the common kinds of colour blindness.
STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#000000", (0, (6, 1, 1, 1, 1, 1)), "v"),
    ("#E69F00", (0, (1, 1)), "P"),
    ("#56B4E9", (0, (8, 2)), "X"),
    ("#7f7f7f", "-", "*"),
)
"""Colour, line and marker of each curve of a picture."""

LONGEST_NAME = 60
"""Characters of a name in a legend."""


@dataclass(frozen=True)
class Curve:
    """Validation losses of one run, in the order they were measured."""

    steps: tuple[int, ...]  # optimizer steps done
    seconds: tuple[float, ...]  # training time passed, without evaluation and saving
    losses: tuple[float, ...]  # validation loss in nats per token

    @staticmethod
    def of(metrics: Sequence[Mapping[str, Any]]) -> Curve:
        """The evaluations among the lines of a ``metrics.jsonl``."""
        lines = [line for line in metrics if "val_loss" in line]
        keys = ("step", "seconds", "val_loss")
        steps, seconds, losses = (tuple(line[key] for line in lines) for key in keys)
        return Curve(steps, seconds, losses)

    def reaches(self, target: float) -> tuple[int, float] | None:
        """Step and seconds of the first evaluation at or below `target`; None if there is none."""
        hits = (i for i, loss in enumerate(self.losses) if loss <= target)
        first = next(hits, None)
        return None if first is None else (self.steps[first], self.seconds[first])

    def crosses(self, target: float) -> tuple[float, float] | None:
        """Steps and seconds to `target`, on straight lines between evaluations; None if it is never reached."""
        points = list(zip(self.steps, self.seconds, self.losses, strict=True))
        for (step, second, high), (next_step, next_second, low) in pairwise(points):
            if low <= target:
                share = 1.0 if high <= target else (high - target) / (high - low)
                return step + (next_step - step) * share, second + (next_second - second) * share
        return None


def draw_run(metrics: Sequence[Mapping[str, Any]]) -> bytes:
    """Training and validation loss of one run against steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    training = [line for line in metrics if "loss" in line]
    curve = Curve.of(metrics)
    grey, (color, style, marker) = "#7f7f7f", STYLES[0]
    axes.plot([line["step"] for line in training], [line["loss"] for line in training], color=grey, label="training")
    axes.plot(curve.steps, curve.losses, color=color, linestyle=style, marker=marker, label="validation")
    label(axes, "optimizer steps", "loss (nats per token)")
    return png(figure)


def draw_comparison(curves: Mapping[str, Sequence[Curve]], target: float | None) -> bytes:
    """Validation loss against steps and against training time: mean over seeds, band from lowest to highest."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for number, (name, runs) in enumerate(curves.items()):
        if runs:
            _draw_mean(by_step, by_time, name, runs, number)
    for axes in (by_step, by_time):
        if target is not None:
            dots = (0, (2, 2))
            axes.axhline(target, color="#404040", linewidth=0.8, linestyle=dots, label=f"target {target:.3f}")
    label(by_step, "optimizer steps", "validation loss (nats per token)")
    label(by_time, "training time (seconds, without evaluation)", "")
    low, high = _window([run for runs in curves.values() for run in runs])
    by_step.set_ylim(low, high)
    return png(figure)


def _draw_mean(by_step: Axes, by_time: Axes, name: str, runs: Sequence[Curve], number: int) -> None:
    color, style, marker = STYLES[number % len(STYLES)]
    columns = list(zip(*(run.losses for run in runs), strict=False))
    mean, low, high = ([f(column) for column in columns] for f in (statistics.fmean, min, max))
    seconds = [statistics.fmean(column) for column in zip(*(run.seconds for run in runs), strict=False)]
    every, shown = max(1, len(mean) // 8), _short(name)
    for axes, x in ((by_step, runs[0].steps[: len(mean)]), (by_time, seconds)):
        axes.plot(x, mean, color=color, linestyle=style, marker=marker, markersize=5, markevery=every, label=shown)
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _short(name: str) -> str:
    """A name that leaves room for the curves: one with a file in it can be wider than the panel."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 3]}...{name[-LONGEST_NAME // 3 :]}"


def _window(runs: Sequence[Curve]) -> tuple[float | None, float | None]:
    """Limits of the loss axis that leave out the steep fall in the first tenth of the steps."""
    if not runs:
        return None, None
    late = [
        loss for run in runs for step, loss in zip(run.steps, run.losses, strict=True) if step >= run.steps[-1] / 10
    ]
    low, high = min(late), max(late)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def label(axes: Axes, x: str, y: str, *, legend: bool = True) -> None:
    """Titles and grid of a panel, and its legend unless that is placed elsewhere."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, handlelength=3.5)


def png(figure: Figure) -> bytes:
    """The picture as the content of a PNG file."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
