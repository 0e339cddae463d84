"""The picture of a plan: overhead against the interval, and what fills a GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from asgo.lab.plan.estimate import Row, Setting
from asgo.lab.plot import STYLES, label, png

# shade and hatching of each part of the memory
_PARTS = {
    "params": ("#202020", ""),
    "gradients": ("#6a6a6a", ""),
    "momentum": ("#9a9a9a", "//"),
    "statistics": ("#c4c4c4", ".."),
    "roots": ("#e4e4e4", "xx"),
    "adamw": ("#ffffff", "\\\\"),
}


def draw(rows: Sequence[Row], target: float, setting: Setting, title: str) -> bytes:
    """Overhead against the interval, a curve for each mesh, and bars of the memory of the fullest rank.

    Args:
        rows: of all meshes and intervals.
        target: the overhead to stay within, drawn as a thin line.
        setting: what all rows share.
        title: of the picture.
    """
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    meshes = list(dict.fromkeys(row.mesh for row in rows))
    for number, mesh in enumerate(meshes):
        own = [row for row in rows if row.mesh == mesh]
        color, style, marker = STYLES[number % len(STYLES)]
        name = str(mesh) + ("" if own[0].fits else " (does not fit)")
        x, y = [row.interval for row in own], [100 * row.overhead for row in own]
        curves.plot(x, y, color=color, linestyle=style, marker=marker, markersize=5, label=name)
    curves.axhline(100 * target, color="#404040", linewidth=0.8, linestyle=(0, (2, 2)), label=f"{100 * target:g} %")
    curves.set_xscale("log")
    curves.set_yscale("log")
    ticks = sorted({row.interval for row in rows})
    curves.set_xticks(ticks, [str(tick) for tick in ticks])
    curves.set_xticks([], minor=True)
    curves.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    curves.yaxis.set_major_formatter("{x:g}")
    curves.yaxis.set_minor_locator(NullLocator())
    label(curves, "steps between refreshes of a root", "optimizer step (% of forward and backward)")
    curves.set_title(title, loc="left", fontsize=10)
    _below(curves, 2)
    _bars(bars, [next(row for row in rows if row.mesh == mesh) for mesh in meshes], setting)
    return png(figure)


def _bars(axes: Axes, rows: Sequence[Row], setting: Setting) -> None:
    for place, row in enumerate(reversed(rows)):
        left = 0.0
        for name, (shade, hatch) in _PARTS.items():
            size = getattr(row.memory, name) / 1e9
            shown = name if place == 0 else None
            box = {"color": shade, "hatch": hatch, "edgecolor": "black", "linewidth": 0.7}
            axes.barh(place, size, left=left, label=shown, **box)
            left += size
    room = setting.room / 1e9
    if room < 3 * max(row.memory.total for row in rows) / 1e9:
        axes.axvline(room, color="#D55E00", linestyle="--", label=f"room: {room:,.3g} GB")
    else:
        axes.plot([], [], color="#D55E00", linestyle="--", label=f"room: {room:,.3g} GB, off the scale")
    axes.set_yticks(range(len(rows)), [str(row.mesh) for row in reversed(rows)])
    label(axes, "memory of the fullest rank (GB), without activations", "")
    _below(axes, 3)


def _below(axes: Axes, columns: int) -> None:
    """The legend under the panel, where it hides nothing."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
    axes.legend(frameon=False, handlelength=3.5, ncols=columns, fontsize=9, **place)
