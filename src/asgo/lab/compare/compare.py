"""Optimizers x seeds on the same initial weights and the same batches, and a report about them.

A comparison is a folder of run folders, so an interrupted one goes on where it was::

    comparison.json                  the configuration
    tune/OPTIMIZER/lr-LR/            runs that chose learning rates, on a seed of their own
    search.jsonl                     every trial of a search, on that seed too; search/ has the trials that are running
    runs/OPTIMIZER/seed-SEED/        the runs that are compared
    results.json  table.md  table.csv  plot.png  report.html
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console

from asgo.lab.compare import search
from asgo.lab.compare.paired_test import LEVEL, VERDICTS, all_pairs, target_ratio
from asgo.lab.compare.report import page
from asgo.lab.compare.runner import RunJob, Runner, run_job
from asgo.lab.compare.summary import (
    Outcome,
    Row,
    choose_target,
    csv_table,
    markdown_table,
    rich_table,
    summarize,
)
from asgo.lab.compare.tune import Tuning
from asgo.lab.compare.tune import search as walk
from asgo.lab.config.checks import entry_name, validate
from asgo.lab.config.codec import command, to_json
from asgo.lab.config.runs import CompareConfig, RunConfig, TrainConfig
from asgo.lab.data.batches import open_data
from asgo.lab.errors import LabError
from asgo.lab.figures import Curve, draw_comparison
from asgo.lab.files import finite, make_folder, read_json, write_bytes, write_json, write_text
from asgo.lab.models.language import check_model
from asgo.lab.optimizers.spec import Entry, parse_entry
from asgo.lab.pool import Ledger
from asgo.lab.terminal import say
from asgo.lab.training import environment
from asgo.lab.training.run_folder import RunFolder, check_out
from asgo.lab.training.stopping import Stopped

Runs = dict[str, list[Outcome]]


def compare(config: CompareConfig, console: Console | None = None) -> dict[str, Any]:
    """Run a comparison, or what is left of it, and return what ``results.json`` holds.

    Args:
        config: the comparison.
        console: where progress, table and paths are shown; None: nowhere.

    Raises:
        LabError: for a config, corpus or folder that does not fit; nothing has been written then.
        Stopped: after SIGINT or SIGTERM; finished runs and the checkpoint of the current one are kept.
    """
    console = console or Console(quiet=True)
    validate(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LabError("asgo compare runs in one process: start it without torchrun, or use asgo train.")
    entries = {entry.name: entry for entry in map(parse_entry, config.optimizers)}
    check_model(config)
    check_out(config, "comparison.json", "comparison", ("jobs",))
    open_data(config.model_data, config.seeds[0], 0, 1)
    make_folder(config.out)
    write_json(config.out / "comparison.json", to_json(replace(config, resume=False)))
    try:
        tuning = {text: _tune(config, entry, console) for text, entry in entries.items()} if config.tune else {}
        entries = {text: _with_lr(entry, tuning[text].lr) if tuning else entry for text, entry in entries.items()}
        with Runner(config.jobs, _total(config, entries.values()), console) as runner:
            found = _search(config, entries, runner) if config.search else {}
            tuned = {text: _tuned(entry, found.get(text)) for text, entry in entries.items()}
            runs = _run_all(config, tuned, runner)
    except Stopped as error:
        raise Stopped(
            f"stopped; finished runs are kept. Continue with: asgo compare --out {config.out} --resume"
        ) from error
    return _conclude(config, tuned, tuning, found, runs, console)


# ---- runs ----------------------------------------------------------------------------------------


def _total(config: CompareConfig, entries: Iterable[Entry]) -> float:
    """Steps of all runs of search and comparison."""
    share = search.share(config.search) + len(config.seeds)
    return sum(share * _steps(config, entry) for entry in entries)


def _steps(config: CompareConfig, entry: Entry, share: float = 1.0) -> int:
    return max(1, round(config.steps * entry.steps_factor * share))


def _run_all(config: CompareConfig, entries: Mapping[str, Entry], runner: Runner) -> Runs:
    # Seeds outside, optimizers inside: what is done of an interrupted comparison is as even as can be. Every second
    # seed has the optimizers in reverse (ABBA), so that a machine that gets slower with time favours none of them.
    orders = cycle((list(entries.items()), list(entries.items())[::-1]))
    jobs = [
        RunJob(text, f"seed {seed}", f"{text} {seed}", _train_config(config, entry, seed, _folder(config, text, seed)))
        for seed, order in zip(config.seeds, orders, strict=False)
        for text, entry in order
    ]
    left = []
    for job in jobs:
        result = RunFolder(job.config.out).result()
        if result is None:
            left.append(job)
        else:
            runner.skip(job, result)
    runner.run(left, lambda job, result: None)
    runs: Runs = {text: [] for text in entries}
    for job in jobs:
        folder = RunFolder(job.config.out)
        result = folder.result() or {"status": "diverged"}
        runs[job.entry].append(Outcome(job.config.seed, result, Curve.of(folder.metrics())))
    return runs


def _folder(config: CompareConfig, text: str, seed: int) -> Path:
    return config.out / "runs" / _slug(text) / f"seed-{seed}"


def _tune(config: CompareConfig, entry: Entry, console: Console) -> Tuning:
    def loss(lr: float) -> float:
        out = config.out / "tune" / _slug(entry.name) / f"lr-{lr:.6g}"
        run = _train_config(config, _with_lr(entry, lr), config.tune_seed, out)
        result = run_job(RunJob(entry.name, "", "", run), console, f"[tune] {entry.name} lr {lr:.4g}")
        return result["val_loss"] if result["status"] == "finished" else math.inf

    return walk(entry.optimizer.lr or 0.0, config.tune, loss)


def _search(config: CompareConfig, entries: Mapping[str, Entry], runner: Runner) -> dict[str, search.Found]:
    """The search of every optimizer, stage by stage; trials that are in the record are not repeated."""
    ledger = Ledger(config.out / "search.jsonl")
    budget, trials = config.search, {text: search.wide(entry, config.search) for text, entry in entries.items()}
    for stage in search.STAGES:
        losses = {key: search.loss_of(result) for key, result in ledger.done.items()}
        trials = {text: [*own, *search.next_trials(stage, text, budget, losses, own)] for text, own in trials.items()}
        planned = {trial.key: trial for own in trials.values() for trial in own if trial.stage == stage}
        jobs = [_trial_job(config, entries[trial.entry], trial) for trial in planned.values()]
        for job in jobs:
            if job.key in ledger.done:
                runner.skip(job, ledger.done[job.key])

        def keep(job: RunJob, result: Mapping[str, Any], planned: Mapping[str, search.Trial] = planned) -> None:
            ledger.add(job.key, search.record(planned[job.key], job.config.steps, job.config.seed, result))
            shutil.rmtree(job.config.out, ignore_errors=True)

        runner.run([job for job in jobs if job.key not in ledger.done], keep)
    shutil.rmtree(config.out / "search", ignore_errors=True)
    losses = {key: search.loss_of(result) for key, result in ledger.done.items()}
    return {text: search.conclude(losses, own) for text, own in trials.items()}


def _trial_job(config: CompareConfig, entry: Entry, trial: search.Trial) -> RunJob:
    tried = replace(entry, optimizer=search.configured(entry.optimizer, trial.values))
    out = config.out / "search" / _slug(entry.name) / f"{trial.stage}-{trial.number}"
    run = _train_config(config, tried, config.tune_seed, out, trial.share)
    cadence = replace(run.cadence, eval_every=run.steps, checkpoint_every=run.steps)
    return RunJob(entry.name, f"{trial.stage} {trial.number}", trial.key, replace(run, cadence=cadence))


def _with_lr(entry: Entry, lr: float) -> Entry:
    return replace(entry, optimizer=replace(entry.optimizer, lr=lr))


def _tuned(entry: Entry, found: search.Found | None) -> Entry:
    return entry if found is None else replace(entry, optimizer=search.configured(entry.optimizer, found.values))


def _train_config(config: CompareConfig, entry: Entry, seed: int, out: Path, share: float = 1.0) -> TrainConfig:
    shared: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    shared |= {"steps": _steps(config, entry, share), **entry.of_the_run()}
    return TrainConfig(**shared, optimizer=entry.optimizer, seed=seed, out=out, resume=True)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", text)


# ---- conclusions ---------------------------------------------------------------------------------


def _conclude(
    config: CompareConfig,
    entries: Mapping[str, Entry],
    tuning: Mapping[str, Tuning],
    found: Mapping[str, search.Found],
    runs: Runs,
    console: Console,
) -> dict[str, Any]:
    target = choose_target(config.target, runs, config.reference)
    rows = [summarize(text, entries[text].optimizer.lr or 0.0, outcomes, target) for text, outcomes in runs.items()]
    losses = {text: {run.seed: run.result["val_loss"] for run in own if run.finished} for text, own in runs.items()}
    tests = all_pairs(losses, config.reference)
    again = {text: _again(config, text) for text in runs}
    results = {
        "target": target,
        "rows": [asdict(row) for row in rows],
        "reference": config.reference,
        "tests": [asdict(test) | {"verdict": test.verdict, "text": str(test)} for test in tests],
        "steps_ratios": _ratios("steps", config.reference, runs, target),
        "seconds_ratios": _ratios("seconds", config.reference, runs, target),
        "tuning": {text: asdict(tuned) for text, tuned in tuning.items()},
        "search": {text: asdict(best) | {"entry": search.written(entries[text])} for text, best in found.items()},
        "again": again,
        "runs": {text: [dict(run.result) for run in own] for text, own in runs.items()},
        "command": command("asgo compare", replace(config, resume=False)),
        "config": to_json(config),
        "environment": _environment(config),
        "date": environment.now(),
    }
    curves = {text: [run.curve for run in own if run.finished] for text, own in runs.items()}
    picture = draw_comparison(curves, target)
    write_text(config.out / "table.md", _markdown(rows, results))
    write_text(config.out / "table.csv", csv_table(rows))
    write_bytes(config.out / "plot.png", picture)
    write_text(config.out / "report.html", page(results, rows, tests, picture))
    write_json(config.out / "results.json", finite(results))
    _show(config, results, rows, tests, console)
    return results


def _ratios(what: str, reference: str | None, runs: Runs, target: float | None) -> list[dict[str, Any]]:
    """Of every optimizer against the reference, over the seeds that both finished."""
    if reference is None or target is None:
        return []
    taken: dict[str, dict[int, float | None]] = {}
    for text, own in runs.items():
        crossed = {run.seed: run.curve.crosses(target) for run in own if run.finished}
        taken[text] = {seed: at and at[what == "seconds"] for seed, at in crossed.items()}
    base = taken[reference]
    ratios = [
        target_ratio(what, text, reference, [(own[seed], base[seed]) for seed in own if seed in base])
        for text, own in taken.items()
        if text != reference
    ]
    return [asdict(ratio) | {"text": str(ratio)} for ratio in ratios]


def _ratio_lines(results: Mapping[str, Any]) -> list[str]:
    """Those of steps; of seconds where runs did not disturb each other."""
    ratios = [*results["steps_ratios"], *(results["seconds_ratios"] if results["config"]["jobs"] == 1 else [])]
    return [ratio["text"] for ratio in ratios]


def _again(config: CompareConfig, text: str) -> str:
    """The command that repeats the first seed of one optimizer."""
    run = RunFolder(_folder(config, text, config.seeds[0])).config()
    return command("asgo train", replace(run, out=TrainConfig().out, resume=False))


def _markdown(rows: Sequence[Row], results: Mapping[str, Any]) -> str:
    """``table.md``: the table, what the differences are worth, and how to repeat a row."""
    lines = [*(test["text"] for test in results["tests"]), *_ratio_lines(results)]
    parts = [markdown_table(rows), "\n".join(f"- {line}" for line in [*lines, *_count(results), *_chosen(results)])]
    commands = "\n".join(results["again"].values())
    return "\n\n".join([*parts, f"One run of each row again:\n\n```\n{commands}\n```"]) + "\n"


def _count(results: Mapping[str, Any]) -> list[str]:
    """Wins, ties and losses against the reference."""
    if results["reference"] is None:
        return []
    verdicts = [test["verdict"] for test in results["tests"]]
    counts = ", ".join(f"{verdicts.count(key)} {word}" for key, word in VERDICTS.items() if verdicts.count(key))
    return [f"against {results['reference']}, by final loss with p < {LEVEL}: {counts or 'nothing to compare'}"]


def _chosen(results: Mapping[str, Any]) -> list[str]:
    """What a search has chosen, and where its best lies at an edge."""
    lines = []
    for text, best in results["search"].items():
        edge = f"; at the edge of what was tried: {', '.join(best['edges'])}" if best["edges"] else ""
        lines.append(f"{text}: {best['entry']} of {best['trials']} trials{edge}")
    return lines


def _environment(config: CompareConfig) -> dict[str, Any]:
    """What the first run ran on."""
    folder = _folder(config, entry_name(config.optimizers[0]), config.seeds[0])
    return read_json(folder / "environment.json")["sessions"][0]


def _show(config: CompareConfig, results: Mapping[str, Any], rows: Any, tests: Any, console: Console) -> None:
    target = results["target"]
    title = f"{len(config.seeds)} seed(s), {config.steps} steps" + (f", target {target:.4f}" if target else "")
    console.print(rich_table(rows, title))
    for text, found in results["tuning"].items():
        edge = "" if found["bracketed"] else ", at the edge of what was tried"
        say(console, f"{text}: lr {found['lr']:.4g} of {len(found['tried'])} tried{edge}")
    told = [*map(str, tests), *_ratio_lines(results)]
    say(console, *told, *_count(results), *_chosen(results), "One run of each row again:", *results["again"].values())
    say(console, *(config.out / name for name in ("plot.png", "report.html")))
