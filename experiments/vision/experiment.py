"""``python -m experiments.vision``: BAGM's blocks against NAG and Adam on small images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from asgo.lab.compare.paired_test import PairedTest, paired_test
from asgo.lab.config.runs import ScheduleConfig
from asgo.lab.errors import LabError
from experiments.jobs import JobPlan, Results
from experiments.runner import Report, run_experiment
from experiments.vision import images
from experiments.vision.picture import draw
from experiments.vision.training import METHODS, Training

BASELINES = ("nag", "adam")
LEVEL = 0.05
SCHEDULE = ScheduleConfig(warmup_fraction=0.0)


@dataclass(frozen=True)
class VisionConfig:
    """Train a small ResNet with BAGM's four kinds of blocks, NAG and Adam; errors and generalisation gap.

    Args:
        data: fashion-mnist, digits, or auto: Fashion-MNIST where it is installed, else digits.
        folder: where Fashion-MNIST's four idx files are, compressed or not.
        images: most training images; few, so that there is a gap to see.
        methods: of nag, adam, bagm-b1 (a number per tensor), b2 (per output), b3 (per kernel), b4 (per input).
        rates: learning rates tried for every method; the lowest validation error chooses.
        seeds: seeds of the runs that are compared; one seed gives all the same first weights and batches.
        tune_seed: seed of the runs that choose learning rates; keep it out of seeds.
        epochs: passes over the training images.
        batch: images per step.
        widths: channels of the network's stages.
        depths: blocks of the network's stages.
        schedule: learning rate over the run.
        processes: runs at once, each with one thread; None: one per processor.
        out: folder to write; must be new or empty, or an experiment to --resume.
        resume: continue an interrupted experiment; finished runs are not repeated.
    """

    data: images.Name = "auto"
    folder: Path = Path("/usr/share/datasets/fashion-mnist")
    images: int = 4000
    methods: tuple[str, ...] = tuple(METHODS)
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tune_seed: int = 1000
    epochs: int = 10
    batch: int = 64
    widths: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (1, 1, 1)
    schedule: ScheduleConfig = SCHEDULE
    processes: int | None = None
    out: Path = Path("runs/vision")
    resume: bool = False


@dataclass(frozen=True)
class Row:
    """A line of ``table.csv``; errors and gap are percent.

    Args:
        method: which.
        lr: the chosen learning rate.
        bracketed: whether rates on both sides of it were tried.
        runs: how many seeds.
        train_loss: mean loss on the training images, at the end.
        train_error: mean share of wrong answers on them.
        test_error: mean share of wrong answers on the test images.
        test_spread: its standard deviation over seeds; None below two.
        gap: mean of test error minus training error.
        gap_spread: its standard deviation over seeds; None below two.
        seconds_per_step: mean training time of a step.
        state_bytes: optimizer state.
    """

    method: str
    lr: float
    bracketed: bool
    runs: int
    train_loss: float
    train_error: float
    test_error: float
    test_spread: float | None
    gap: float
    gap_spread: float | None
    seconds_per_step: float
    state_bytes: int


def vision(config: VisionConfig, console: Console | None = None) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and return what ``results.json`` holds.

    Raises:
        LabError: for data, a method, a number or a folder that does not fit; nothing has been written then.
        Stopped: after SIGINT or SIGTERM; finished runs are kept.
    """
    console = console or Console(quiet=True)
    _check(config)
    name = images.resolve(config.data, config.folder)
    if config.data == "auto" and name == "digits":
        where = f"{config.folder}; the Debian package dataset-fashion-mnist puts it there"
        console.print(f"digits instead of Fashion-MNIST, which is not in {where}", highlight=False, soft_wrap=True)
    data = images.load(name, config.folder, config.images)
    if len(data.train.targets) < config.batch:
        raise LabError(
            f"--batch {config.batch} is more than the {len(data.train.targets)} training images: pass fewer."
        )
    return run_experiment(
        "vision",
        config,
        do,
        lambda done: _plan(config, name, done),
        lambda done: _conclude(config, name, done),
        console,
    )


def do(job: Training) -> dict[str, Any]:
    """Do one run, in this process or another."""
    return job.run()


def _check(config: VisionConfig) -> None:
    unknown = [name for name in config.methods if name not in METHODS]
    if unknown:
        raise LabError(f"method {unknown[0]!r} does not exist: choose from {', '.join(METHODS)}.")
    for name in ("methods", "rates", "seeds", "widths", "depths"):
        values = getattr(config, name)
        if not values or (name not in ("widths", "depths") and len(set(values)) < len(values)):
            raise LabError(f"--{name} {' '.join(map(str, values))}: pass at least one, each once.")
    numbers = (config.images, config.epochs, config.batch, *config.widths, *config.depths)
    if min(numbers) < 1 or not min(config.rates) > 0:
        raise LabError("--images, --epochs, --batch, --widths and --depths must be 1 or more, --rates above 0.")
    if len(config.widths) != len(config.depths):
        raise LabError(
            f"--widths has {len(config.widths)} stages, --depths {len(config.depths)}: pass as many of both."
        )
    if config.tune_seed in config.seeds:
        raise LabError(f"--tune-seed {config.tune_seed} is also one of --seeds: pass another.")


# ---- jobs ----------------------------------------------------------------------------------------


def _training(config: VisionConfig, name: str, method: str, lr: float, seed: int, final: bool) -> Training:
    shared = {
        key: getattr(config, key) for key in ("folder", "images", "epochs", "batch", "widths", "depths", "schedule")
    }
    return Training(data=name, method=method, lr=lr, seed=seed, final=final, **shared)


def _tuning(config: VisionConfig, name: str, method: str) -> list[Training]:
    return [_training(config, name, method, lr, config.tune_seed, False) for lr in sorted(config.rates)]


def _plan(config: VisionConfig, name: str, done: Results) -> JobPlan[Training]:
    """The tuning runs; then, once they are done, the runs with the chosen rates too."""
    tuning = [job for method in config.methods for job in _tuning(config, name, method)]
    if any(job.key not in done for job in tuning):
        return JobPlan(tuning, float(len(config.seeds) * len(config.methods)))
    return JobPlan(tuning + [job for method in config.methods for job in _final(config, name, method, done)])


def _final(config: VisionConfig, name: str, method: str, done: Results) -> list[Training]:
    lr = _chosen(config, name, method, done)[0]
    return [_training(config, name, method, lr, seed, True) for seed in config.seeds]


def _chosen(config: VisionConfig, name: str, method: str, done: Results) -> tuple[float, bool]:
    """The rate with the lowest validation error, and whether rates on both sides of it were tried."""
    tuning = _tuning(config, name, method)
    errors = [done[job.key]["validation"]["error"] for job in tuning]
    best = min(range(len(errors)), key=errors.__getitem__)
    return tuning[best].lr, 0 < best < len(errors) - 1


# ---- conclusions ---------------------------------------------------------------------------------


def _conclude(config: VisionConfig, name: str, done: Results) -> Report:
    runs = {method: [done[job.key] for job in _final(config, name, method, done)] for method in config.methods}
    rows = [_row(method, *_chosen(config, name, method, done), own) for method, own in runs.items()]
    tests = {what: _tests(runs, what) for what in ("test error", "gap")}
    tuning = {
        method: [[job.lr, done[job.key]["validation"]["error"]] for job in _tuning(config, name, method)]
        for method in config.methods
    }
    return Report(
        rows=[vars(row) for row in rows],
        head=COLUMNS,
        cells=[_cells(row) for row in rows],
        title=f"{name}, {config.images} training images, {config.epochs} epochs, {len(config.seeds)} seeds",
        lines=[f"{what}: {test}" for what, own in tests.items() for test in own] + [_answer(tests["test error"])],
        picture=draw(runs, {method: _percent(own) for method, own in runs.items()}),
        data={
            "data": name,
            "tuning": tuning,
            "runs": runs,
            "tests": {what: [asdict(test) for test in own] for what, own in tests.items()},
        },
        note="Errors are percent: means over seeds, with standard deviations; the gap is test minus training error.",
    )


def _percent(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    train, test = ([100 * run[part]["error"] for run in runs] for part in ("train", "test"))
    return {"train error": train, "test error": test, "gap": [b - a for a, b in zip(train, test, strict=True)]}


def _row(method: str, lr: float, bracketed: bool, runs: Sequence[Mapping[str, Any]]) -> Row:
    found = _percent(runs)
    spread = {what: stdev(values) if len(values) > 1 else None for what, values in found.items()}
    return Row(
        method=method,
        lr=lr,
        bracketed=bracketed,
        runs=len(runs),
        train_loss=fmean(math.inf if run["train"]["loss"] is None else run["train"]["loss"] for run in runs),
        train_error=fmean(found["train error"]),
        test_error=fmean(found["test error"]),
        test_spread=spread["test error"],
        gap=fmean(found["gap"]),
        gap_spread=spread["gap"],
        seconds_per_step=fmean(run["seconds_per_step"] for run in runs),
        state_bytes=runs[0]["state_bytes"],
    )


COLUMNS = ("optimizer", "lr", "train error", "test error", "gap", "ms per step", "state MB")


def _cells(row: Row) -> list[str]:
    return [
        row.method,
        f"{row.lr:g}" + ("" if row.bracketed else " (edge)"),
        f"{row.train_error:.2f}",
        _with_spread(row.test_error, row.test_spread),
        _with_spread(row.gap, row.gap_spread),
        f"{row.seconds_per_step * 1e3:.1f}",
        f"{row.state_bytes / 1e6:.2f}",
    ]


def _with_spread(value: float, spread: float | None) -> str:
    return f"{value:.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def _tests(runs: Mapping[str, Sequence[Mapping[str, Any]]], what: str) -> list[PairedTest]:
    """Every BAGM against every baseline, paired by seed, in points of percent."""
    values = {method: _percent(own)[what] for method, own in runs.items()}
    others = [method for method in values if method not in BASELINES]
    return [
        paired_test(method, base, list(zip(values[method], values[base], strict=True)))
        for method in others
        for base in BASELINES
        if base in values
    ]


def _answer(tests: Sequence[PairedTest]) -> str:
    """The paper's claim, that every BAGM has a lower test error than NAG and Adam, in words."""
    better = [f"{t.first} than {t.second}" for t in tests if t.difference < 0 and t.p < LEVEL]
    worse = [f"{t.first} than {t.second}" for t in tests if t.difference > 0 and t.p < LEVEL]
    lower = sum(t.difference < 0 for t in tests)
    return (
        f'"BAGM has a lower test error than NAG and Adam": lower in the mean in {lower} of {len(tests)} pairs; by a '
        f"paired t-test at 5 %, lower: {', '.join(better) or 'none'}; higher: {', '.join(worse) or 'none'}"
    )
