"""Many small jobs in several processes: what is done is a line of a file, so an interrupted one goes on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from rich.console import Console

from asgo.lab.errors import LabError
from asgo.lab.files import finite, write_text, writing
from asgo.lab.training.progress import LiveLine
from asgo.lab.training.run_folder import read_metrics
from asgo.lab.training.stopping import Stopped, StopSignal


class Job(Protocol):
    """A piece of work that can be sent to another process."""

    @property
    def key(self) -> str:
        """Its name in the ledger, the same in every session."""
        ...

    @property
    def weight(self) -> float:
        """About how long it takes beside the others; only the time left depends on it."""
        ...


J = TypeVar("J", bound=Job)
Results = dict[str, Any]


@dataclass(frozen=True)
class JobPlan(Generic[J]):
    """The jobs that are known so far.

    Args:
        jobs: with different keys.
        remaining: the weight of those that will be known once these are done.
    """

    jobs: Sequence[J]
    remaining: float = 0.0


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
        self.done: Results = {line["job"]: line["result"] for line in lines}

    def add(self, key: str, result: Any) -> None:
        """Append one result."""
        self.done[key] = finite(result)
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"job": key, "result": self.done[key]}) + "\n")


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    title: str,
    work: Callable[[J], Any],
    known: JobPlan[J],
    ledger: Ledger,
    *,
    processes: int | None = None,
    console: Console | None = None,
) -> None:
    """Do the jobs that the ledger does not have yet.

    Args:
        title: what the progress line begins with.
        work: a function of a module, so that another process finds it; returns what JSON can hold.
        known: the jobs.
        ledger: where results are read and written.
        processes: how many work at once, each with one thread; None: one per processor; 1: this process.
        console: where progress is shown; None: nowhere.

    Raises:
        LabError: what a job raises; earlier results are kept.
        Stopped: after SIGINT or SIGTERM; jobs that had begun are finished and kept.
    """
    jobs = known.jobs
    left = [job for job in jobs if job.key not in ledger.done]
    total = sum(job.weight for job in jobs) + known.remaining
    done = total - known.remaining - sum(job.weight for job in left)
    processes = min(processes or processors(), max(1, len(left)))
    shown = console or Console(quiet=True)
    with StopSignal() as stop, LiveLine(shown, title, total) as line:
        line.begin(done)
        worked = _inline(work, left, stop) if processes == 1 else _pooled(work, left, stop, processes)
        with contextlib.closing(worked) as results:
            for number, (job, result) in enumerate(results, len(jobs) - len(left) + 1):
                ledger.add(job.key, result)
                done = total if number == len(jobs) and not known.remaining else done + job.weight
                line.show(done, f"job {number}/{len(jobs)}  {job.key}")
    if any(job.key not in ledger.done for job in jobs):
        raise Stopped("stopped; finished jobs are kept")


def _inline(work: Callable[[J], Any], jobs: Sequence[J], stop: StopSignal) -> Generator[tuple[J, Any], None, None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in jobs:
            if stop.asked:
                return
            yield job, work(job)
    finally:
        torch.set_num_threads(threads)


def _pooled(
    work: Callable[[J], Any], jobs: Sequence[J], stop: StopSignal, processes: int
) -> Generator[tuple[J, Any], None, None]:
    # Spawned, not forked: a fork inherits torch's thread pool without its threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare) as pool:
        waiting = {pool.submit(work, job): job for job in jobs}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
                if stop.asked:
                    _cancel(waiting)
        except BrokenProcessPool:
            raise LabError(
                "a worker process ended before its job: it may have been out of memory. Repeat the command with "
                "--resume, and --processes 1."
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
