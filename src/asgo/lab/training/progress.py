"""What is shown while something runs: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERVAL = 10.0
"""Seconds between plain lines."""


class _Progress(Progress):
    """A bar with something above it."""

    above: Callable[[], RenderableType] | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.above is not None:
            yield self.above()
        yield from super().get_renderables()


class LiveLine:
    """Shows how far something is, with the time passed and the time left.

    Args:
        console: where to show it; a quiet console shows nothing.
        title: what runs, for example ``asgo seed 0``.
        total: the amount of work, in any unit.
        above: makes what is shown above the line on a terminal; None: nothing.
    """

    def __init__(
        self, console: Console, title: str, total: float, above: Callable[[], RenderableType] | None = None
    ) -> None:
        self.console = console
        self.above = above
        self.title = title
        self.total = total
        self._began = self._printed = time.monotonic()
        self._first = 0.0
        self._live: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> LiveLine:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}", markup=False),
            )
            live = _Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            live.above = self.above
            self._task = live.add_task(self.title, total=self.total, text="")
            live.start()
            self._live = live
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, done: float) -> None:
        """The work starts, or goes on, where `done` of it is done."""
        self._began, self._first = time.monotonic(), done
        if self._live is not None:
            self._live.reset(self._task, completed=done, total=self.total, text="")  # pyright: ignore[reportArgumentType]

    def show(self, done: float, text: str) -> None:
        """`done` of the work is done, and `text` says more about it."""
        if self._live is not None:
            self._live.update(self._task, completed=done, text=text)
        elif done >= self.total or time.monotonic() - self._printed >= INTERVAL:
            self._printed = time.monotonic()
            elapsed = self._printed - self._began
            rate = (done - self._first) / elapsed if elapsed > 0 else 0.0
            left = clock((self.total - done) / rate) if rate > 0 else "?"
            line = f"{self.title}  {text}  elapsed {clock(elapsed)}  left {left}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class RunProgress(LiveLine):
    """Shows step, losses, speed, time passed and time left of one run.

    Args:
        console: where to show it; a quiet console shows nothing.
        title: what runs, for example ``asgo seed 0``.
        steps: the last step.
    """

    def __init__(self, console: Console, title: str, steps: int) -> None:
        super().__init__(console, title, steps)
        self.steps = steps
        self.shown: dict[str, float] = {}

    def __enter__(self) -> RunProgress:
        super().__enter__()
        return self

    def update(self, step: int, line: dict[str, Any]) -> None:
        """Show the newest numbers: any of ``loss``, ``val_loss``, ``tokens_per_second``."""
        keys = ("loss", "val_loss", "tokens_per_second")
        self.shown |= {key: line[key] for key in keys if key in line}
        self.show(step, self._text(step))

    def _text(self, step: int) -> str:
        formats = {"loss": "loss {:.3f}", "val_loss": "val {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}
        parts = [form.format(self.shown[key]) for key, form in formats.items() if key in self.shown]
        return "  ".join([f"step {step}/{self.steps}", *parts])


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
