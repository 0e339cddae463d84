"""What the rows say, as tables: on the terminal, in ``table.md``, and with everything else in ``results.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import FILE, Row, read_rows
from benchmarks.gpu.roots import CANDIDATES, auto_table, choices


@dataclass(frozen=True)
class Table:
    """A table in Markdown, whose columns are padded so that a terminal shows it too."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))]
        lines = [self.head, ["-" * width for width in widths], *self.rows]
        cells = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in lines)
        return f"## {self.title}\n\n" + "\n".join(f"| {line} |" for line in cells) + "\n"


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last word on every row, in the order of their first: one that was tried again counts once."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["status"] != "started":
            found[row["part"], row["row"]] = row
    return list(found.values())


def write_results(out: Path, picture: bool) -> str:
    """Write ``results.json``, ``table.md`` and, where matplotlib is there, ``plot.png``; return the text of the tables.

    Args:
        out: the folder with the rows.
        picture: whether to draw, which takes a few seconds.
    """
    rows = latest(read_rows(out / FILE))
    text = f"# On a GPU\n\n{_machine(rows)}\n\n" + "\n".join(map(str, tables(rows)))
    if choices(rows):
        text += f"\n## `auto`: the fastest of {' and '.join(CANDIDATES)}, and how much longer the other takes\n\n"
        text += f"Columns are numbers of matrices.\n\n{auto_table(rows)}\n"
    if picture:
        text += f"\n{_draw(out, rows)}\n"
    _write(out / "table.md", text)
    auto = [vars(choice) for choice in choices(rows)]
    _write(out / "results.json", json.dumps({"machine": _facts(rows), "auto": auto, "rows": rows}, indent=1) + "\n")
    return text


def _draw(out: Path, rows: list[Row]) -> str:
    if find_spec("matplotlib") is None:
        return "matplotlib is not installed: no plot.png."
    from benchmarks.gpu.draw import draw  # noqa: PLC0415 (matplotlib need not be there)

    draw(out / "plot.png", rows)
    return f"Drawn in {out / 'plot.png'}."


def _write(path: Path, text: str) -> None:
    """So that the file is whole or the old one, whenever it is cut off."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _facts(rows: list[Row]) -> Row:
    return next((row for row in rows if row["status"] == "machine"), {})


def _machine(rows: list[Row]) -> str:
    found = _facts(rows)
    packages = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items())
    versions = [f"{name} {found[name]}" for name in ("cuda", "cudnn", "nccl", "python", "commit") if found.get(name)]
    note = "**A rehearsal, with tiny shapes under the names of the models: its times say nothing.**\n\n"
    described = "; ".join(filter(None, [str(found.get("device", "no device")), packages, *versions]))
    return (note if found.get("rehearsal") else "") + described


def tables(rows: list[Row]) -> list[Table]:
    """All tables for which there are rows; failures first, as they are what a reader must know."""
    found = [_failures(rows), _checks(rows), _products(rows), _speed(rows), _roots(rows), _loss(rows)]
    return [table for table in found if table.rows]


def _failures(rows: list[Row]) -> Table:
    names = ("failed", "skipped")
    cells = [[row["part"], row["row"], row["status"], row.get("error", "")] for row in rows if row["status"] in names]
    return Table("What failed, and what was skipped", ("part", "row", "", "why"), cells)


def _checks(rows: list[Row]) -> Table:
    cells = [[row["row"], _found(row)] for row in rows if row["part"] == "correctness" and row["status"] == "ok"]
    return Table("Correctness: what passed", ("check", "found"), cells)


def _found(row: Row) -> str:
    if "errors" in row:
        worst = max((error, case) for case, error in row["errors"].items())
        return f"largest error {worst[0]:.1e} ({worst[1]}), bound {row['bound']:.1e}"
    if "largest" in row:
        return f"{row['largest']:.2g} of the bound"
    if "waits" in row:
        return {True: "waits for the device", False: "never waits", None: "steps on a CPU"}[row["waits"]]
    names = ("largest difference", "equal bits", "distance", "differences", "summary")
    return next((f"{name}: {_short(row[name])}" for name in names if name in row), "")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{max(value.values()):.1e} at most"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _products(rows: list[Row]) -> Table:
    some = [row for row in rows if row["part"] == "speed" and row["status"] == "ok" and "teraflops" in row]
    names = list(dict.fromkeys(name for row in some for name in row["teraflops"]))
    cells = []
    for row in some:
        shown = [f"{row['teraflops'][name]:.3g}" if name in row["teraflops"] else "" for name in names]
        cells.append([row["row"].removesuffix(": products"), *shown])
    return Table("Rate of square products on the matrices of a model, TFLOP/s", ("model", *names), cells)


SPEED_HEAD = (
    *("model and step", "ms", "quartiles", "of Muon's", "state / parameters", "peak MiB above", "launches", "busy"),
    *("floor float32", "floor bfloat16"),
)


def _speed(rows: list[Row]) -> Table:
    some = [row for row in rows if row["part"] == "speed" and row["status"] == "ok" and "seconds" in row]
    seen = {row["row"]: row for row in rows if row["part"] == "launches" and row["status"] == "ok"}
    return Table("Speed of a step", SPEED_HEAD, [_speed_cells(row, seen.get(row["row"], {})) for row in some])


def _speed_cells(row: Row, profile: Row) -> list[str]:
    seconds, floors = row["seconds"], row.get("floor") or {}
    quartiles = f"{1e3 * row['low']:.3g} to {1e3 * row['high']:.3g}" if "low" in row else row.get("note", "")
    peak = row.get("peak_bytes")
    return [
        row["row"],
        f"{1e3 * seconds:.4g}",
        quartiles,
        f"{row['to_muon']:.2f}" if "to_muon" in row else "",
        f"{row['state_share']:.2f}" if "state_share" in row else "",
        f"{peak / 2**20:,.0f}" if peak else "",
        f"{profile['launches']:,}" if profile.get("launches") else "",
        f"{profile['busy'] / seconds:.0%}" if profile.get("busy") else "",
        *(f"{floors[name] / seconds:.0%}" if floors.get(name) else "" for name in ("float32", "bfloat16")),
    ]


def _roots(rows: list[Row]) -> Table:
    some = [row for row in rows if row["part"] == "roots" and row["status"] == "ok"]
    errors = {(row["name"], row["k"]): row["error"] for row in some if "error" in row}
    cells = []
    for row in sorted(some, key=lambda row: (row["k"], row["batch"])):
        error = errors.get((row["name"], row["k"]))
        shown = "" if error is None else f"{error:.1e}"
        cells.append([str(row["k"]), str(row["batch"]), row["name"], f"{1e3 * row['seconds']:.4g}"])
        cells[-1] += [f"{1e3 * row['each']:.4g}", f"{row['products']:.1f}", shown]
    head = ("k", "matrices", "root", "ms", "ms each", "in float32 products", "error of the step")
    return Table("Roots", head, cells)


def points(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The points of the curve of every optimizer."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] == "loss" and row["status"] == "point":
            found.setdefault(row["optimizer"], []).append(row)
    return found


def _loss(rows: list[Row]) -> Table:
    cells = []
    for name, curve in points(rows).items():
        last = curve[-1]
        cells.append([name, str(last["step"]), f"{last['seconds']:.1f}", f"{1e3 * last['seconds'] / last['step']:.1f}"])
        cells[-1] += [f"{last['train']:.4f}", f"{last['held_out']:.4f}"]
    head = ("optimizer", "steps", "seconds", "ms per step", "loss, nats per byte", "held out")
    return Table("Loss of GPT-2 124M over bytes", head, cells)
