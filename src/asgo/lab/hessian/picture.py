"""The pictures of ``asgo inspect hessian``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from asgo.lab.hessian.pairs import Pairs
from asgo.lab.hessian.report import ERRORS, Row
from asgo.lab.plot import STYLES, label, png

FAINTEST = 1e-3
"""The smallest normalised norm that has a shade of its own."""


def draw_pairs(pairs: Sequence[Pairs]) -> bytes:
    """A heat map of the normalised norms of all blocks, for every step (down) and curvature (across)."""
    steps, kinds = _axes_of(pairs)
    count = len(pairs[0].labels)
    size = max(4.0, 0.32 * count + 1.6)
    figure = Figure(figsize=(size * len(kinds) + 1, size * len(steps)), layout="constrained")
    panels = figure.subplots(len(steps), len(kinds), squeeze=False)
    image = None
    for each in pairs:
        axes = panels[steps.index(each.step)][kinds.index(each.curvature)]
        found = [[each.normalized(i, j) for j in range(count)] for i in range(count)]
        values = np.array([[np.nan if e is None else max(e.value, FAINTEST) for e in row] for row in found])
        image = axes.imshow(values, cmap="Greys", norm=LogNorm(FAINTEST, 1))
        axes.set_xticks(range(count), each.labels, rotation=90, fontsize=8)
        axes.set_yticks(range(count), each.labels, fontsize=8)
        most = max((e.error for row in found for e in row if e is not None), default=0.0)
        note = f", standard errors up to {most:.2g}" if most else ""
        axes.set_title(f"{each.curvature}, step {each.step}{note}", fontsize=10)
    if image is not None:
        text = "||H_ij|| / sqrt(||H_ii|| ||H_jj||), Frobenius norms"
        figure.colorbar(image, ax=panels, label=text, shrink=0.7, extend="min")
    return png(figure)


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
    panels[0][0].set_ylim(-0.03, 1.03)
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
    panels[0][0].set_ylim(-0.03, 1.03)
    return png(figure)


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
