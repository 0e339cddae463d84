"""The picture of a record: steps, roots and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from benchmarks.gpu.peers import MUON
from benchmarks.gpu.record import Row
from benchmarks.gpu.results import points


def draw(path: Path, rows: list[Row]) -> None:
    """Write the picture."""
    figure = Figure(figsize=(15, 11), layout="constrained")
    axes = figure.subplots(2, 2)
    _steps(axes[0][0], rows)
    _roots(axes[0][1], rows)
    _losses(axes[1][0], rows, "step", "steps")
    _losses(axes[1][1], rows, "seconds", "seconds of training")
    figure.savefig(path, dpi=110)


def _steps(axis: Any, rows: list[Row]) -> None:
    """Of each step the time in times of Muon's."""
    timed = [row for row in rows if row["part"] == "speed" and row["status"] == "ok" and "to_muon" in row]
    names = list(dict.fromkeys(row["row"].partition(": ")[2] for row in timed))
    models = list(dict.fromkeys(row["row"].partition(": ")[0] for row in timed))
    for number, model in enumerate(models):
        mine = {row["row"].partition(": ")[2]: row["to_muon"] for row in timed if row["row"].startswith(f"{model}: ")}
        places = [names.index(name) + (number - len(models) / 2) / (len(models) + 1) for name in mine]
        axis.barh(places, list(mine.values()), height=1 / (len(models) + 1), label=model)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    _finish(axis, f"A step, in times of {MUON}'s", "ratio", "", timed)
    if timed:
        axis.axvline(1, color="gray", linewidth=1)
        axis.set_xscale("log")


def _roots(axis: Any, rows: list[Row]) -> None:
    """The time of one root by size, in the largest stack that was timed."""
    timed = [row for row in rows if row["part"] == "roots" and row["status"] == "ok"]
    for name in dict.fromkeys(row["name"] for row in timed):
        each: dict[int, tuple[int, float]] = {}
        for row in (row for row in timed if row["name"] == name):
            each[row["k"]] = max(each.get(row["k"], (0, 0.0)), (row["batch"], row["each"]))
        sizes = sorted(each)
        axis.plot(sizes, [1e3 * each[k][1] for k in sizes], marker="o", label=name)
    if timed:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    _finish(axis, "A root, in the largest stack that was timed", "k", "ms per matrix", timed)


def _losses(axis: Any, rows: list[Row], key: str, label: str) -> None:
    curves = points(rows)
    for name, curve in curves.items():
        axis.plot([row[key] for row in curve], [row["held_out"] for row in curve], label=name)
    _finish(axis, "Held-out loss of GPT-2 124M over bytes", label, "nats per byte", curves)


def _finish(axis: Any, title: str, x: str, y: str, content: Any) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if content:
        axis.legend(fontsize=7)
