"""``python -m experiments.theory``: regret beside its bound on convex problems, and where each method wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from asgo.lab.errors import LabError
from experiments.jobs import JobPlan
from experiments.runner import run_experiment
from experiments.theory.instance import ProblemConfig, Structure
from experiments.theory.methods import METHODS
from experiments.theory.play import TheoryJob, do, marks
from experiments.theory.problems import PROBLEMS
from experiments.theory.report import conclude

LARGEST = 400
"""Most entries of W: full-matrix AdaGrad decomposes matrices of this side in every round."""

WIDEST = 1e6
"""Step sizes and noise stay within this factor, so that nothing overflows."""


@dataclass(frozen=True)
class TheoryConfig:
    """Show regret beside its bound on convex problems whose constants are all known, and where each method wins.

    Args:
        problems: absolute (matrix regression, absolute loss) and hinge (multiclass) are not smooth; squares (matrix
            least squares) and logistic (multiclass) are.
        methods: asgo (from the left, as in its theorem), asgo-right, adagrad, adagrad-norm, full-adagrad, shampoo.
        rows: of the matrix W; the classes of hinge and logistic.
        columns: of W.
        rank: directions of full size on the structured side: the rank of gradients where --tail is 0.
        tail: size of the other directions, from 0 to 1.
        spread: D_F^2 / D_op^2 of the best matrix, from 1 to the shorter side.
        structure: the side on which directions differ in size; none: no side can see it.
        aligned: the directions are those of the entries, as a diagonal method needs it.
        noise: absolute: standard deviation of labels over that of the first residuals; hinge: probability of a wrong
            label; squares and logistic: size of the gradients' noise over that of the first gradient.
        noise_shape: covariance of the gradients' noise: white, or that of the features.
        batch: examples, or draws of the noise, that a gradient is the mean of.
        rounds: steps.
        steps: step sizes, as multiples of the one at which the bound is smallest.
        repeats: independent instances and streams.
        sweep_problems: problems of which a map is made; none: no map.
        sweep_ranks: values of --rank on the map.
        sweep_spreads: values of --spread on the map.
        sweep_rounds: steps for each point of the map.
        seed: of all instances and streams.
        processes: jobs at once, each with one thread; None: one per processor.
        out: folder to write; must be new or empty, or an experiment to --resume.
        resume: continue an interrupted experiment; what is done is not repeated.
    """

    problems: tuple[str, ...] = tuple(PROBLEMS)
    methods: tuple[str, ...] = tuple(METHODS)
    rows: int = 8
    columns: int = 12
    rank: int = 2
    tail: float = 0.05
    spread: float = 8.0
    structure: Structure = "left"
    aligned: bool = False
    noise: float = 0.0
    noise_shape: Literal["white", "features"] = "white"
    batch: int = 16
    rounds: int = 1000
    steps: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 16.0)
    repeats: int = 2
    sweep_problems: tuple[str, ...] = ("absolute", "squares")
    sweep_ranks: tuple[int, ...] = (1, 2, 4, 6, 8)
    sweep_spreads: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0, 8.0)
    sweep_rounds: int = 200
    seed: int = 0
    processes: int | None = None
    out: Path = Path("runs/theory")
    resume: bool = False


def theory(config: TheoryConfig, console: Console | None = None) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and return what ``results.json`` holds.

    Raises:
        LabError: for a number or a folder that does not fit; nothing has been written then.
        Stopped: after SIGINT or SIGTERM; finished jobs are kept.
    """
    check(config)
    plays, maps = jobs(config)
    known = JobPlan([*plays, *maps])
    return run_experiment("theory", config, do, lambda done: known, lambda done: conclude(plays, maps, done), console)


def jobs(config: TheoryConfig) -> tuple[list[TheoryJob], list[TheoryJob]]:
    """Those with curves, and those of the map."""
    plays = [
        TheoryJob(_dials(config, problem, config.rank, config.spread), method, config.rounds, config.steps,
             marks(config.rounds))
        for problem in config.problems for method in config.methods
    ]  # fmt: skip
    maps = [
        TheoryJob(
            _dials(config, problem, rank, spread), method, config.sweep_rounds, config.steps, (config.sweep_rounds,)
        )
        for problem in config.sweep_problems
        for rank in config.sweep_ranks
        for spread in config.sweep_spreads
        for method in config.methods
    ]
    return plays, maps


def _dials(config: TheoryConfig, problem: str, rank: int, spread: float) -> ProblemConfig:
    shared = ("rows", "columns", "tail", "structure", "aligned", "noise", "batch", "repeats", "seed")
    values = {name: getattr(config, name) for name in shared}
    return ProblemConfig(problem=problem, rank=rank, spread=spread, white=config.noise_shape == "white", **values)


# ---- what fits -----------------------------------------------------------------------------------


def check(config: TheoryConfig) -> None:
    """Refuse what does not fit.

    Raises:
        LabError: naming the flag, what it was, and what would fit.
    """
    _check_names("problems", config.problems, PROBLEMS)
    _check_names("methods", config.methods, METHODS)
    _check_names("sweep-problems", config.sweep_problems, PROBLEMS, empty=True)
    for name in ("rows", "columns"):
        _check_range(name, getattr(config, name), 2, LARGEST // 2)
    if config.rows * config.columns > LARGEST:
        raise LabError(
            f"--rows {config.rows} times --columns {config.columns} are {config.rows * config.columns} entries, for "
            f"which full-matrix AdaGrad takes too long: pass at most {LARGEST} together."
        )
    for name, smallest in (("rounds", 10), ("sweep_rounds", 1), ("seed", 0)):
        _check_range(name.replace("_", "-"), getattr(config, name), smallest, math.inf)
    _check_range("batch", config.batch, 1, 100_000)
    _check_range("repeats", config.repeats, 1, 100)
    _check_range("tail", config.tail, 0, 1)
    most = 1 if "hinge" in (*config.problems, *config.sweep_problems) else WIDEST
    _check_range("noise", config.noise, 0, most)
    _check_steps(config.steps)
    _check_structure(config)


def _check_names(flag: str, names: Sequence[str], known: dict[str, Any], empty: bool = False) -> None:
    if (not names and not empty) or len(set(names)) < len(names):
        raise LabError(f"--{flag} {' '.join(names)}: pass at least one of {', '.join(known)}, each once.")
    for name in names:
        if name not in known:
            raise LabError(f"--{flag} {name!r} does not exist: choose from {', '.join(known)}.")


def _check_range(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or not math.isfinite(value):
        up_to = "or more" if high == math.inf else f"to {high:g}"
        raise LabError(f"--{flag} {value} is out of range: pass a number from {low:g} {up_to}.")


def _check_steps(steps: Sequence[float]) -> None:
    if not steps or len(set(steps)) < len(steps) or not all(1 / WIDEST <= step <= WIDEST for step in steps):
        given, span = " ".join(map(str, steps)), f"{1 / WIDEST:g} to {WIDEST:g}"
        raise LabError(f"--steps {given}: pass at least one number from {span}, each once.")


def _check_structure(config: TheoryConfig) -> None:
    sides = {"left": config.rows, "none": config.rows, "right": config.columns}
    most = sides.get(config.structure, min(config.rows, config.columns))
    shorter = min(config.rows, config.columns)
    for flag, values, high in (
        ("rank", (config.rank,), most),
        ("spread", (config.spread,), shorter),
        ("sweep-ranks", config.sweep_ranks, most),
        ("sweep-spreads", config.sweep_spreads, shorter),
    ):
        if not values or len(set(values)) < len(values):
            raise LabError(f"--{flag} {' '.join(map(str, values))}: pass at least one number, each once.")
        for value in values:
            _check_range(flag, value, 1, high)
