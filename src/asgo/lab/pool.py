"""Many jobs in several processes of one thread each, and the record of finished jobs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from asgo.lab.errors import LabError
from asgo.lab.files import finite, write_text, writing
from asgo.lab.training.run_folder import read_metrics
from asgo.lab.training.stopping import StopSignal

J = TypeVar("J")
Results = Generator[tuple[J, Any], None, None]
"""Pairs of a job and its result, as they come."""


class Ledger:
    """The results of finished jobs: one line of JSON each.

    Args:
        path: the file; a last line that was cut short is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = read_metrics(path)
        if path.exists():
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self.done: dict[str, Any] = {line["job"]: line["result"] for line in lines}

    def add(self, key: str, result: Any) -> None:
        """Append one result."""
        self.done[key] = finite(result)
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"job": key, "result": self.done[key]}) + "\n")


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers(processes: int) -> ProcessPoolExecutor:
    """That many processes, each with one thread, that end with this one."""
    # Spawned, not forked: a fork inherits torch's thread pool without its threads.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare)


def work_through(
    work: Callable[[J], Any], jobs: Sequence[J], stop: StopSignal, pool: ProcessPoolExecutor | None
) -> Results[J]:
    """Do jobs.

    Args:
        work: a function of a module, so that another process finds it.
        jobs: what it is given.
        stop: once it is asked for, no further job begins; jobs that have begun are finished.
        pool: of `workers`; None: in this process, with one thread.

    Raises:
        LabError: what a job raises, or where a process ends before its job.
    """
    return _inline(work, jobs, stop) if pool is None else _pooled(work, jobs, stop, pool)


def _inline(work: Callable[[J], Any], jobs: Sequence[J], stop: StopSignal) -> Results[J]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in jobs:
            if stop.asked:
                return
            yield job, work(job)
    finally:
        torch.set_num_threads(threads)


def _pooled(work: Callable[[J], Any], jobs: Sequence[J], stop: StopSignal, pool: ProcessPoolExecutor) -> Results[J]:
    waiting = {}
    try:
        waiting |= {pool.submit(work, job): job for job in jobs}
        while waiting:
            done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
            if stop.asked:
                _cancel(waiting)
    except BrokenProcessPool:
        raise LabError(
            "a worker process ended before its job: it may have been out of memory. Repeat the command with "
            "--resume, and fewer processes."
        ) from None
    finally:
        _cancel(waiting)


def _cancel(waiting: dict[Future[Any], Any]) -> None:
    """Take back what has not begun."""
    for future in [future for future in waiting if future.cancel()]:
        del waiting[future]


def _prepare() -> None:
    """A worker: one thread, the parent decides about Ctrl-C, and it does not outlive the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
