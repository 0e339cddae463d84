"""Pictures of the benchmarks, readable in grey: bars differ by shade and hatching, curves by line and marker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from asgo.lab.figures import STYLES, png

# shade and hatching of each family of bars
_FAMILIES = {"asgo": ("#202020", ""), "torch": ("#9a9a9a", "//"), "other packages": ("#ededed", "..")}


@dataclass(frozen=True)
class Bar:
    """One bar.

    Args:
        label: what it is.
        family: asgo, torch or other packages.
        value: its length.
        low: lower end of its whisker.
        high: upper end of its whisker.
        note: text at its end.
    """

    label: str
    family: str
    value: float
    low: float
    high: float
    note: str


def draw_steps(panels: Mapping[str, Sequence[Bar]]) -> bytes:
    """Milliseconds per step as horizontal bars on a logarithmic axis, a panel per workload, the fastest on top.

    Args:
        panels: the bars by title.
    """
    heights = [1.4 + 0.32 * max(1, len(bars)) for bars in panels.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (title, bars) in zip(grid[:, 0], panels.items(), strict=True):
        _draw_bars(axes, title, sorted(bars, key=lambda bar: -bar.value))
    return png(figure)


def _draw_bars(axes: Axes, title: str, bars: Sequence[Bar]) -> None:
    for place, bar in enumerate(bars):
        shade, hatch = _FAMILIES[bar.family]
        axes.barh(place, bar.value, color=shade, hatch=hatch, edgecolor="black", linewidth=0.7)
        axes.plot([bar.low, bar.high], [place, place], color="#d55e00", linewidth=2)
        axes.annotate(bar.note, (bar.high, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_xlabel("milliseconds per step: median and quartiles", fontsize=9)
    axes.set_title(title.replace("; ", "\n", 1), loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if bars:
        axes.set_xscale("log")
        axes.set_xlim(min(bar.low for bar in bars) / 2, max(bar.high for bar in bars) * 4)
        shown = {bar.family for bar in bars}
        patches = [
            Patch(facecolor=shade, hatch=hatch, edgecolor="black", label=name)
            for name, (shade, hatch) in _FAMILIES.items()
            if name in shown
        ]
        axes.legend(handles=patches, frameon=False, loc="upper right")
    else:
        axes.text(0.5, 0.5, "nothing ran", transform=axes.transAxes, ha="center")


@dataclass(frozen=True)
class Line:
    """One curve: `y` against `x`."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def draw_roots(cost: Sequence[Line], error: Sequence[Line], titles: tuple[str, str]) -> bytes:
    """Cost in products and error, each against the size of the matrices, on logarithmic axes.

    Args:
        cost: products per matrix, a curve per root.
        error: largest relative error, a curve per root.
        titles: of both panels.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    for axes, lines, title, label in zip(
        figure.subplots(1, 2), (cost, error), titles, ("k x k products", "largest relative error"), strict=True
    ):
        for number, line in enumerate(lines):
            color, style, marker = STYLES[number % len(STYLES)]
            axes.plot(line.x, line.y, color=color, linestyle=style, marker=marker, label=line.label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({x for line in lines for x in line.x}), minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("k")
        axes.set_ylabel(label)
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, frameon=False, handlelength=3.5, loc="outside lower center", ncols=8)
    return png(figure)
