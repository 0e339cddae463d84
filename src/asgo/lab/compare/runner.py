"""The runs of a comparison, one after the other or several at once, with what is left of the time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from asgo.lab import tables
from asgo.lab.config.runs import TrainConfig
from asgo.lab.errors import Diverged
from asgo.lab.pool import Results, work_through, workers
from asgo.lab.terminal import say
from asgo.lab.training.progress import LiveLine, clock
from asgo.lab.training.run_folder import RunFolder
from asgo.lab.training.stopping import Stopped, StopSignal
from asgo.lab.training.train import train


@dataclass(frozen=True)
class RunJob:
    """One run.

    Args:
        entry: of the comparison.
        what: more about it, for the progress line.
        key: its name in a record.
        config: the run.
    """

    entry: str
    what: str
    key: str
    config: TrainConfig


def run_job(job: RunJob, console: Console | None = None, title: str | None = None) -> Mapping[str, Any]:
    """Train, and return what ``result.json`` holds; a run that diverges is one with that status."""
    try:
        train(job.config, console, title)
    except Diverged as error:
        if console is not None:
            say(console, f"{title}: {error}")
    return RunFolder(job.config.out).result() or {"status": "diverged"}


class Runner:
    """Does runs and shows how far they are; a context, in which its processes live.

    Args:
        jobs: how many at once; 1: in this process, with a line of progress for each.
        total: steps of all runs that there will be.
        console: where progress is shown.
    """

    def __init__(self, jobs: int, total: float, console: Console) -> None:
        self.jobs, self.total, self.console = jobs, total, console
        self.done = self.counted = 0.0
        self._began = time.monotonic()
        self._shown: dict[str, dict[str, Any]] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Runner:
        self._pool = workers(self.jobs) if self.jobs > 1 else None
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def skip(self, job: RunJob, result: Mapping[str, Any]) -> None:
        """Count a run that an earlier session has done."""
        self.done += job.config.steps
        self._note(job, result)

    def run(self, jobs: Sequence[RunJob], keep: Callable[[RunJob, Mapping[str, Any]], None]) -> None:
        """Do runs, and call `keep` with each and its result as it is done.

        Raises:
            Stopped: after SIGINT or SIGTERM; runs that had begun have saved a checkpoint, or are done.
        """
        with contextlib.closing(self._alone(jobs) if self.jobs == 1 else self._together(jobs)) as results:
            for job, result in results:
                keep(job, result)

    def _alone(self, jobs: Sequence[RunJob]) -> Results[RunJob]:
        for number, job in enumerate(jobs, 1):
            left = self._left()
            title = f"[{number}/{len(jobs)}{f', {left} left' if left else ''}] {job.entry} {job.what}"
            result = run_job(job, self.console, title)
            self._finish(job, result)
            yield job, result

    def _together(self, jobs: Sequence[RunJob]) -> Results[RunJob]:
        count = 0
        with StopSignal() as stop, LiveLine(self.console, "runs", self.total, self._table) as line:
            line.begin(self.done)
            with contextlib.closing(work_through(run_job, jobs, stop, self._pool)) as results:
                for job, result in results:
                    count += 1
                    self._finish(job, result)
                    line.show(self.done, f"{count}/{len(jobs)} {job.entry} {job.what}: {_loss(result)}")
                    yield job, result
        if count < len(jobs):
            raise Stopped("stopped; finished runs are kept")

    def _finish(self, job: RunJob, result: Mapping[str, Any]) -> None:
        self.done += job.config.steps
        self.counted += job.config.steps
        self._note(job, result)

    def _left(self) -> str:
        """Time left, at the speed of this session; empty before its first run is done."""
        if not self.counted:
            return ""
        return clock((time.monotonic() - self._began) * (self.total - self.done) / self.counted)

    def _note(self, job: RunJob, result: Mapping[str, Any]) -> None:
        seen = self._shown.setdefault(job.entry, {"runs": 0, "best": float("inf"), "last": ""})
        seen["runs"] += 1
        seen["best"] = min(seen["best"], result.get("val_loss", float("inf")))
        seen["last"] = f"{job.what}: {_loss(result)}"

    def _table(self) -> Table:
        rows = [(name, str(x["runs"]), f"{x['best']:.4f}", x["last"]) for name, x in self._shown.items()]
        return tables.rich_table(("optimizer", "runs", "best loss", "last run"), rows, "")


def _loss(result: Mapping[str, Any]) -> str:
    return f"{result['val_loss']:.4f}" if result["status"] == "finished" else result["status"]
