"""The pictures of the Hessian experiment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from asgo.lab.figures import STYLES, label, png
from experiments.hessian.pairs import Pairs
from experiments.hessian.report import ERRORS, Row

FAINTEST = 1e-3
"""The smallest normalised norm that has a shade of its own."""

NUMBERED = 16
"""Most matrices for which every block has its number written in."""


def draw_pairs(pairs: Sequence[Pairs]) -> bytes:
    """A heat map of the normalised norms of all blocks, for every step (down) and curvature (across)."""
    steps, kinds = _axes_of(pairs)
    size = max(4.0, 0.4 * len(pairs[0].labels) + 1.6)
    figure = Figure(figsize=(size * len(kinds) + 1, size * len(steps)), layout="constrained")
    panels = figure.subplots(len(steps), len(kinds), squeeze=False)
    values = [each.matrix() for each in pairs]
    known = np.concatenate([part[np.isfinite(part)] for part in values] + [np.ones(1)])
    shades = LogNorm(max(FAINTEST, known.min() / 1.1), known.max() * 1.1)
    for each, own in zip(pairs, values, strict=True):
        axes = panels[steps.index(each.step)][kinds.index(each.curvature)]
        image = axes.imshow(own, cmap="Greys", norm=shades)
        _inscribe(axes, each, own, shades)
        if each is pairs[-1]:
            text = "||H_ij|| / sqrt(||H_ii|| ||H_jj||), Frobenius norms"
            figure.colorbar(image, ax=panels, label=text, shrink=0.7)
    return png(figure)


def _inscribe(axes: Axes, pairs: Pairs, values: np.ndarray, shades: LogNorm) -> None:
    """Names, numbers, lines between layers, and the largest standard error."""
    count = len(pairs.labels)
    axes.set_xticks(range(count), pairs.labels, rotation=90, fontsize=8)
    axes.set_yticks(range(count), pairs.labels, fontsize=8)
    for i, j in np.argwhere(np.isfinite(values)) if count <= NUMBERED else ():
        color = "white" if shades(values[i, j]) > 0.5 else "black"
        axes.text(j, i, _short(float(values[i, j])), ha="center", va="center", fontsize=6, color=color)
    for edge in (i - 0.5 for i in range(1, count) if pairs.layers[i] != pairs.layers[i - 1]):
        axes.axhline(edge, color="#D55E00", linewidth=1)
        axes.axvline(edge, color="#D55E00", linewidth=1)
    note = f", standard errors up to {100 * pairs.largest_error:.0f} %" if pairs.largest_error else ""
    axes.set_title(f"{pairs.curvature}, step {pairs.step}{note}", fontsize=10)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def draw_blocks(rows: Sequence[Row]) -> bytes:
    """Share of the squared norm within heads and within output neurons, beside a structureless matrix's."""
    steps = sorted({row.step for row in rows})
    figure = _figure(rows, len(steps))
    panels = figure.subplots(2, len(steps), squeeze=False, sharey=True, sharex="row")
    for column, step in enumerate(steps):
        for line, (name, what) in enumerate((("groups", "by head"), ("rows", "by output neuron"))):
            own = [row for row in rows if row.step == step]
            _dots(panels[line][column], own, [name], "" if column else f"share of squared norm {what}")
            panels[line][column].set_title(f"{what}, step {step}", fontsize=10)
    _limit(panels[0][0], rows, ["groups", "rows"])
    return png(figure)


def draw_sides(rows: Sequence[Row]) -> bytes:
    """Relative norms of the projections on the left and the right algebra, for every step and curvature."""
    steps, kinds = _axes_of(rows)
    figure = _figure(rows, len(steps), max(len(kinds), 1))
    panels = figure.subplots(len(kinds), len(steps), squeeze=False, sharey=True, sharex=True)
    for column, step in enumerate(steps):
        for line, kind in enumerate(kinds):
            own = [row for row in rows if (row.step, row.curvature) == (step, kind)]
            _dots(panels[line][column], own, ["left", "right"], "" if column else "relative norm of projection")
            panels[line][column].set_title(f"{kind}, step {step}", fontsize=10)
    _limit(panels[0][0], rows, ["left", "right"])
    return png(figure)


def _limit(axes: Axes, rows: Sequence[Row], shares: Sequence[str]) -> None:
    """From 0 to 1, or to the largest estimate beyond."""
    found = [row.shares[name].value for row in rows for name in shares if name in row.shares]
    axes.set_ylim(-0.03, max([1.0, *found]) + 0.03)


def _axes_of(found: Sequence[Pairs] | Sequence[Row]) -> tuple[list[int], list[str]]:
    return sorted({each.step for each in found}), list(dict.fromkeys(each.curvature for each in found))


def _figure(rows: Sequence[Row], across: int, down: int = 2) -> Figure:
    names = len({row.matrix.name for row in rows})
    return Figure(figsize=(max(4.5, 0.33 * names + 1.2) * across, 3.6 * down), layout="constrained")


def _dots(axes: Axes, rows: Sequence[Row], shares: Sequence[str], title: str) -> None:
    """A mark with its error bar for each matrix, share and curvature, and a bar where a structureless matrix is."""
    known = [row for row in rows if any(name in row.shares for name in shares)]
    places = {name: place for place, name in enumerate(dict.fromkeys(row.matrix.label for row in known))}
    kinds = list(dict.fromkeys(row.curvature for row in rows))
    series = [(kind, name) for kind in kinds for name in shares]
    for number, (kind, name) in enumerate(series):
        own = [row for row in known if row.curvature == kind and name in row.shares]
        color, _, marker = STYLES[number]
        spots = [places[row.matrix.label] + 0.22 * (number - (len(series) - 1) / 2) for row in own]
        values = [row.shares[name].value for row in own]
        errors = [ERRORS * row.shares[name].error for row in own]
        fill = "none" if number else color
        text = kind if len(shares) == 1 else name
        axes.errorbar(
            spots, values, errors, linestyle="", marker=marker, color=color, markerfacecolor=fill, capsize=2, label=text
        )
        bases = [row.structureless[name] for row in own]
        base = "structureless" if number == len(series) - 1 else "_"  # matplotlib leaves such names out
        axes.hlines(bases, [s - 0.11 for s in spots], [s + 0.11 for s in spots], color="#404040", label=base)
    axes.set_xticks(list(places.values()), list(places), rotation=90, fontsize=8)
    label(axes, "", title)
