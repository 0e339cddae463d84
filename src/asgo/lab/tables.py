"""The one writer of tables: for a terminal, as markdown, and as CSV with full numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """Rows for a narrow terminal: titles one word to a line, the first column to the left."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for i, name in enumerate(columns):
        first = i == 0
        text = name if first else "\n".join(name.split())
        table.add_column(text, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a markdown table, the first column to the left."""
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\n", "<br>") for cell in line) + " |" for line in lines)


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as CSV; None is an empty field. `columns` are the keys of the first row if None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
