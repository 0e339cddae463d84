"""Results as tables for a terminal, as markdown and as CSV, and the folder that they are written to."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from asgo.lab.bench.optimizers import CONTENDERS
from asgo.lab.files import write_json, write_text
from asgo.lab.training.environment import describe


@dataclass(frozen=True)
class Table:
    """A title, the heads of columns, and rows of text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> RichTable:
        """For a terminal: heads one word to a line, numbers to the right."""
        table = RichTable(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
        for i, name in enumerate(self.head):
            texts = [row[i] for row in self.rows]
            right = all(text[:1] in "-0123456789" for text in texts)
            table.add_column("\n".join(name.split()), justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """As a section of a markdown page."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("\n", "<br>") for cell in line) + " |" for line in lines)
        return f"## {self.title}\n\n{text}"


def show(value: float | None, form: str = "{:.2f}") -> str:
    """A number as text; ``-`` for none."""
    return "-" if value is None else form.format(value)


def csv_text(rows: Sequence[Any]) -> str:
    """Dataclasses of one kind as CSV with full numbers, a column per field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[field.name for field in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def machine(device: torch.device) -> dict[str, Any]:
    """What the benchmark ran on: as for runs, with the processor and the versions of the peers."""
    found = describe(device, 1, 0)
    del found["from_step"], found["processes"]
    peers = {row.package: row.version or "not installed" for row in CONTENDERS.values()}
    cpu = {key: value for key, value in torch.cpu.get_capabilities().items() if value}
    return {**found, "packages": {**found["packages"], **peers}, "cpu": cpu}


def write_tables(out: Path, heading: str, tables: Sequence[Table], record: dict[str, Any]) -> None:
    """Write ``table.md`` and ``results.json``."""
    write_text(out / "table.md", "\n\n".join([f"# {heading}", *(table.markdown() for table in tables)]) + "\n")
    write_json(out / "results.json", record)
