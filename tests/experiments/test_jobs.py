"""Experiments of many small jobs: what is kept, what is resumed, what is refused."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from asgo.lab.errors import LabError
from asgo.lab.pool import Ledger
from asgo.lab.training.stopping import Stopped
from experiments.jobs import JobPlan, run_jobs
from experiments.runner import Report, run_experiment


@dataclass(frozen=True)
class Square:
    number: int
    weight: float = 1.0

    @property
    def key(self):
        return f"square-{self.number}"


def square(job):
    if job.number < 0:
        raise LabError("no negative numbers: pass 0 or more.")
    return job.number**2


def square_and_stop(job):
    """The second job is interrupted, as Ctrl-C would."""
    if job.number == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return job.number**2


def threads_and_process(job):
    return [torch.get_num_threads(), os.getpid()]


def die(job):
    os._exit(9)


JOBS = JobPlan([Square(number) for number in (1, 2, 3, 4)])


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "jobs.jsonl")


def test_jobs_are_done_once(ledger):
    run_jobs("squares", square, JOBS, ledger, processes=1)
    assert ledger.done == {f"square-{n}": n * n for n in (1, 2, 3, 4)}
    again = Ledger(ledger.path)
    assert again.done == ledger.done
    run_jobs("squares", die, JOBS, again)  # nothing is left that could end the process


@pytest.mark.slow
def test_workers_have_one_thread_and_processes_of_their_own(ledger):
    run_jobs("where", threads_and_process, JOBS, ledger, processes=2)
    assert set(ledger.done) == {job.key for job in JOBS.jobs}
    assert {threads for threads, _ in ledger.done.values()} == {1}
    assert os.getpid() not in {process for _, process in ledger.done.values()}


def test_an_error_of_a_job_keeps_the_results_before_it(ledger):
    with pytest.raises(LabError, match="no negative numbers"):
        run_jobs("squares", square, JobPlan([Square(3), Square(-1), Square(2)]), ledger, processes=1)
    assert Ledger(ledger.path).done == {"square-3": 9}


@pytest.mark.slow
def test_a_worker_that_dies_is_one_line(ledger):
    with pytest.raises(LabError, match="a worker process ended before its job"):
        run_jobs("squares", die, JOBS, ledger, processes=2)


def test_ctrl_c_keeps_what_had_begun(ledger):
    with pytest.raises(Stopped, match="finished jobs are kept"):
        run_jobs("squares", square_and_stop, JOBS, ledger, processes=1)
    assert Ledger(ledger.path).done == {"square-1": 1, "square-2": 4}


def test_a_line_cut_short_is_dropped_and_done_again(ledger):
    run_jobs("squares", square, JOBS, ledger, processes=1)
    ledger.path.write_text(ledger.path.read_text()[:-5])
    again = Ledger(ledger.path)
    assert set(again.done) == {"square-1", "square-2", "square-3"}
    run_jobs("squares", square, JOBS, again, processes=1)
    assert [json.loads(line)["result"] for line in ledger.path.read_text().splitlines()] == [1, 4, 9, 16]


def test_what_is_not_finite_is_null(ledger):
    ledger.add("a", {"loss": [1.0, float("inf"), float("nan")]})
    assert ledger.done["a"] == Ledger(ledger.path).done["a"] == {"loss": [1.0, None, None]}


def test_progress_tells_how_far_and_how_long(ledger, capsys, monkeypatch):
    monkeypatch.setattr("asgo.lab.training.progress.INTERVAL", 0.0)
    known = JobPlan([Square(1), Square(2, weight=3.0)], remaining=4.0)
    run_jobs("squares", square, known, ledger, processes=1, console=Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:3] for line in lines] == [
        ["squares", "job 1/2", "square-1"],
        ["squares", "job 2/2", "square-2"],
    ]
    assert all("elapsed 0:00:0" in line and "left 0:00:0" in line for line in lines)


# ---- experiments ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SquaresConfig:
    """Squares of numbers.

    Args:
        numbers: which.
        processes: jobs at once.
        out: folder.
        resume: go on.
    """

    numbers: tuple[int, ...] = (1, 2)
    processes: int | None = 1
    out: Path = Path("runs/squares")
    resume: bool = False


def plan(config):
    """The squares, and when they are known the square of their sum."""

    def known(done):
        jobs = [Square(number) for number in config.numbers]
        if any(job.key not in done for job in jobs):
            return JobPlan(jobs, remaining=1.0)
        return JobPlan([*jobs, Square(sum(done[job.key] for job in jobs))])

    return known


def conclude(done):
    rows = [{"job": key, "square": value} for key, value in done.items()]
    cells = [[key, str(value)] for key, value in done.items()]
    return Report(rows, ["job", "square"], cells, "Squares", ["they grow"], b"png", {"done": done})


def run(config, work=square, console=None):
    return run_experiment("squares", config, work, plan(config), conclude, console)


def test_an_experiment_leaves_a_folder_that_explains_itself(tmp_path, capsys):
    config = SquaresConfig(out=tmp_path / "squares")
    results = run(config, console=Console(width=100))
    assert results["done"] == {"square-1": 1, "square-2": 4, "square-5": 25}
    assert {path.name for path in config.out.iterdir()} == {
        "squares.json", "environment.json", "jobs.jsonl", "results.json", "table.md", "table.csv", "plot.png"
    }  # fmt: skip
    written = json.loads((config.out / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert written["command"] == f"python -m experiments.squares --out {config.out}"
    assert {"packages", "device", "commit", "date", "threads"} <= set(written["sessions"][0])
    assert "| square-5 | 25 |" in (config.out / "table.md").read_text()
    assert (config.out / "table.csv").read_text().splitlines() == [
        "job,square",
        "square-1,1",
        "square-2,4",
        "square-5,25",
    ]
    shown = capsys.readouterr().out
    assert "they grow" in shown
    assert "plot.png" in shown


def test_an_experiment_is_resumed_not_repeated(tmp_path):
    config = SquaresConfig((1, 2, 3), out=tmp_path / "squares")
    with pytest.raises(Stopped, match=r"Continue with: python -m experiments.squares --out .*squares --resume"):
        run(config, square_and_stop)
    resumed = SquaresConfig((1, 2, 3), None, config.out, True)  # another number of processes is another speed only
    results = run(resumed)
    assert set(results["done"]) == {"square-1", "square-2", "square-3", "square-14"}
    assert len(results["sessions"]) == 2
    assert len(run(resumed, die)["sessions"]) == 2  # nothing is left to do


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "already holds a squares experiment: pass --resume"),
        ({"resume": True, "numbers": (1, 3)}, r"made with another configuration: numbers \(there \(1, 2\), asked"),
        ({"processes": 0}, "--processes 0 is out of range"),
    ],
)
def test_a_folder_in_use_is_refused(tmp_path, change, message):
    config = SquaresConfig(out=tmp_path / "squares")
    run(config)
    before = {path: path.read_bytes() for path in config.out.iterdir()}
    with pytest.raises(LabError, match=message):
        run(SquaresConfig(**{"out": config.out} | change))
    assert {path: path.read_bytes() for path in config.out.iterdir()} == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(LabError, match="is not empty and holds no squares experiment"):
        run(SquaresConfig(out=tmp_path))
