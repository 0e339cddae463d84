"""TheoryJob a problem with a method at several step sizes at once, and keep regret and bounds along the way.

All repeats and step sizes are one stack of independent matrices. The optimizer itself takes the step, at a step size of
1 and from zero, which gives its direction; each matrix then moves by its own step size along it. That is exact:
no direction depends on weights or step size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.theory import bounds
from experiments.theory.instance import ProblemConfig
from experiments.theory.methods import METHODS, Method, Projection
from experiments.theory.problem import Problem, Round
from experiments.theory.problems import PROBLEMS

FIELDS = ("regret", "linear", "excess", "bound", "rate", "path", "distance", "trace")


@dataclass(frozen=True)
class TheoryJob:
    """A job: one method on the instances of a problem.

    Args:
        dials: of the problem.
        method: in `METHODS`.
        rounds: `T`.
        steps: step sizes as multiples of the one at which the bound is smallest, D being the first distance.
        marks: the rounds after which everything is noted; the last is `rounds`.
    """

    dials: ProblemConfig
    method: str
    rounds: int
    steps: tuple[float, ...]
    marks: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        dials = self.dials
        kind = "play" if len(self.marks) > 1 else "map"
        return f"{kind} {dials.problem} rank={dials.rank} spread={dials.spread:g} {self.method}"

    @property
    def weight(self) -> float:
        """About how long it takes."""
        d, stack = self.dials.rows * self.dials.columns, self.dials.repeats * len(self.steps)
        return self.rounds * (2 + (stack * (d / 96) ** 3 if self.method == "full-adagrad" else 0.1 * stack))

    def run(self) -> dict[str, list[list[list[float]]]]:
        """See `Record.plain`."""
        return play(self).plain()


def do(job: TheoryJob) -> dict[str, list[list[list[float]]]]:
    """Do one job, in this process or another."""
    return job.run()


def marks(rounds: int) -> tuple[int, ...]:
    """About eight in every factor of ten."""
    return tuple(sorted({round(10 ** (k / 8)) for k in range(math.floor(8 * math.log10(rounds)) + 1)} | {rounds}))


class Record:
    """What is summed over the rounds of a run, and the bounds that follow from it; all ``(R, S)``.

    Args:
        problem: that is played.
        method: that plays.
        eta: step sizes ``(R, S)``.
    """

    def __init__(self, problem: Problem, method: Method, eta: Tensor) -> None:
        self.problem, self.method, self.eta = problem, method, eta
        self.m, self.n = problem.instance.target.shape[1:]
        self.first = problem.instance.target.flatten(1).norm(dim=1)[:, None]  # ||W_0 - W*||_F, W_0 being zero
        self.regret, self.linear, self.excess, self.distance = (torch.zeros_like(eta) for _ in range(4))
        self.statistic: tuple[Tensor, ...] = ()
        self.noise: tuple[Tensor, ...] = ()
        self.rounds = 0
        self.noted: dict[str, list[Tensor]] = {name: [] for name in FIELDS}
        self._prepare()

    def _prepare(self) -> None:
        """The constants of the problem as this method sees them, each ``(R, 1)``; None where it has no such theorem."""
        self.moment = self.sigma = None
        if isinstance(self.method, Projection):
            of = self.method.of_hessian if self.problem.smooth else self.method.of_moment
            self.moment = of(self.problem.moment(), self.m, self.n)[:, None]
            covariance = self.problem.covariance()
            if covariance is not None:
                self.sigma = self.method.of_moment(covariance, self.m, self.n)[:, None]

    def add(self, weights: Tensor, seen: Round) -> None:
        """One round; `weights` are those that were played."""
        error = weights - self.problem.instance.target[:, None]
        self.rounds += 1
        self.regret += seen.regret
        self.excess += seen.excess
        self.linear += (seen.gradient * error).sum((2, 3))
        self.distance = torch.maximum(self.distance, self.method.distance(error))
        self.statistic = _sum(self.statistic, self.method.measure(seen.gradient))
        if seen.noise is not None:
            self.noise = _sum(self.noise, self.method.measure(seen.noise))

    def note(self) -> None:
        """Keep how things stand."""
        weight = self.method.weight(self.problem.gradient_rank)
        factor = bounds.factor(self.distance, self.eta, weight)
        slack = self.method.slack(factor, self.first, self.eta, self.m * self.n)
        trace = self.method.trace(self.statistic)
        rate, path = self._smooth(factor, slack) if self.problem.smooth else (self._nonsmooth(factor, slack), None)
        values = (self.regret, self.linear, self.excess, factor * trace + slack, rate, path, self.distance, trace)
        for name, value in zip(FIELDS, values, strict=True):
            self.noted[name].append(torch.full_like(trace, math.nan) if value is None else value.clone())

    def _nonsmooth(self, factor: Tensor, slack: Tensor) -> Tensor | None:
        return None if self.moment is None else bounds.nonsmooth(factor, self.moment, self.rounds) + slack

    def _smooth(self, factor: Tensor, slack: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The bound of the theorem, and the inequality behind it with the noise that this very run has met."""
        if self.moment is None:
            return None, None
        if not self.noise:
            rate = bounds.smooth(factor, self.moment, slack)
            return rate, rate
        expected = torch.zeros_like(slack) if self.sigma is None else math.sqrt(self.rounds) * self.sigma
        met = factor * self.method.trace(self.noise) - (self.regret - self.excess)
        rate = bounds.smooth(factor, self.moment, factor * expected + slack)
        return rate, bounds.smooth(factor, self.moment, met + slack)

    def plain(self) -> dict[str, list[list[list[float]]]]:
        """Each field's values by mark, repeat and step size; and what does not change, as if it were a single mark."""
        constants = {"eta": self.eta, "unit": self.problem.unit.expand_as(self.eta)}
        return {name: torch.stack(values).tolist() for name, values in self.noted.items()} | {
            name: [value.tolist()] for name, value in constants.items()
        }


def _sum(total: tuple[Tensor, ...], more: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(total, more, strict=True)) if total else more


@torch.no_grad()
def play(job: TheoryJob) -> Record:
    """All rounds, from zero weights."""
    problem, method = PROBLEMS[job.dials.problem](job.dials), METHODS[job.method]
    target = problem.instance.target
    (repeats, m, n), count = target.shape, len(job.steps)
    eta = step_sizes(method, problem, job.steps)
    record = Record(problem, method, eta)
    move = nn.Parameter(torch.zeros(repeats * count, m, n, dtype=target.dtype))
    optimizer = method.build(move)
    weights = torch.zeros(repeats, count, m, n, dtype=target.dtype)
    at = set(job.marks)
    for number in range(1, job.rounds + 1):
        seen = problem.round(weights)
        record.add(weights, seen)
        move.grad = seen.gradient.reshape(move.shape)
        move.zero_()
        optimizer.step()
        weights = weights + eta[:, :, None, None] * move.view_as(weights)
        if number in at:
            record.note()
    return record


def step_sizes(method: Method, problem: Problem, multiples: Sequence[float]) -> Tensor:
    """``(R, S)``: multiples of the step that is best for the first distance."""
    first = method.distance(problem.instance.target)
    best = bounds.best_step(first, method.weight(problem.gradient_rank))
    return best[:, None] * torch.tensor(multiples, dtype=best.dtype)
