"""What every part of the benchmark is given: a device, a record, and how much time is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.gpu.device import Device
from benchmarks.gpu.record import Record, Row


class DeviceLostError(RuntimeError):
    """The device no longer answers this process: the part has to go on in a new one."""


class CheckError(AssertionError):
    """A result that is outside its bound."""


@dataclass
class Part:
    """One part in progress.

    Args:
        device: where.
        record: of its rows.
        seconds: how long the part may take.
        tiny: whether to take the smallest shapes, for a rehearsal.
        only: patterns of rows; none: all.
    """

    device: Device
    record: Record
    seconds: float
    tiny: bool = False
    only: tuple[str, ...] = ()
    start: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.start + self.seconds - time.perf_counter()

    def wanted(self, row: str) -> bool:
        """Whether a row is asked for."""
        return not self.only or any(fnmatchcase(row, pattern) for pattern in self.only)

    def attempt(self, row: str, run: Callable[[], Mapping[str, Any]], fragile: bool = False) -> Row | None:
        """Measure a row, unless it is known, not asked for, or no time is left; returns what is recorded, if anything.

        Args:
            row: its name.
            run: measures it.
            fragile: whether a failure leaves a process unfit for further work on a GPU, as a broken capture does.

        Raises:
            DeviceLostError: the process is to be left; the row is recorded as failed.
        """
        if not self.wanted(row):
            return None
        if row in self.record.known:
            return self.record.known[row]
        if self.left <= 0:
            return self.skip(row, "no time was left")
        found = self.record.attempt(row, run)
        self._show(found)
        if found["status"] == "failed" and ((fragile and self.device.is_cuda) or not self.device.is_alive()):
            raise DeviceLostError(row)
        return found

    def skip(self, row: str, why: str) -> None:
        """Record that a row was not measured, and why."""
        if self.wanted(row) and row not in self.record.known:
            self._show(self.record.write(row, "skipped", {"error": why}))

    def _show(self, row: Row) -> None:
        note = row.get("error", "")
        print(f"{self.record.part}: {row['row']}: {row['status']} {note}".rstrip(), flush=True)


def check(value: float, bound: float, what: str) -> None:
    """Raise `CheckError` unless ``value <= bound``; NaN is outside every bound."""
    if not value <= bound:
        raise CheckError(f"{what} is {value:.3g}, its bound {bound:.3g}")
