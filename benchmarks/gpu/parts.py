"""The parts in their order, and the process in which each runs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu import (
    check_graphs,
    check_processes,
    check_roots,
    check_steps,
    check_suite,
    launches,
    loss,
    roots,
    speed,
)
from benchmarks.gpu.device import Device
from benchmarks.gpu.facts import facts
from benchmarks.gpu.part import DeviceLostError, Part
from benchmarks.gpu.record import FILE, Record

LOST = 75
"""Exit status of a process whose device no longer answers."""
GRACE = 15.0
"""Seconds beyond its budget after which a part is killed: what it is in the middle of may take so long."""
RESTARTS = 6


def correctness(part: Part) -> None:
    """Last what starts processes or may wait for others in vain."""
    for run in (check_roots.run, check_steps.run, check_graphs.run, check_processes.run, check_suite.run):
        run(part)


PARTS: dict[str, Callable[[Part], None]] = {
    "correctness": correctness,
    "speed": speed.run,
    "launches": launches.run,
    "roots": roots.run,
    "loss": loss.run,
}
BUDGETS: dict[str, float] = {"correctness": 110, "speed": 150, "launches": 30, "roots": 50, "loss": 110}
"""Seconds; 450 in all. What a part leaves of its own, the last one gets."""


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Args:
        out: the folder of the results.
        device: name of the device.
        tiny: whether it is a rehearsal.
        only: patterns of rows; none: all.
        start: how a process begins: "spawn" with all imports of its own, as a process that was forked cannot use CUDA
            if anything before has so much as asked for it; "fork" saves the imports.
    """

    out: Path
    device: Literal["cuda", "cpu"]
    tiny: bool
    only: tuple[str, ...]
    start: Literal["spawn", "fork"]


def run_part(plan: Plan, name: str, seconds: float) -> None:
    """Run a part in a process of its own, until it is through or its time is over.

    One whose device is lost, or that dies, is followed by another one, which goes on after the row that was under way.
    """
    end = time.monotonic() + seconds
    for _ in range(RESTARTS):
        left = end - time.monotonic()
        if left <= 0:
            return
        status = _in_process(plan, name, left)
        if status == 0:
            return
        why = "its time was over" if status is None else f"the process ended with status {status}"
        Record(plan.out / FILE, name).close_open_rows(why)


def _in_process(plan: Plan, name: str, seconds: float) -> int | None:
    """The exit status of the process; None if it had to be killed as its time was over."""
    sys.stdout.flush()
    context: Any = multiprocessing.get_context(plan.start)
    process = context.Process(target=_child, args=(plan, name, time.monotonic() + seconds, os.getpid()))
    process.start()
    try:
        process.join(seconds + GRACE)
        return process.exitcode
    finally:
        if process.is_alive():
            _kill(process.pid or 0)
            process.join()


def _kill(pid: int) -> None:
    """Kill a process and what it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def _child(plan: Plan, name: str, end: float, parent: int) -> None:
    """Run a part until `end`, by the clock that all processes share, so that imports count."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    gc.freeze()  # else every collection between rows goes through all that was imported
    record = Record(plan.out / FILE, name)
    try:
        device = Device.pick(plan.device)
    except RuntimeError as error:
        print(error)
        record.write("device", "failed", {"error": str(error), "traceback": traceback.format_exc()})
        return
    part = Part(device, record, end - time.monotonic(), plan.tiny, plan.only)
    record.write("machine", "machine", {**facts(device), "rehearsal": plan.tiny})
    try:
        PARTS[name](part)
    except DeviceLostError:
        sys.stdout.flush()
        os._exit(LOST)


def _end_with(parent: int) -> None:
    """Kill this process and what it started once its parent is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)
