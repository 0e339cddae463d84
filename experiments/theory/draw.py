"""Pictures of regret beside its bound, of step sizes, and of where each method wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asgo.lab.figures import STYLES, label, png

SHORT = {
    "asgo": "ASGO\nleft",
    "asgo-right": "ASGO\nright",
    "adagrad": "diag",
    "adagrad-norm": "norm",
    "full-adagrad": "full",
    "shampoo": "Sham-\npoo",
}
"""Names that fit into a cell of the map."""

UNIT = "share of F(0) - F(W*)"


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(2, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(5.6 * columns + 1.8, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes[:count]


def _styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        method: dict(zip(("color", "linestyle", "marker"), STYLES[i % len(STYLES)], strict=True))
        for i, method in enumerate(methods)
    }


def _name(axes: Axes, x: str, y: str) -> None:
    """Titles and grid; the figure has one legend for all panels."""
    label(axes, x, y)
    legend = axes.get_legend()
    if legend is not None:
        legend.remove()


def _legend(figure: Figure, axes: Axes) -> None:
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right center", frameon=False, handlelength=3.5)


def draw_curves(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Mean regret (markers) and its bound (the same line, thin) against rounds, a panel for each problem."""
    problems, methods = (list(dict.fromkeys(line[name] for line in lines)) for name in ("problem", "method"))
    figure, panels = _panels(len(problems), 4.2)
    styles = _styles(methods)
    for axes, problem in zip(panels, problems, strict=True):
        for method in methods:
            own = [line for line in lines if (line["problem"], line["method"]) == (problem, method)]
            at = [line["rounds"] for line in own]
            style = styles[method]
            axes.plot(at, [_positive(line["regret"]) for line in own], markersize=4, label=method, **style)
            thin = {**style, "marker": "", "linewidth": 0.9, "alpha": 0.75}
            axes.plot(at, [_positive(line["bound"]) for line in own], **thin)
            if method == "asgo" and any(line["rate"] for line in own):
                rate = [_positive(line["rate"]) for line in own]
                axes.plot(at, rate, color="#404040", linewidth=2.5, alpha=0.35, label="theorem for asgo")
        axes.plot([], [], color="#404040", linewidth=0.9, label="thin: its own\nregret bound")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(problem, loc="left")
        _name(axes, "rounds T", f"mean regret ({UNIT})")
    _legend(figure, panels[0])
    return png(figure)


def _positive(value: float | None) -> float:
    """Logarithmic axes have no place for others."""
    return value if value is not None and value > 0 else math.nan


def draw_steps(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The largest regret over its bound against the step size, a panel for each problem; 1 is the bound."""
    problems, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("problem", "method"))
    figure, panels = _panels(len(problems), 3.4)
    styles = _styles(methods)
    for axes, problem in zip(panels, problems, strict=True):
        for method in methods:
            own = [row for row in rows if (row["problem"], row["method"]) == (problem, method)]
            own.sort(key=lambda row: row["step"])
            ratio = [_positive(row["largest_ratio"]) for row in own]
            axes.plot([row["step"] for row in own], ratio, markersize=5, label=method, **styles[method])
        axes.axhline(1, color="#404040", linewidth=1.5, label="the bound")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(problem, loc="left")
        _name(axes, "step size / the one of the smallest bound", "largest regret / bound")
    _legend(figure, panels[0])
    return png(figure)


def draw_map(points: Sequence[Mapping[str, Any]]) -> bytes:
    """Who has the smallest regret, and who the smallest bound, over gradient rank and spread of W*."""
    problems = list(dict.fromkeys(point["problem"] for point in points))
    figure = Figure(figsize=(11, 4.6 * len(problems)), layout="constrained")
    panels = figure.subplots(len(problems), 2, squeeze=False)
    for line, problem in zip(panels, problems, strict=True):
        own = [point for point in points if point["problem"] == problem]
        for axes, by, title in zip(line, ("regret", "bound"), ("measured regret", "regret bound"), strict=True):
            image = _cells(axes, own, by)
            axes.set_title(f"{problem}: smallest {title}", loc="left")
            figure.colorbar(image, ax=axes, label=f"runner-up's {by} / the winner's", shrink=0.85)
    return png(figure)


def _cells(axes: Axes, points: Sequence[Mapping[str, Any]], by: str) -> Any:
    ranks, spreads = (sorted({point[name] for point in points}) for name in ("rank", "spread"))
    lead = np.ones((len(spreads), len(ranks)))
    for i, spread in enumerate(spreads):
        for j, rank in enumerate(ranks):
            cell = [point for point in points if (point["rank"], point["spread"]) == (rank, spread)]
            first, *others = sorted(cell, key=lambda point: point[by])
            known = others and 0 < first[by] < math.inf and others[0][by] < math.inf
            lead[i, j] = others[0][by] / first[by] if known else 1.0
            axes.text(j, i, SHORT[first["method"]], ha="center", va="center", fontsize=9)
    # From white to a middle grey-blue: black letters stay readable, also in grey.
    image = axes.imshow(lead, origin="lower", cmap="Blues", vmin=1, vmax=max(2.0, 2 * lead.max() - 1), aspect="auto")
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_yticks(range(len(spreads)), [f"{spread:g}" for spread in spreads])
    axes.set_xlabel("rank: large directions of the gradients")
    axes.set_ylabel("spread of W*: D_F² / D_op²")
    return image
