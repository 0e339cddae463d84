"""The rows of a plan as cells of tables and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asgo.lab.plan.estimate import Row, Setting

MEMORY_HEAD = (
    *("mesh", "params GB", "gradients GB", "momentum GB", "statistics GB", "roots GB", "AdamW GB", "all GB"),
    *("of memory %", "fits"),
)
TIME_HEAD = (
    *("mesh", "every", "statistics ms", "roots ms", "application ms", "elements ms", "links ms", "step ms"),
    *("overhead %", "worst step %", "roots mean", "roots worst", "products mean", "products worst", "sent MB"),
)
NOTE = (
    "Memory: of the fullest rank, in 1e9 bytes, without activations. Times: of the slowest rank, mean over an "
    "interval; overhead and worst step are shares of forward and backward. Roots: refreshed in a step in the whole "
    "model; products: matrix products of a step on the busiest rank; sent: by the busiest rank in the mean step, "
    "without gradients. The first ten steps refresh every root."
)


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def memory_cells(rows: Sequence[Row], setting: Setting) -> list[list[str]]:
    """A line for each mesh."""
    first = {str(row.mesh): row for row in reversed(rows)}
    whole, lines = setting.machine.gpu.memory_gb * 1e9, []
    for name, row in reversed(first.items()):
        kept = row.memory
        sizes = (kept.params, kept.gradients, kept.momentum, kept.statistics, kept.roots, kept.adamw, kept.total)
        share = number(100 * kept.total / whole)
        lines.append([name, *(number(size / 1e9) for size in sizes), share, "yes" if row.fits else "no"])
    return lines


def time_cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each mesh and interval."""
    return [
        [
            str(row.mesh),
            str(row.interval),
            *(
                number(1e3 * seconds)
                for seconds in (row.statistics, row.roots, row.application, row.elementwise, row.links, row.step)
            ),
            *(number(100 * share) for share in (row.overhead, row.worst_overhead)),
            *(number(count) for count in (row.roots_mean, row.roots_worst, row.products_mean, row.products_worst)),
            number(row.bytes_sent / 1e6),
        ]
        for row in rows
    ]


def record(row: Row) -> dict[str, Any]:
    """A row as plain data: times in seconds, sizes in bytes."""
    plain = {key: value for key, value in vars(row).items() if key not in ("mesh", "memory")}
    sizes = {f"{key}_bytes": value for key, value in vars(row.memory).items()}
    return {"mesh": str(row.mesh)} | plain | sizes | {"total_bytes": row.memory.total}
