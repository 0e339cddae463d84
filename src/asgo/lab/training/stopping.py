"""Ctrl-C that waits for the end of the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Stopped(Exception):
    """A run was asked to stop and has saved a checkpoint.

    Args:
        message: where it stopped and how to go on.
    """


class StopSignal:
    """While active, the first SIGINT or SIGTERM sets `asked`; a second one interrupts at once.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def hold(self) -> None:
        """Keep SIGTERM on leaving: a launcher sends it to the processes that are left, and one still has to report."""
        self._previous.pop(signal.SIGTERM, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
