"""Optimizers x seeds on the same initial weights and the same batches, and a report about them.

A comparison is a folder of run folders, so an interrupted one goes on where it was::

    comparison.json                  the configuration
    tune/OPTIMIZER/lr-LR/            runs that chose learning rates, on a seed of their own
    runs/OPTIMIZER/seed-SEED/        the runs that are compared
    results.json  table.md  table.csv  plot.png  report.html
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from asgo.lab.compare.paired_test import all_pairs
from asgo.lab.compare.report import page
from asgo.lab.compare.summary import (
    Outcome,
    choose_target,
    csv_table,
    markdown_table,
    rich_table,
    summarize,
)
from asgo.lab.compare.tune import Tuning, search
from asgo.lab.config.checks import validate
from asgo.lab.config.codec import command, to_json
from asgo.lab.config.runs import CompareConfig, OptimizerConfig, RunConfig, TrainConfig
from asgo.lab.data.batches import open_data
from asgo.lab.errors import LabError
from asgo.lab.figures import Curve, draw_comparison
from asgo.lab.files import finite, make_folder, read_json, write_bytes, write_json, write_text
from asgo.lab.models.language import shape_of
from asgo.lab.optimizers.spec import parse_spec
from asgo.lab.training import environment
from asgo.lab.training.run_folder import RunFolder, check_comparison
from asgo.lab.training.stopping import Stopped
from asgo.lab.training.train import Diverged, train

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
    specs = {text: parse_spec(text) for text in config.optimizers}
    shape_of(config.model)
    check_comparison(config)
    open_data(config.data, config.seeds[0], 0, 1)
    make_folder(config.out)
    write_json(config.out / "comparison.json", to_json(replace(config, resume=False)))
    try:
        tuning = {text: _tune(config, text, spec, console) for text, spec in specs.items()} if config.tune else {}
        specs = {text: replace(spec, lr=tuning[text].lr) if tuning else spec for text, spec in specs.items()}
        runs = _run_all(config, specs, console)
    except Stopped as error:
        raise Stopped(
            f"stopped; finished runs are kept. Continue with: asgo compare --out {config.out} --resume"
        ) from error
    return _conclude(config, specs, tuning, runs, console)


# ---- runs ----------------------------------------------------------------------------------------


def _run_all(config: CompareConfig, specs: Mapping[str, OptimizerConfig], console: Console) -> Runs:
    runs: Runs = {text: [] for text in specs}
    # Seeds outside, optimizers inside: what is done of an interrupted comparison is as even as can be.
    for seed in config.seeds:
        for text, spec in specs.items():
            done = sum(map(len, runs.values())) + 1
            title = f"[{done}/{len(specs) * len(config.seeds)}] {text} seed {seed}"
            out = config.out / "runs" / _slug(text) / f"seed-{seed}"
            runs[text].append(_run(config, spec, seed, out, console=console, title=title))
    return runs


def _tune(config: CompareConfig, text: str, spec: OptimizerConfig, console: Console) -> Tuning:
    def loss(lr: float) -> float:
        out = config.out / "tune" / _slug(text) / f"lr-{lr:.6g}"
        title = f"[tune] {text} lr {lr:.4g}"
        run = _run(config, replace(spec, lr=lr), config.tune_seed, out, console=console, title=title)
        return run.result["val_loss"] if run.finished else math.inf

    return search(spec.lr or 0.0, config.tune, loss)


def _run(
    config: CompareConfig, optimizer: OptimizerConfig, seed: int, out: Path, *, console: Console, title: str
) -> Outcome:
    shared = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    run = TrainConfig(**shared, optimizer=optimizer, seed=seed, out=out, resume=True)
    try:
        train(run, console, title)
    except Diverged as error:
        console.print(f"{title}: {error}", highlight=False, markup=False, soft_wrap=True)
    folder = RunFolder(out)
    return Outcome(seed, folder.result() or {"status": "diverged"}, Curve.of(folder.metrics()))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", text)


# ---- conclusions ---------------------------------------------------------------------------------


def _conclude(
    config: CompareConfig,
    specs: Mapping[str, OptimizerConfig],
    tuning: Mapping[str, Tuning],
    runs: Runs,
    console: Console,
) -> dict[str, Any]:
    target = choose_target(config.target, runs)
    rows = [summarize(text, specs[text].lr or 0.0, outcomes, target) for text, outcomes in runs.items()]
    losses = {text: {run.seed: run.result["val_loss"] for run in own if run.finished} for text, own in runs.items()}
    tests = all_pairs(losses)
    results = {
        "target": target,
        "rows": [asdict(row) for row in rows],
        "tests": [asdict(test) | {"text": str(test)} for test in tests],
        "tuning": {text: asdict(found) for text, found in tuning.items()},
        "runs": {text: [dict(run.result) for run in own] for text, own in runs.items()},
        "command": command("asgo compare", replace(config, resume=False)),
        "config": to_json(config),
        "environment": _environment(config),
        "date": environment.now(),
    }
    curves = {text: [run.curve for run in own if run.finished] for text, own in runs.items()}
    picture = draw_comparison(curves, target)
    table = markdown_table(rows)
    write_text(config.out / "table.md", table + "\n\n" + "\n".join(f"- {test}" for test in tests) + "\n")
    write_text(config.out / "table.csv", csv_table(rows))
    write_bytes(config.out / "plot.png", picture)
    write_text(config.out / "report.html", page(results, rows, tests, picture))
    write_json(config.out / "results.json", finite(results))
    _show(config, results, rows, tests, console)
    return results


def _environment(config: CompareConfig) -> dict[str, Any]:
    """What the first run ran on."""
    folder = config.out / "runs" / _slug(config.optimizers[0]) / f"seed-{config.seeds[0]}"
    return read_json(folder / "environment.json")["sessions"][0]


def _show(config: CompareConfig, results: Mapping[str, Any], rows: Any, tests: Any, console: Console) -> None:
    target = results["target"]
    title = f"{len(config.seeds)} seed(s), {config.steps} steps" + (f", target {target:.4f}" if target else "")
    console.print(rich_table(rows, title))
    for text, found in results["tuning"].items():
        edge = "" if found["bracketed"] else ", at the edge of what was tried"
        console.print(f"{text}: lr {found['lr']:.4g} of {len(found['tried'])} tried{edge}", highlight=False)
    for test in tests:
        console.print(str(test), highlight=False, soft_wrap=True)
    for name in ("plot.png", "report.html"):
        console.print(f"{config.out / name}", highlight=False, soft_wrap=True)
