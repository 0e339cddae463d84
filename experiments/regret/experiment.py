"""``python -m experiments.regret``: BAG's synthetic experiment, the regret of several numbers of blocks.

"Blockwise Adaptivity: Faster Training and Better Generalization in Deep Learning", Zheng and Kwok, 2019: a label
``y`` of +1 or -1; the first half of 100 features are ``N(10 y, 100)`` with probability 0.5 and else 0, the second half
``N(-5 y, 25)`` with probability 0.4 and else 0; hinge loss, one example per round. Two blocks separate the halves, four
do too, three do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from scipy.optimize import linprog
from torch import Tensor, nn

from asgo.lab.compare.paired_test import PairedTest, paired_test
from asgo.lab.errors import LabError
from asgo.lab.figures import STYLES, label, png
from asgo.presets import BAG
from asgo.views import View
from experiments.jobs import JobPlan, Results
from experiments.runner import Report, run_experiment

FEATURES = 100
CHUNK = 100
"""Rounds that are drawn at once."""

LEVEL = 0.05
PAPER = ((2, 3), (4, 3), (3, 100), (100, 1))
"""Pairs of numbers of blocks of which the paper's figure has the first below the second."""


@dataclass(frozen=True)
class RegretConfig:
    """Reproduce BAG's synthetic experiment: hinge loss online, one step size for each of B blocks of 100 features.

    Args:
        blocks: numbers of blocks B that are compared; 1 is a single step size, 100 is AdaGrad.
        repeats: independent streams of examples, the same for every B.
        rounds: examples of a stream.
        lr: learning rate.
        eps: added to the root of each block's sum.
        seed: of the examples.
        processes: numbers of blocks at once, each with one thread; None: one per processor.
        out: folder to write; must be new or empty, or an experiment to --resume.
        resume: continue an interrupted experiment; what is done is not repeated.
    """

    blocks: tuple[int, ...] = (1, 2, 3, 4, 100)
    repeats: int = 100
    rounds: int = 10_000
    lr: float = 0.01
    eps: float = 1e-8
    seed: int = 0
    processes: int | None = None
    out: Path = Path("runs/regret")
    resume: bool = False


@dataclass(frozen=True)
class RegretJob:
    """A job: BAG with one number of blocks on all streams; with `blocks` of 0 the best fixed weights in hindsight."""

    blocks: int
    repeats: int
    rounds: int
    lr: float
    eps: float
    seed: int

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        return f"blocks-{self.blocks}" if self.blocks else "hindsight"

    @property
    def weight(self) -> float:
        """A step costs about as much for every number of blocks."""
        return 1.0 if self.blocks else 0.3

    def run(self) -> list[list[float]]:
        """Cumulative losses: one list for each mark, one number for each stream."""
        return play(self) if self.blocks else hindsight(self)


def do(job: RegretJob) -> list[list[float]]:
    """Do one job, in this process or another."""
    return job.run()


def marks(rounds: int) -> list[int]:
    """The rounds after which the regret is noted: about ten in every factor of ten."""
    return sorted({round(10 ** (k / 10)) for k in range(math.floor(10 * math.log10(rounds)) + 1)} | {rounds})


def examples(job: RegretJob) -> Iterator[tuple[Tensor, Tensor]]:
    """Features ``(repeats, 100)`` and labels ``(repeats,)`` of every round."""
    for chunk in range(math.ceil(job.rounds / CHUNK)):
        random = np.random.default_rng((job.seed, chunk))
        shape = (CHUNK, job.repeats, FEATURES)
        labels = random.choice((-1.0, 1.0), size=shape[:2])
        first = np.arange(FEATURES) < FEATURES // 2
        mean, spread = np.where(first, 10.0, -5.0), np.where(first, 10.0, 5.0)
        present = random.random(shape) < np.where(first, 0.5, 0.4)
        features = (mean * labels[..., None] + spread * random.standard_normal(shape)) * present
        rounds = min(CHUNK, job.rounds - chunk * CHUNK)
        yield from zip(torch.from_numpy(features)[:rounds], torch.from_numpy(labels)[:rounds], strict=True)


def view(blocks: int) -> View:
    """How BAG reads weights ``(repeats, 100)``: each stream's in `blocks` runs, as equal in length as can be."""
    if FEATURES % blocks == 0:
        return View("r (b n) -> (r b) 1 n", {"b": blocks})
    sizes = tuple(len(part) for part in np.array_split(np.arange(FEATURES), blocks))
    return View("r n -> r 1 n", (), sizes, 1)


@torch.no_grad()
def play(job: RegretJob) -> list[list[float]]:
    """BAG on every stream at once, from zero weights."""
    weights = nn.Parameter(torch.zeros(job.repeats, FEATURES, dtype=torch.float64))
    optimizer = BAG([{"params": [weights], "view": view(job.blocks)}], job.lr, job.eps)
    total, noted, at = torch.zeros(job.repeats, dtype=torch.float64), [], set(marks(job.rounds))
    for number, (x, y) in enumerate(examples(job), 1):
        loss = (1 - y * (weights * x).sum(1)).clamp_min(0)
        total += loss
        weights.grad = -(y * (loss > 0))[:, None] * x
        optimizer.step()
        if number in at:
            noted.append(total.tolist())
    return noted


def hindsight(job: RegretJob) -> list[list[float]]:
    """The smallest sum of losses that fixed weights could have had on all rounds; one mark, the last.

    It is 0 where some weights separate the stream: then a multiple of them has no loss at all. Those of Fisher's
    discriminant usually do. Where they do not, a linear programme decides.
    """
    first = torch.arange(FEATURES) < FEATURES // 2
    # mean over variance of a feature, by the moments of a normal number that is there with probability p
    mean = torch.where(first, 0.5 * 10, 0.4 * -5).double()
    variance = torch.where(first, 0.5 * 200, 0.4 * 50).double() - mean.square()
    smallest = torch.full((job.repeats,), math.inf, dtype=torch.float64)
    for x, y in examples(job):
        smallest = torch.minimum(smallest, y * (x @ (mean / variance)))
    hard = (smallest <= 0).nonzero()[:, 0].tolist()
    solved = {repeat: _programme(*_stream(job, repeat)) for repeat in hard}
    return [[solved.get(repeat, 0.0) for repeat in range(job.repeats)]]


def _stream(job: RegretJob, repeat: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = zip(*((x[repeat], y[repeat]) for x, y in examples(job)), strict=True)
    return torch.stack(x).numpy(), torch.stack(y).numpy()


def _programme(x: np.ndarray, y: np.ndarray) -> float:
    """``min sum xi`` over weights w and ``xi >= 0`` with ``y x.w + xi >= 1``."""
    rounds, features = x.shape
    cost = np.concatenate([np.zeros(features), np.ones(rounds)])
    rows = -np.concatenate([y[:, None] * x, np.eye(rounds)], axis=1)
    bounds = [(None, None)] * features + [(0, None)] * rounds
    return float(linprog(cost, rows, -np.ones(rounds), bounds=bounds, method="highs").fun)


# ---- the experiment ------------------------------------------------------------------------------


def regret(config: RegretConfig, console: Console | None = None) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and return what ``results.json`` holds.

    Raises:
        LabError: for a number or a folder that does not fit; nothing has been written then.
        Stopped: after SIGINT or SIGTERM; finished jobs are kept.
    """
    _check(config)
    shared = {name: getattr(config, name) for name in ("repeats", "rounds", "lr", "eps", "seed")}
    known = JobPlan([RegretJob(blocks=blocks, **shared) for blocks in (*config.blocks, 0)])
    return run_experiment("regret", config, do, lambda done: known, lambda done: _conclude(config, done), console)


def _check(config: RegretConfig) -> None:
    blocks = config.blocks
    if not blocks or len(set(blocks)) < len(blocks) or not 1 <= min(blocks) <= max(blocks) <= FEATURES:
        raise LabError(
            f"--blocks {' '.join(map(str, blocks))}: pass at least one number from 1 to {FEATURES}, each once."
        )
    for name in ("repeats", "rounds"):
        if getattr(config, name) < 1:
            raise LabError(f"--{name} {getattr(config, name)} is out of range: pass 1 or more.")
    if not 0 < config.lr < math.inf or not 0 < config.eps < math.inf or config.seed < 0:
        raise LabError("--lr and --eps must be above 0, --seed 0 or more.")


@dataclass(frozen=True)
class Row:
    """A line of ``table.csv``.

    Args:
        blocks: their number.
        regret: mean over repeats, after the last round.
        spread: standard deviation over repeats; None below two.
        standard_error: of the mean; None below two.
        early: mean cumulative loss after a tenth of the rounds.
    """

    blocks: int
    regret: float
    spread: float | None
    standard_error: float | None
    early: float


def _conclude(config: RegretConfig, done: Results) -> Report:
    at = marks(config.rounds)
    tenth = max(i for i, mark in enumerate(at) if mark <= max(1, config.rounds / 10))
    best = done["hindsight"][0]
    losses = {blocks: done[f"blocks-{blocks}"] for blocks in config.blocks}
    final = {b: [loss - fixed for loss, fixed in zip(own[-1], best, strict=True)] for b, own in losses.items()}
    rows = [_row(blocks, final[blocks], losses[blocks][tenth]) for blocks in config.blocks]
    order = sorted(final, key=lambda blocks: fmean(final[blocks]))
    neighbours = [_test(final, *pair) for pair in pairwise(order)]
    paper = [_test(final, *pair) for pair in PAPER if set(pair) <= set(final)]
    spread = [("-", "-") if r.spread is None else (f"{r.spread:.3f}", f"{r.standard_error:.3f}") for r in rows]
    return Report(
        rows=[vars(row) for row in rows],
        head=("blocks", "regret", "standard deviation", "standard error", f"loss to round {at[tenth]}"),
        cells=[[str(r.blocks), f"{r.regret:.3f}", *s, f"{r.early:.3f}"] for r, s in zip(rows, spread, strict=True)],
        title=f"{config.repeats} streams of {config.rounds} rounds",
        lines=[
            f"lowest to highest: B = {', '.join(map(str, order))}",
            *(str(test).replace("seed", "stream") for test in neighbours),
            _answer(paper),
        ],
        picture=draw(at, losses, final),
        data={
            "tests": [asdict(test) for test in neighbours],
            "paper": [asdict(test) for test in paper],
            "final": final,
        },
        note="Regret: sum of hinge losses less that of the best fixed weights; mean over streams.",
    )


def _row(blocks: int, final: Sequence[float], early: Sequence[float]) -> Row:
    spread = stdev(final) if len(final) > 1 else None
    error = None if spread is None else spread / math.sqrt(len(final))
    return Row(blocks, fmean(final), spread, error, fmean(early))


def _test(final: dict[int, list[float]], first: int, second: int) -> PairedTest:
    return paired_test(f"B={first}", f"B={second}", list(zip(final[first], final[second], strict=True)))


def _answer(tests: Sequence[PairedTest]) -> str:
    """The paper's order, in words."""
    if not tests:
        return "none of the paper's pairs is among these numbers of blocks: nothing to judge"
    names = {test: f"{test.first} below {test.second}" for test in tests}
    shown = [names[t] for t in tests if t.difference < 0 and t.p < LEVEL]
    tended = [names[t] for t in tests if t.difference < 0 and not t.p < LEVEL]
    failed = [names[t] for t in tests if not t.difference < 0]
    return (
        f"the paper's order (B = 2 and 4, then 3, then 100, then 1) {'does not hold' if failed else 'holds'}; shown by "
        f"a paired t-test at 5 %: {', '.join(shown) or 'none'}; in the mean only: {', '.join(tended) or 'none'}; "
        f"the other way round: {', '.join(failed) or 'none'}"
    )


def draw(at: Sequence[int], losses: dict[int, list[list[float]]], final: dict[int, list[float]]) -> bytes:
    """Mean cumulative loss against rounds, and the regrets of all streams at the end."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    curves, boxes = figure.subplots(1, 2)
    for number, (blocks, own) in enumerate(losses.items()):
        color, style, marker = STYLES[number % len(STYLES)]
        means = [fmean(values) for values in own]
        curves.plot(at, means, color=color, linestyle=style, marker=marker, markersize=4, label=f"B = {blocks}")
    curves.set_xscale("log")
    label(curves, "round", "mean cumulative loss")
    boxes.boxplot(list(final.values()), tick_labels=[str(blocks) for blocks in final], showmeans=True)
    label(boxes, "blocks", f"regret after round {at[-1]}")
    return png(figure)
