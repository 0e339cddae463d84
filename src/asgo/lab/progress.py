"""What a run shows while it trains: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERVAL = 10.0
"""Seconds between plain lines."""


class RunProgress:
    """Shows step, losses, speed, time passed and time left of one run.

    Args:
        console: where to show it; a quiet console shows nothing.
        title: what runs, for example ``asgo seed 0``.
        steps: the last step.
    """

    def __init__(self, console: Console, title: str, steps: int) -> None:
        self.console = console
        self.title = title
        self.steps = steps
        self.shown: dict[str, float] = {}
        self._began = self._printed = time.monotonic()
        self._first = 0
        self._live: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> RunProgress:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}", markup=False),
            )
            live = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self._task = live.add_task(self.title, total=self.steps, text="")
            live.start()
            self._live = live
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, step: int) -> None:
        """The run starts, or goes on, after `step`."""
        self._began, self._first = time.monotonic(), step
        if self._live is not None:
            self._live.reset(self._task, completed=step, total=self.steps, text="")

    def update(self, step: int, line: dict[str, Any]) -> None:
        """Show the newest numbers: any of ``loss``, ``val_loss``, ``tokens_per_second``."""
        keys = ("loss", "val_loss", "tokens_per_second")
        self.shown |= {key: line[key] for key in keys if key in line}
        if self._live is not None:
            self._live.update(self._task, completed=step, text=self._text(step))
        elif step == self.steps or time.monotonic() - self._printed >= INTERVAL:
            self._printed = time.monotonic()
            elapsed = self._printed - self._began
            left = elapsed / max(1, step - self._first) * (self.steps - step)
            text = f"{self.title}  {self._text(step)}  elapsed {_clock(elapsed)}  left {_clock(left)}"
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _text(self, step: int) -> str:
        formats = {"loss": "loss {:.3f}", "val_loss": "val {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}
        parts = [form.format(self.shown[key]) for key, form in formats.items() if key in self.shown]
        return "  ".join([f"step {step}/{self.steps}", *parts])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
