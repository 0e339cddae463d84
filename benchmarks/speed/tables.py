"""Results as tables for a terminal, as markdown and as CSV, and the folder that they are written to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as RichTable

from asgo.lab import tables
from asgo.lab.files import write_json, write_text
from asgo.lab.training.environment import describe
from benchmarks.speed.optimizers import BENCH_OPTIMIZERS


@dataclass(frozen=True)
class Table:
    """A title, the names of columns, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> RichTable:
        """For a terminal."""
        return tables.rich_table(self.columns, self.rows, self.title)

    def markdown(self) -> str:
        """As a section of a markdown page."""
        return f"## {self.title}\n\n{tables.markdown(self.columns, self.rows)}"


def show(value: float | None, form: str = "{:.2f}") -> str:
    """A number as text; ``-`` for none."""
    return "-" if value is None else form.format(value)


def machine(device: torch.device) -> dict[str, Any]:
    """What the benchmark ran on: as for runs, with the processor and the versions of the peers."""
    found = describe(device, 1, 0)
    del found["from_step"], found["processes"]
    peers = {row.package: row.version or "not installed" for row in BENCH_OPTIMIZERS.values()}
    cpu = {key: value for key, value in torch.cpu.get_capabilities().items() if value}
    return {**found, "packages": {**found["packages"], **peers}, "cpu": cpu}


def write_tables(out: Path, heading: str, found: Sequence[Table], record: dict[str, Any]) -> None:
    """Write ``table.md`` and ``results.json``."""
    write_text(out / "table.md", "\n\n".join([f"# {heading}", *(table.markdown() for table in found)]) + "\n")
    write_json(out / "results.json", record)
