"""Seconds, spread and bytes: how both benchmarks measure."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from asgo.lab.errors import LabError
from asgo.lab.training.meter import synchronize
from asgo.lab.training.progress import RunProgress


def pick_device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        LabError: for a GPU that is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise LabError("--device cuda: torch finds no GPU here. Pass --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def place(device: torch.device) -> str:
    """The name of the GPU, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' * (threads > 1)}"


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long `run` takes, without garbage collection; on CUDA by events around it on an idle device."""
    collects = gc.isenabled()
    gc.disable()
    try:
        synchronize(device)
        if device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        synchronize(device)
        return first.elapsed_time(last) / 1000
    finally:
        if collects:
            gc.enable()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements; with fewer than two, the quartiles are the median."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        low, middle, high = quantiles(values, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return Spread(middle, low, high)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


def ratio(values: Sequence[float], others: Sequence[float]) -> float | None:
    """The median of ratios of measurements that were made in the same round; None without any."""
    pairs = [a / b for a, b in zip(values, others, strict=False)]
    return median(pairs) if pairs else None


def held_bytes(owner: object, others: Iterable[Tensor]) -> int:
    """Bytes of all tensors that an object holds, however deep, each storage once, without the storages of `others`."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in others}
    found, known, queue = 0, set(), [owner]
    while queue:
        item: Any = queue.pop()
        if id(item) in known:
            continue
        known.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found += storage.nbytes()
        elif isinstance(item, dict):
            queue += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            queue += item
        elif hasattr(item, "__dict__") and not isinstance(item, type) and not callable(item):
            queue += vars(item).values()
    return found


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that is taken at once while `run` runs, beyond what was taken before.

    On a CPU the profiler knows only what `run` itself took: older memory that it gives back is not subtracted.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself on standard error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    taken = peak = 0
    results: Any = getattr(profiler.profiler, "kineto_results", None)
    events = [] if results is None else results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    return peak


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


class WorkProgress(RunProgress):
    """The progress of a benchmark, in units of work; says what is measured and what time is left."""

    def __init__(self, console: Console, title: str, work: int) -> None:
        super().__init__(console, title, work)
        self._done, self._note = 0, ""

    def __enter__(self) -> WorkProgress:
        super().__enter__()
        return self

    def advance(self, work: int, note: str) -> None:
        """So much more is done; `note` says what comes next or went on."""
        self._done, self._note = min(self.steps, self._done + work), note
        self.update(self._done, {})

    def _text(self, step: int) -> str:
        return f"{100 * step // max(1, self.steps)} %  {self._note}"
