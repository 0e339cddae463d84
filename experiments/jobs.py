"""Many small jobs in several processes: what is done is a line of a file, so an interrupted one goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from rich.console import Console

from asgo.lab.pool import Ledger, processors, work_through, workers
from asgo.lab.training.progress import LiveLine
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
    with StopSignal() as stop, LiveLine(shown, title, total) as line, contextlib.ExitStack() as stack:
        line.begin(done)
        pool = None if processes == 1 else stack.enter_context(workers(processes))
        with contextlib.closing(work_through(work, left, stop, pool)) as results:
            for number, (job, result) in enumerate(results, len(jobs) - len(left) + 1):
                ledger.add(job.key, result)
                done = total if number == len(jobs) and not known.remaining else done + job.weight
                line.show(done, f"job {number}/{len(jobs)}  {job.key}")
    if any(job.key not in ledger.done for job in jobs):
        raise Stopped("stopped; finished jobs are kept")
