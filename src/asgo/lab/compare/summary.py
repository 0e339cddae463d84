"""The table of a comparison: what each optimizer reached, when, and at what cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from asgo.lab import tables
from asgo.lab.figures import Curve


@dataclass(frozen=True)
class Outcome:
    """One run of a comparison.

    Args:
        seed: its seed.
        result: what its ``result.json`` holds.
        curve: its validation losses.
    """

    seed: int
    result: Mapping[str, Any]
    curve: Curve

    @property
    def finished(self) -> bool:
        """Whether the run came to its last step with a finite loss."""
        return self.result["status"] == "finished"


@dataclass(frozen=True)
class Row:
    """One optimizer of a comparison; means are over finished runs, None where there is none.

    Args:
        optimizer: its spec.
        lr: peak learning rate.
        runs: number of runs.
        diverged: how many of them ended with a loss that is not finite.
        val_loss: mean final validation loss, nats per token.
        spread: standard deviation of the final losses over seeds; None below two runs.
        best: lowest final loss of a run.
        reached: runs that reached the target.
        steps_to_target: mean steps to the first evaluation at or below the target, over runs that reached it.
        seconds_to_target: the same in seconds of training.
        seconds_per_step: mean training time of a step.
        optimizer_share: share of it inside the optimizer.
        failed_roots: inverse roots that failed, all runs together.
        state_bytes: optimizer state of one run.
    """

    optimizer: str
    lr: float
    runs: int
    diverged: int
    val_loss: float | None
    spread: float | None
    best: float | None
    reached: int
    steps_to_target: float | None
    seconds_to_target: float | None
    seconds_per_step: float | None
    optimizer_share: float | None
    failed_roots: int
    state_bytes: int | None


def choose_target(target: str, outcomes: Mapping[str, Sequence[Outcome]], reference: str | None = None) -> float | None:
    """The loss of steps-to-target: a number, or for ``auto`` the worst last loss on the curve of a finished run.

    Every finished run then reaches it, at the latest with its last evaluation. With a reference, ``auto`` is the worst
    of its runs alone: all of its own reach it, and so do better optimizers. None if no run finished.
    """
    if target != "auto":
        return float(target)
    counted = outcomes.values() if reference is None else [outcomes[reference]]
    losses = [run.curve.losses[-1] for runs in counted for run in runs if run.finished]
    return max(losses, default=None)


def summarize(optimizer: str, lr: float, outcomes: Sequence[Outcome], target: float | None) -> Row:
    """The row of one optimizer."""
    done = [run for run in outcomes if run.finished]
    losses = [run.result["val_loss"] for run in done]
    hits = [hit for run in done if target is not None and (hit := run.curve.reaches(target))]
    return Row(
        optimizer=optimizer,
        lr=lr,
        runs=len(outcomes),
        diverged=len(outcomes) - len(done),
        val_loss=_mean(losses),
        spread=stdev(losses) if len(losses) > 1 else None,
        best=min(losses, default=None),
        reached=len(hits),
        steps_to_target=_mean([steps for steps, _ in hits]),
        seconds_to_target=_mean([seconds for _, seconds in hits]),
        seconds_per_step=_mean([run.result["seconds_per_step"] for run in done]),
        optimizer_share=_mean([run.result["optimizer_share"] for run in done]),
        failed_roots=sum(run.result["failed_roots"] for run in done),
        state_bytes=done[0].result["state_bytes"] if done else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


COLUMNS = (
    "optimizer",
    "lr",
    "val loss",
    "best",
    "steps to target",
    "seconds to target",
    "ms per step",
    "opt. share",
    "failed roots",
    "state MB",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of `COLUMNS`."""
    spread = "" if row.spread is None else f" ± {row.spread:.4f}"
    loss = "-" if row.val_loss is None else f"{row.val_loss:.4f}{spread}"
    missed = "" if row.reached == row.runs else f" ({row.reached} of {row.runs} runs)"
    return (
        row.optimizer,
        f"{row.lr:.4g}",
        loss + (f" ({row.diverged} of {row.runs} diverged)" if row.diverged else ""),
        _show(row.best, "{:.4f}"),
        _show(row.steps_to_target, "{:.0f}", missed),
        _show(row.seconds_to_target, "{:.1f}", missed),
        _show(None if row.seconds_per_step is None else row.seconds_per_step * 1e3, "{:.1f}"),
        _show(None if row.optimizer_share is None else row.optimizer_share * 100, "{:.0f} %"),
        str(row.failed_roots),
        _show(None if row.state_bytes is None else row.state_bytes / 1e6, "{:.2f}"),
    )


def _show(value: float | None, form: str, note: str = "") -> str:
    return "-" if value is None or math.isnan(value) else form.format(value) + note


def rich_table(rows: Sequence[Row], title: str) -> Table:
    """The rows for a terminal of 80 columns: titles one word to a line, and without the best run."""
    shown = [i for i, name in enumerate(COLUMNS) if name != "best"]
    texts = [cells(row) for row in rows]
    return tables.rich_table([COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in texts], title)


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    return tables.markdown(COLUMNS, [cells(row) for row in rows])


def csv_table(rows: Sequence[Row]) -> str:
    """The rows as CSV, with full numbers, one column per field of `Row`."""
    return tables.csv_text([vars(row) for row in rows], list(Row.__dataclass_fields__))
