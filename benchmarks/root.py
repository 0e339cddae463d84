"""``python -m benchmarks.root``: time and error of the inverse roots, in units of one product of the same matrices."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from asgo.lab.config.codec import command, to_json
from asgo.lab.errors import LabError
from asgo.lab.files import make_folder, write_bytes, write_text
from asgo.lab.tables import csv_text
from asgo.linalg.inverse_root import ROOTS, check_eps
from benchmarks.speed.accuracy import Accuracy, exact_steps, formula_of, measure
from benchmarks.speed.command import program, run_command
from benchmarks.speed.config import RootConfig, check
from benchmarks.speed.draw import Line, draw_roots
from benchmarks.speed.matrices import KINDS, Problem, cases
from benchmarks.speed.rows import CaseRow, RootRow
from benchmarks.speed.tables import Table, machine, show, write_tables
from benchmarks.speed.timing import Spread, WorkProgress, pick_device, place, ratio, seconds

BASELINE = "reference"
"""The released iteration: the others are so many times faster than it."""
PRODUCT = "product"
SHORTEST = 5e-3
"""Seconds: what takes less is repeated within one measurement."""


def bench_root(config: RootConfig, console: Console) -> list[RootRow]:
    """Time the roots, compare them with float64, print the tables and write them to ``--out``.

    Raises:
        LabError: for a name that does not exist, a value out of range, or a folder in use.
    """
    check(config)
    verb, refused = command(program("root"), config), _refused(config)
    config = replace(config, roots=tuple(name for name in config.roots if name not in refused))
    device = pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    make_folder(config.out)
    work = sum(k**3 * (sum(config.batches) * config.repeats + 8) for k in config.sizes) * len(config.matrices)
    with WorkProgress(console, "bench root", work) as progress:
        rows = [row for k in config.sizes for kind in config.matrices for row in _cell(config, k, kind, progress)]
    breaks = _robustness(config, device)
    tables = [*(_table(config, kind, rows) for kind in config.matrices), _case_table(breaks)]
    tables += [Table("Left out", ("root", "why"), tuple(refused.items()))] if refused else []
    for table in tables:
        console.print(table.rich())
    record: dict[str, Any] = {"command": verb, "config": to_json(config), "machine": machine(device)}
    record |= {name: [_plain(vars(row)) for row in some] for name, some in _parts(rows, breaks).items()}
    write_tables(config.out, f"`{verb}`", tables, record)
    for name, some in _parts(rows, breaks).items():
        write_text(config.out / f"{name}.csv", csv_text([vars(row) for row in some]))
    write_bytes(config.out / "plot.png", _picture(config, rows))
    console.print(f"written to {config.out}", highlight=False, soft_wrap=True)
    return rows


def _refused(config: RootConfig) -> dict[str, str]:
    """The roots that cannot work with so little damping, and why."""
    found = {}
    for name in config.roots:
        try:
            check_eps(name, config.eps)
        except ValueError as error:
            found[name] = str(error)
    if len(found) == len(config.roots):
        raise LabError(f"--roots {' '.join(found)}: none can work with --eps {config.eps:g}: pass a larger one.")
    return found


def _cell(config: RootConfig, k: int, kind: str, progress: WorkProgress) -> list[RootRow]:
    """All rows of one kind and size."""
    problem = KINDS[kind](k, pick_device(config.device), config.seed, config.real_steps)
    progress.advance(4 * k**3, f"{kind}, k = {k}: made")
    errors = measure_all(config.roots, problem, config.eps)
    progress.advance(4 * k**3, f"{kind}, k = {k}: errors")
    rows = []
    for b in config.batches:
        sound = [name for name in config.roots if isinstance(errors[name], Accuracy)]
        note = f"{kind}, k = {k}, {b} at once"
        times = _times(config, sound, problem.batch(b), lambda b=b, note=note: progress.advance(b * k**3, note))
        rows += [_row(RootRow(kind, k, b, name), errors[name], times) for name in config.roots]
    return rows


def measure_all(roots: Sequence[str], problem: Problem, eps: float) -> dict[str, Accuracy | str]:
    """The errors of every root, or what it raised."""
    exact = {formula: exact_steps(problem, eps, formula) for formula in {formula_of(name) for name in roots}}
    found: dict[str, Accuracy | str] = {}
    for name in roots:
        try:
            found[name] = measure(name, problem, eps, exact[formula_of(name)])
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return found


def _times(config: RootConfig, names: Sequence[str], grams: Tensor, tick: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds per matrix of the product and of every root, a number per round; the order is drawn in each."""
    acts: dict[str, Callable[[], object]] = {PRODUCT: lambda: grams @ grams}
    acts |= {name: lambda root=ROOTS[name]: root(grams, config.eps) for name in names}
    counts = {}
    for name, act in acts.items():
        seconds(act, grams.device)
        counts[name] = max(1, math.ceil(SHORTEST / seconds(act, grams.device)))
    times: dict[str, list[float]] = {name: [] for name in acts}
    order, dice = list(acts), random.Random(config.seed)
    for _ in range(config.repeats):
        dice.shuffle(order)
        for name in order:
            taken = seconds(lambda name=name: [acts[name]() for _ in range(counts[name])], grams.device)
            times[name].append(taken / counts[name] / len(grams))
        tick()
    return times


def _row(row: RootRow, found: Accuracy | str, times: Mapping[str, Sequence[float]]) -> RootRow:
    if isinstance(found, str):
        return replace(row, failure=found)
    own = times[row.root]
    spread = Spread.of(own)
    return replace(
        row,
        seconds=spread.median,
        low=spread.low,
        high=spread.high,
        products=ratio(own, times[PRODUCT]),
        speedup=ratio(times[BASELINE], own) if BASELINE in times else None,
        median_error=found.median_error,
        max_error=found.max_error,
        min_cos=found.min_cos,
        finite=found.finite,
    )


def _robustness(config: RootConfig, device: torch.device) -> list[CaseRow]:
    """Every root on every case."""
    rows = []
    for case in cases(device, config.seed):
        for name, found in measure_all(config.roots, case.problem, config.eps).items():
            if isinstance(found, str):
                rows.append(CaseRow(case.name, name, False, None, False, found))
            else:
                rows.append(CaseRow(case.name, name, found.finite, found.max_error, found.told))
    return rows


# ---- tables and pictures -----------------------------------------------------------------------------------------


def _table(config: RootConfig, kind: str, rows: Sequence[RootRow]) -> Table:
    """One kind: a row per root, a column per size, of the largest batch."""
    batch = max(config.batches)
    own = {(row.root, row.size): row for row in rows if (row.matrices, row.batch) == (kind, batch)}
    where = place(pick_device(config.device))
    title = f"{kind}, {batch} at once, {where}: products (times faster than {BASELINE}), largest error"
    cells = [(name, *(_cell_text(own[name, k]) for k in config.sizes)) for name in config.roots]
    return Table(title, ("root", *(f"k={k}" for k in config.sizes)), tuple(cells))


def _cell_text(row: RootRow) -> str:
    if row.products is None:
        return row.failure
    speed = "" if row.speedup is None else f" ({row.speedup:.2g}x)"
    return f"{row.products:.3g}{speed}\n{show(row.max_error, '{:.1e}')}"


def _case_table(rows: Sequence[CaseRow]) -> Table:
    """A row per case, a column per root."""
    names = list(dict.fromkeys(row.root for row in rows))
    found = {(row.case, row.root): row for row in rows}
    cells = [(case, *(_case_text(found[case, name]) for name in names)) for case in dict.fromkeys(r.case for r in rows)]
    return Table("Robustness: largest error over sound matrices", ("case", *names), tuple(cells))


def _case_text(row: CaseRow) -> str:
    notes = [row.failure] if row.failure else [show(row.max_error, "{:.1e}")]
    notes += [] if row.finite else ["not finite"]
    notes += [] if row.told else ["not told"]
    return "\n".join(notes)


def _picture(config: RootConfig, rows: Sequence[RootRow]) -> bytes:
    """Cost on the first kind and errors on the last, of the largest batch."""
    kinds, batch = (config.matrices[0], config.matrices[-1]), max(config.batches)

    def lines(kind: str, value: Callable[[RootRow], float | None]) -> list[Line]:
        found = []
        for name in config.roots:
            own = [row for row in rows if (row.root, row.matrices, row.batch) == (name, kind, batch)]
            points = [(row.size, y) for row in own if (y := value(row)) is not None and math.isfinite(y) and y > 0]
            found += [Line(name, *(tuple(axis) for axis in zip(*points, strict=True)))] if points else []
        return found

    titles = f"cost: {kinds[0]}, {batch} at once", f"error: {kinds[1]}, eps {config.eps:g}"
    return draw_roots(lines(kinds[0], lambda row: row.products), lines(kinds[1], lambda row: row.max_error), titles)


def _parts(rows: Sequence[RootRow], breaks: Sequence[CaseRow]) -> dict[str, Sequence[Any]]:
    return {"table": rows, "robustness": breaks}


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no infinity."""
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark; the words are those of the process if None."""
    return run_command("root", RootConfig, bench_root, args)


if __name__ == "__main__":
    sys.exit(main())
