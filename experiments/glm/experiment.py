"""``python -m experiments.glm``: AdaGram against SGD, AdaGrad and Shampoo on generalized linear models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from rich.console import Console
from torch import nn

from asgo.lab.errors import LabError
from asgo.lab.files import finite
from experiments.glm import claim, contenders, problems
from experiments.glm.descent import Plan, Setting, descend, optimum
from experiments.glm.report import Entry, Row, cells, draw, head, panels, plain, summarize, trials_of
from experiments.jobs import JobPlan, Results
from experiments.runner import Report, run_experiment

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

VARIANTS = (("factor", "psi"), ("factor", "bug"), ("factor", "eig"), ("symmetric", "eig"))
"""Directions and integrators of AdaGram, the paper's first. Symmetric, "bug" is all but the same as "eig"."""

CONTENDERS = (
    "sgd",
    "adagrad",
    "full-adagrad",
    "shampoo:betas=0/1,precondition_frequency=10",
    *(
        f"adagram:rank={rank},direction={direction},integrator={integrator}"
        for direction, integrator in VARIANTS
        for rank in range(1, claim.LARGEST_RANK + 1)
    ),
    "adagram:rank=None",
)
"""Nobody has momentum. Without a limit the symmetric AdaGram is full-matrix AdaGrad, so only the factor is here."""


@dataclass(frozen=True)
class GlmConfig:
    """Compare AdaGram with diagonal and dense methods on linear, logistic, softmax and Poisson models.

    Args:
        sets: data sets; none: all whose packages are installed.
        contenders: optimizers: sgd, adagrad, full-adagrad, shampoo, adagram, with options as in adagram:rank=3; none:
            each of them, AdaGram with ranks 1 to 5 in four variants and without a limit.
        batches: examples per step, one comparison for each.
        rates: learning rates tried for every optimizer, on the tuning seeds.
        eps: what a sum of squares starts from; each is tried with each rate, by all but sgd.
        seeds: seeds of the runs that are compared; one seed gives all the same first weights and batches.
        tune_seeds: seeds of the runs that choose learning rate, rank and rival; keep them out of seeds.
        steps: steps of every run.
        evaluations: how often the loss over all training rows is measured.
        rows: most training rows of a set.
        dense_limit: most parameters for which methods with a matrix of all of them are run.
        margin: how much slower still counts as "as fast".
        processes: jobs at once, each with one thread; None: one per processor.
        out: folder to write; must be new or empty, or an experiment to --resume.
        resume: continue an interrupted experiment; what is done is not repeated.
    """

    sets: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 32, 64)
    rates: tuple[float, ...] = RATES
    eps: tuple[float, ...] = (0.01, 0.5)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tune_seeds: tuple[int, ...] = (1000, 1001)
    steps: int = 200
    evaluations: int = 25
    rows: int = 2000
    dense_limit: int = 64
    margin: float = 0.05
    processes: int | None = None
    out: Path = Path("runs/glm")
    resume: bool = False


@dataclass(frozen=True)
class Fit:
    """A job: one method on one problem with one batch size, tuned, then run with every seed."""

    problem: str
    contender: str
    plan: Plan
    rows: int
    rates: tuple[float, ...]
    eps: tuple[float, ...]
    seeds: tuple[int, ...]
    tune_seeds: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        return f"{self.problem}/batch-{self.plan.batch}/{self.contender}"

    @property
    def weight(self) -> float:
        """About the time of a step."""
        problem = problems.load(self.problem, self.rows)
        return contenders.parse(self.contender).work(problem.outputs, problem.x.shape[1])

    def run(self) -> dict[str, Any]:
        """Choose the setting on the tuning seeds, then run the others with it."""
        problem, contender = problems.load(self.problem, self.rows), contenders.parse(self.contender)
        settings = [Setting(lr, eps) for eps in (self.eps if contender.has_floor() else (None,)) for lr in self.rates]
        tuning = descend(problem, contender, settings, self.tune_seeds, self.plan)
        by_setting = [[_plain(curve) for curve in curves] for curves in tuning.train.transpose(0, 1)]
        smallest = optimum(problem)
        scores = [geometric_mean(claim.slowness(curve, smallest) for curve in curves) for curves in by_setting]
        best = min(range(len(scores)), key=scores.__getitem__)
        curves = descend(problem, contender, settings[best : best + 1], self.seeds, self.plan)
        return {
            "model": problem.loss.name,
            "parameters": problem.parameters,
            "optimum": smallest,
            **asdict(settings[best]),
            "tried": [[*astuple(setting), score] for setting, score in zip(settings, scores, strict=True)],
            "bracketed": 0 < best % len(self.rates) < len(self.rates) - 1,
            "tuned": scores[best],
            "curves": [_plain(curve) for curve in curves.train[:, 0]],
            "held": curves.held[:, 0].tolist(),
        }


def _plain(curve: torch.Tensor) -> list[float | None]:
    return finite(curve.tolist())


def do(job: Fit) -> dict[str, Any]:
    """Do one job, in this process or another."""
    return job.run()


def glm(config: GlmConfig, console: Console | None = None) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and return what ``results.json`` holds.

    Raises:
        LabError: for a data set, optimizer, number or folder that does not fit; nothing has been written then.
        Stopped: after SIGINT or SIGTERM; finished jobs are kept.
    """
    console = console or Console(quiet=True)
    _check(config)
    sets = problems.choose(config.sets)
    if not config.sets and problems.missing():
        left_out = ", ".join(f"{name} ({install})" for name, install in problems.missing().items())
        console.print(f"left out, not installed: {left_out}", highlight=False, markup=False, soft_wrap=True)
    jobs = [job for name in sets for job in _jobs(config, name)]
    known = JobPlan(jobs)
    return run_experiment("glm", config, do, lambda done: known, lambda done: _conclude(config, jobs, done), console)


def _check(config: GlmConfig) -> None:
    if len(set(config.contenders)) < len(config.contenders):
        raise LabError(f"--contenders {' '.join(config.contenders)} repeats an entry: pass each once.")
    for name in ("batches", "rates", "eps", "seeds", "tune_seeds"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise LabError(f"--{name.replace('_', '-')} {' '.join(map(str, values))}: pass at least one, each once.")
    for name in ("steps", "evaluations", "rows", "dense_limit"):
        if getattr(config, name) < 1:
            raise LabError(f"--{name.replace('_', '-')} {getattr(config, name)} is out of range: pass 1 or more.")
    if min(config.batches) < 1 or not min(*config.rates, *config.eps) > 0 or config.margin < 0:
        raise LabError("--batches must be 1 or more, --rates and --eps above 0 and --margin 0 or more.")
    if set(config.seeds) & set(config.tune_seeds):
        raise LabError("--seeds and --tune-seeds share a seed: choices must be made on seeds that are not compared.")


def _contenders(config: GlmConfig) -> tuple[str, ...]:
    return config.contenders or CONTENDERS


def _jobs(config: GlmConfig, name: str) -> list[Fit]:
    problem = problems.load(name, config.rows)
    for text in _contenders(config):
        contenders.parse(text).build(nn.Parameter(torch.zeros(1, problem.outputs, problem.x.shape[1])))
    plans = [Plan(batch, config.steps, min(config.evaluations, config.steps)) for batch in config.batches]
    return [
        Fit(name, text, plan, config.rows, tuple(sorted(config.rates)), config.eps, config.seeds, config.tune_seeds)
        for plan in plans
        for text in _contenders(config)
        if problem.parameters <= config.dense_limit or not contenders.parse(text).is_dense()
    ]


def _conclude(config: GlmConfig, jobs: Sequence[Fit], done: Results) -> Report:
    entries = [Entry.of(job.problem, job.plan.batch, job.contender, job.plan.marks(), done[job.key]) for job in jobs]
    trials = trials_of(entries)
    found = claim.verdicts(trials, _contenders(config), config.margin)
    rows = summarize(entries, trials, config.margin)
    return Report(
        rows=[vars(row) for row in rows],
        head=head(rows, "batch"),
        cells=cells(rows, _contenders(config), "batch"),
        title=f"slowness over that of the best diagonal method: {config.steps} steps, {len(config.seeds)} seeds",
        lines=claim.summary_lines(found, config.margin),
        picture=draw(panels(entries, trials, found)),
        data={"claim": [plain(verdict) for verdict in found], "curves": [vars(entry) for entry in entries]},
        note=" ".join((claim.__doc__ or "").split("\n\n")[1].split()),
        details=[(f"batch {batch}", *_by_problem(config, rows, batch)) for batch in config.batches],
    )


def _by_problem(config: GlmConfig, rows: Sequence[Row], batch: int) -> tuple[list[str], list[list[str]]]:
    own = [row for row in rows if row.batch == batch]
    return head(own, "problem"), cells(own, _contenders(config), "problem")
