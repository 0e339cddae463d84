"""``python -m benchmarks.step``: seconds and bytes of one optimizer step on the shapes of real models."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from asgo.lab.config.codec import command, to_json
from asgo.lab.files import make_folder, write_bytes, write_text
from asgo.lab.tables import csv_text
from benchmarks.speed.command import program, run_command
from benchmarks.speed.config import StepConfig, check
from benchmarks.speed.draw import Bar, draw_steps
from benchmarks.speed.optimizers import BENCH_OPTIMIZERS, HB, compilation
from benchmarks.speed.race import Entry, Sweep, TimedOptimizer, make_entries, sweeps, work
from benchmarks.speed.tables import Table, machine, show, write_tables
from benchmarks.speed.timing import Spread, WorkProgress, free_bytes, pick_device, place, ratio
from benchmarks.speed.workloads import Workload, make_workload

Timed = tuple[TimedOptimizer, dict[str, TimedOptimizer]]
"""An optimizer, and those of its sweep by name."""

SHARE = 0.6
"""Of the free memory that states may take unless ``--memory`` says otherwise."""


@dataclass(frozen=True)
class StepRow:
    """One optimizer on one workload; numbers are None where it failed, ratios where the other is not there.

    Args:
        shapes: the workload.
        optimizer: name of the spec.
        interval: steps between refreshes; None: nothing to refresh.
        package: distribution and version.
        about: what it is.
        failure: why there are no numbers; empty if there are.
        seconds: median over turns of the mean time of a step.
        low: lower quartile.
        high: upper quartile.
        worst: the slowest step of the interval over the median one.
        to_muon: median over rounds of its time over that of torch's Muon.
        to_adamw: the same for AdamW with foreach.
        to_adamw_fused: the same for fused AdamW.
        to_reference: the same for the released ASGO.
        state_bytes: what it keeps between steps.
        state_share: the same over the bytes of the parameters.
        peak_bytes: the most that a step takes on top.
    """

    shapes: str
    optimizer: str
    interval: int | None
    package: str
    about: str
    failure: str = ""
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    worst: float | None = None
    to_muon: float | None = None
    to_adamw: float | None = None
    to_adamw_fused: float | None = None
    to_reference: float | None = None
    state_bytes: int | None = None
    state_share: float | None = None
    peak_bytes: int | None = None

    @property
    def label(self) -> str:
        """Name, and the interval if it is not 1."""
        return str(Entry(self.optimizer, self.interval))


COLUMNS = (
    "optimizer",
    "every",
    "ms per step",
    "IQR %",
    "worst step",
    "x Muon",
    "x AdamW",
    "x fused",
    "x ref",
    "state x",
    "peak MB",
)


def cells(row: StepRow) -> tuple[str, ...]:
    """A row as text, in the order of `COLUMNS`."""
    every = "-" if row.interval is None else str(row.interval)
    if row.seconds is None or row.low is None or row.high is None:
        return (row.optimizer, every, *("-",) * (len(COLUMNS) - 2))
    return (
        row.optimizer,
        every,
        _ms(row.seconds),
        f"{100 * (row.high - row.low) / row.seconds:.0f}",
        show(row.worst),
        *(show(value) for value in (row.to_muon, row.to_adamw, row.to_adamw_fused, row.to_reference)),
        show(row.state_share),
        show(None if row.peak_bytes is None else row.peak_bytes / 1e6, "{:.3g}"),
    )


def _ms(value: float) -> str:
    return f"{value * 1e3:,.0f}" if value >= 1 else f"{value * 1e3:.4g}"


def bench_step(config: StepConfig, console: Console) -> list[StepRow]:
    """Time the optimizers on every workload, print the tables, and write table, picture and record to ``--out``.

    Raises:
        LabError: for a name that does not exist, a value out of range, or a folder in use.
    """
    check(config)
    device = pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    make_folder(config.out)
    verb = command(program("step"), config)
    record: dict[str, Any] = {"command": verb, "config": to_json(config), "machine": machine(device)}
    record |= {"workloads": {}, "rows": [], "turns": {}}
    rows: list[StepRow] = []
    tables: list[Table] = []
    panels: dict[str, list[Bar]] = {}
    for name in config.shapes:
        dtype = getattr(torch, config.dtype)
        workload = make_workload(name, config.layers, config.matrices_only, device, dtype, config.seed)
        racers = race(workload, config, console)
        found = [_row(workload, racer, rivals) for racer, rivals in racers]
        rows += found
        tables.append(Table(_title(workload, device, config), COLUMNS, tuple(map(cells, found))))
        panels[tables[-1].title] = _bars(found)
        _print(console, tables[-1], found)
        record["workloads"][name] = _describe(workload)
        record["rows"] += [vars(row) for row in found]
        record["turns"][name] = {str(racer.entry): racer.turns for racer, _ in racers}
        write_tables(config.out, f"`{verb}`", tables, record)
        write_text(config.out / "table.csv", csv_text([vars(row) for row in rows]))
        write_bytes(config.out / "plot.png", draw_steps(panels))
    console.print(f"written to {config.out}", highlight=False, soft_wrap=True)
    return rows


def race(workload: Workload, config: StepConfig, console: Console) -> list[Timed]:
    """Every optimizer on one workload, with those of its sweep by name; the anchors are those of the first sweep."""
    entries = make_entries(config.optimizers, config.intervals)
    free = SHARE * free_bytes(workload.params[0].device)
    groups = list(sweeps(entries, workload, free if config.memory is None else config.memory * 1e9))
    total = sum(work(entry, config.warm, config.repeats) for group in groups for entry in group)
    found: dict[Entry, Timed] = {}
    with WorkProgress(console, "bench step", total) as progress, compilation(config.compile_peers):
        for group in groups:
            racers = Sweep(workload, group, config, progress).run()
            rivals = {racer.entry.name: racer for racer in racers}
            found = {racer.entry: (racer, rivals) for racer in racers} | found
    return [found[entry] for entry in entries]


def _row(workload: Workload, racer: TimedOptimizer, rivals: Mapping[str, TimedOptimizer]) -> StepRow:
    entry, spec = racer.entry, racer.entry.spec
    package = f"{spec.package} {spec.version or '(not installed)'}"
    row = StepRow(workload.name, entry.name, entry.interval, package, spec.about, racer.failure)
    if racer.failure:
        return row
    spread = Spread.of(racer.means)

    def to(name: str) -> float | None:
        return ratio(racer.means, rivals[name].means) if name in rivals else None

    return replace(
        row,
        seconds=spread.median,
        low=spread.low,
        high=spread.high,
        worst=racer.worst,
        to_muon=to("muon"),
        to_adamw=to("adamw"),
        to_adamw_fused=to("adamw-fused"),
        to_reference=to("asgo-reference"),
        state_bytes=racer.state_bytes,
        state_share=None if racer.state_bytes is None else racer.state_bytes / workload.bytes,
        peak_bytes=racer.peak_bytes,
    )


def _title(workload: Workload, device: torch.device, config: StepConfig) -> str:
    compiles = any(BENCH_OPTIMIZERS[name].package == HB for name in config.optimizers)
    note = f"; {HB} {'compiled' if config.compile_peers else 'eager'}" if compiles else ""
    matrices = sum(param.numel() for _, param in workload.matrices)
    return (
        f"{workload.name}: {workload.about}; {workload.numel / 1e6:.4g}M parameters, {matrices / 1e6:.4g}M of them in "
        f"{len(workload.matrices)} matrices; {workload.params[0].dtype}, {place(device)}{note}"
    )


def _describe(workload: Workload) -> dict[str, Any]:
    """What was stepped, for the record."""
    return {
        "about": workload.about,
        "parameters": workload.numel,
        "bytes": workload.bytes,
        "matrices": [[name, list(param.shape)] for name, param in workload.matrices],
        "rest": [[name, list(param.shape)] for name, param in workload.rest],
    }


def _print(console: Console, table: Table, rows: Sequence[StepRow]) -> None:
    console.print(table.rich())
    for row in rows:
        if row.failure:
            console.print(f"{row.label}: {row.failure}", highlight=False, markup=False, soft_wrap=True)


def _bars(rows: Sequence[StepRow]) -> list[Bar]:
    bars = []
    for row in rows:
        if row.seconds is not None and row.low is not None and row.high is not None:
            family = BENCH_OPTIMIZERS[row.optimizer].package
            middle, low, high = (1e3 * value for value in (row.seconds, row.low, row.high))
            note = _ms(row.seconds) + ("" if row.to_muon is None else f"  ({row.to_muon:.2f} x Muon)")
            family = family if family in ("asgo", "torch") else "other packages"
            bars.append(Bar(row.label, family, middle, low, high, note))
    return bars


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark; the words are those of the process if None."""
    return run_command("step", StepConfig, bench_step, args)


if __name__ == "__main__":
    sys.exit(main())
