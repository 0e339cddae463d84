"""The picture of the vision experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from asgo.lab.figures import STYLES, label, png


def draw(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], percent: Mapping[str, Mapping[str, Sequence[float]]]
) -> bytes:
    """Training loss by epoch, and for every seed the training and the test error.

    Args:
        runs: method to its runs, each with ``losses``.
        percent: method to ``train error`` and ``test error`` of each seed.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for number, (method, own) in enumerate(runs.items()):
        color, style, marker = STYLES[number % len(STYLES)]
        columns = list(zip(*(run["losses"] for run in own), strict=False))
        means = [fmean(column) if None not in column else float("nan") for column in columns]
        losses.plot(range(1, len(means) + 1), means, color=color, linestyle=style, marker=marker, label=method)
        for what, filled in (("train error", "none"), ("test error", color)):
            values = percent[method][what]
            spots = [number + 0.05 * (i - len(values) / 2) for i in range(len(values))]
            errors.plot(spots, values, linestyle="", marker=marker, color=color, markerfacecolor=filled, markersize=6)
    losses.set_yscale("log")
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    label(losses, "epoch", "training loss (nats per image)")
    errors.set_xticks(range(len(runs)), list(runs), fontsize=9)
    label(errors, "filled: test, hollow: training; one mark per seed", "error (percent)")
    return png(figure)
