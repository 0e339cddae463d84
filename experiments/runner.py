"""An experiment of many small jobs and its folder.

::

    NAME.json          the configuration                    results.json   everything, as data
    environment.json   versions, commit, device, dates      table.md       the table and what it says
    jobs.jsonl         a line per finished job              table.csv      plot.png, and further pictures and tables
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console

from asgo.lab import tables
from asgo.lab.config.codec import command, to_json
from asgo.lab.errors import LabError
from asgo.lab.files import finite, make_folder, read_json, write_bytes, write_json, write_text
from asgo.lab.pool import Ledger, processors
from asgo.lab.training import environment
from asgo.lab.training.run_folder import check_out
from asgo.lab.training.stopping import Stopped
from experiments.jobs import Job, JobPlan, Results, run_jobs


class ExperimentConfig(Protocol):
    """What the configurations of all experiments have."""

    @property
    def out(self) -> Path:
        """The folder."""
        ...

    @property
    def resume(self) -> bool:
        """Whether to continue what is in it."""
        ...

    @property
    def processes(self) -> int | None:
        """How many jobs at once."""
        ...


J = TypeVar("J", bound=Job)


@dataclass(frozen=True)
class Report:
    """What an experiment found.

    Args:
        rows: one per line of ``table.csv``, all with the same keys.
        head: titles of the table for reading.
        cells: its lines.
        title: its title.
        lines: what it says in words, a line each.
        picture: the plot, as PNG.
        data: whatever else belongs into ``results.json``.
        note: what the numbers of the table are, for ``table.md``.
        details: more tables for ``table.md``: title, head and lines.
        files: further files by name: pictures as PNG, tables as rows with the same keys.
    """

    rows: Sequence[Mapping[str, Any]]
    head: Sequence[str]
    cells: Sequence[Sequence[str]]
    title: str
    lines: Sequence[str]
    picture: bytes
    data: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    details: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    files: Mapping[str, bytes | Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def marker(name: str) -> str:
    """The file that holds the configuration of the experiment `name`."""
    return f"{name}.json"


def program(name: str) -> str:
    """How the experiment `name` is started from a clone."""
    return f"python -m experiments.{name}"


def run_experiment(
    name: str,
    config: ExperimentConfig,
    work: Callable[[J], Any],
    plan: Callable[[Results], JobPlan[J]],
    conclude: Callable[[Results], Report],
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the jobs, or what is left of them, write what they found, and return what ``results.json`` holds.

    Args:
        name: of its package in `experiments`.
        config: its configuration; a dataclass with `out`, `resume` and `processes`.
        work: does one job.
        plan: the jobs that are known from the results by key; asked again until it knows no more.
        conclude: makes the findings from the results by key.
        console: where progress, table and paths are shown; None: nowhere.

    Raises:
        LabError: for a folder that does not fit; nothing has been written then.
        Stopped: after SIGINT or SIGTERM; finished jobs are kept.
    """
    console = console or Console(quiet=True)
    if config.processes is not None and config.processes < 1:
        raise LabError(f"--processes {config.processes} is out of range: pass 1 or more.")
    check_out(config, marker(name), f"{name} experiment", ("processes",))  # no result depends on those
    make_folder(config.out)
    plain = replace(config, resume=False)  # pyright: ignore[reportArgumentType, reportType]
    write_json(config.out / marker(name), to_json(plain))
    ledger = Ledger(config.out / "jobs.jsonl")
    known = plan(ledger.done)
    sessions = _sessions(config, any(job.key not in ledger.done for job in known.jobs))
    try:
        while any(job.key not in ledger.done for job in known.jobs):
            run_jobs(name, work, known, ledger, processes=config.processes, console=console)
            known = plan(ledger.done)
    except Stopped as error:
        raise Stopped(f"{error}. Continue with: {program(name)} --out {config.out} --resume") from error
    findings = conclude(ledger.done)
    results = {
        **findings.data,
        "rows": [dict(row) for row in findings.rows],
        "says": list(findings.lines),
        "command": command(program(name), plain),
        "config": to_json(plain),
        "sessions": sessions,
    }
    _write(config.out, findings, results)
    _show(config.out, findings, console)
    return results


def _sessions(config: ExperimentConfig, begins: bool) -> list[dict[str, Any]]:
    """What the jobs ran on: a new session is added where there is something left to do."""
    path = config.out / "environment.json"
    sessions = read_json(path) if path.exists() else []
    if begins:
        sessions.append(environment.describe(torch.device("cpu"), config.processes or processors(), 0) | {"threads": 1})
        write_json(path, sessions)
    return sessions


def _write(out: Path, findings: Report, results: Mapping[str, Any]) -> None:
    parts = [f"`{results['command']}`", findings.note, tables.markdown(findings.head, findings.cells)]
    parts.append("\n".join(f"- {line}" for line in findings.lines))
    parts += [f"{title}\n\n{tables.markdown(head, cells)}" for title, head, cells in findings.details]
    write_text(out / "table.md", "\n\n".join(filter(None, parts)) + "\n")
    write_text(out / "table.csv", tables.csv_text(findings.rows, list(findings.rows[0])))
    write_bytes(out / "plot.png", findings.picture)
    for name, content in findings.files.items():
        text = content if isinstance(content, bytes) else tables.csv_text(content, list(content[0])).encode()
        write_bytes(out / name, text)
    write_json(out / "results.json", finite(dict(results)))


def _show(out: Path, findings: Report, console: Console) -> None:
    console.print(tables.rich_table(findings.head, findings.cells, findings.title))
    for line in findings.lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for name in ("table.md", "plot.png", *(name for name in findings.files if name.endswith(".png")), "results.json"):
        console.print(f"{out / name}", highlight=False, soft_wrap=True)
