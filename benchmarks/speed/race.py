"""Optimizers in turns: in every round each steps once through its interval, in an order that is drawn anew."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.speed.config import StepConfig
from benchmarks.speed.optimizers import BENCH_OPTIMIZERS, COLD_STEPS, BenchSpec
from benchmarks.speed.timing import WorkProgress, held_bytes, peak_bytes, seconds
from benchmarks.speed.workloads import Workload

ANCHORS = ("muon", "adamw", "adamw-fused")
"""What the others are compared with; they take part in every sweep."""
SAMPLE = 64
"""Numbers at the start of each parameter that tell whether a step moved it."""


@dataclass(frozen=True)
class Entry:
    """A spec with an interval."""

    name: str
    interval: int | None

    @property
    def spec(self) -> BenchSpec:
        """Its row of `BENCH_OPTIMIZERS`."""
        return BENCH_OPTIMIZERS[self.name]

    @property
    def steps(self) -> int:
        """Steps of one turn."""
        return self.interval or 1

    def __str__(self) -> str:
        return self.name if self.steps == 1 else f"{self.name} every {self.interval}"


def make_entries(names: Sequence[str], intervals: Sequence[int]) -> list[Entry]:
    """Each name with the intervals that it takes part with."""
    takes = {"all": tuple(intervals), "first": tuple(intervals[:1]), "every": (1,), "none": (None,)}
    return [Entry(name, interval) for name in names for interval in takes[BENCH_OPTIMIZERS[name].intervals]]


def warm_steps(entry: Entry, warm: int) -> int:
    """Steps before the first turn: `warm` for those of ours that refresh all roots in their first ten steps."""
    is_staggered = entry.spec.is_ours and entry.spec.intervals != "every"
    return warm if is_staggered else COLD_STEPS


def work(entry: Entry, warm: int, repeats: int) -> int:
    """All steps of an entry in a sweep: before its turns, in them, and one more turn to measure memory."""
    return warm_steps(entry, warm) + (repeats + 1) * entry.steps


def sweeps(entries: Sequence[Entry], workload: Workload, budget: float) -> Iterator[list[Entry]]:
    """Groups of entries whose states fit in `budget` bytes together, each with the anchors among them.

    An entry that does not fit even so is tried all the same, alone with the anchors.
    """
    anchors = [entry for entry in entries if entry.name in ANCHORS]
    start = sum(entry.spec.memory(workload) for entry in anchors)
    group, taken = list(anchors), start
    for entry in (entry for entry in entries if entry.name not in ANCHORS):
        needs = entry.spec.memory(workload)
        if len(group) > len(anchors) and taken + needs > budget:
            yield group
            group, taken = list(anchors), start
        group.append(entry)
        taken += needs
    if group:
        yield group


class TimedOptimizer:
    """One optimizer in a sweep.

    Args:
        entry: which.
        warm: steps of ours before the first turn.
        repeats: how many turns.
    """

    def __init__(self, entry: Entry, warm: int, repeats: int) -> None:
        self.entry = entry
        self.warm = warm_steps(entry, warm)
        self.left = work(entry, warm, repeats)
        self.optimizer: Optimizer | None = None
        self.failure = ""
        self.turns: list[list[float]] = []
        self.state_bytes: int | None = None
        self.peak_bytes: int | None = None
        self._still: set[int] | None = None

    @property
    def means(self) -> list[float]:
        """Seconds per step of each turn."""
        return [fmean(turn) for turn in self.turns]

    @property
    def worst(self) -> float | None:
        """The slowest step of the interval over the median one, each the median of its turns."""
        if not self.turns:
            return None
        steps = [median(step) for step in zip(*self.turns, strict=True)]
        return max(steps) / median(steps)

    def fail(self, why: str) -> None:
        """Leave the sweep."""
        self.failure, self.optimizer, self.turns = why, None, []
        self.state_bytes = self.peak_bytes = None


def reason(error: Exception) -> str:
    """An exception as one line."""
    if isinstance(error, ImportError) and error.name:
        return f"{error.name} is not installed: pip install 'asgo[peers]'"
    text = " ".join(str(error).split())
    if isinstance(error, TimeoutError):
        return text
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


class Sweep:
    """Several optimizers that take turns on one workload.

    Args:
        workload: what they step.
        entries: which take part.
        config: how many steps and turns, and how long a step may take.
        progress: told of every step.
    """

    def __init__(
        self, workload: Workload, entries: Sequence[Entry], config: StepConfig, progress: WorkProgress
    ) -> None:
        self.workload, self.config, self.progress = workload, config, progress
        self.device = workload.params[0].device
        self.racers = [TimedOptimizer(entry, config.warm, config.repeats) for entry in entries]

    def run(self) -> list[TimedOptimizer]:
        """Build, warm up, take turns, measure memory; the optimizers are gone afterwards."""
        self.workload.reset()
        for racer in self.racers:
            self._attempt(racer, self._build)
        longest = max(racer.warm for racer in self.racers)
        for number in range(longest):
            self._round(number, lambda racer, number=number: self._warm(racer, number))
        for number in range(longest, longest + self.config.repeats):
            self._round(number, self._turn)
        self._round(longest + self.config.repeats, self._measure)
        for racer in self.racers:
            racer.optimizer = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.racers

    def _round(self, number: int, act: Callable[[TimedOptimizer], None]) -> None:
        """New gradients, then every racer that is still in acts on them."""
        self.workload.draw(number)
        norms = _norms(self.workload.gradients)
        order = [racer for racer in self.racers if not racer.failure]
        random.Random(number).shuffle(order)
        for racer in order:
            self._attempt(racer, act)
            if not bool(_norms(self.workload.params).isfinite().all()):
                racer.fail("its parameters are no longer finite")
                self._advance(racer, racer.left, racer.failure)
                self.workload.reset()
            if not torch.equal(_norms(self.workload.gradients), norms):
                self.workload.draw(number)  # some optimizers work in the memory of the gradients

    def _attempt(self, racer: TimedOptimizer, act: Callable[[TimedOptimizer], None]) -> None:
        """Act on a racer; an exception ends its part, and its row tells the reason."""
        try:
            act(racer)
        except Exception as error:
            racer.fail(reason(error))
        if racer.failure:
            self._advance(racer, racer.left, racer.failure)

    def _advance(self, racer: TimedOptimizer, steps: int, note: str) -> None:
        racer.left -= steps
        self.progress.advance(steps, f"{self.workload.name}: {racer.entry} {note}")

    def _build(self, racer: TimedOptimizer) -> None:
        self.workload.attach()
        racer.optimizer = racer.entry.spec.build(self.workload, racer.entry.steps)

    def _warm(self, racer: TimedOptimizer, number: int) -> None:
        if number >= racer.warm:
            return
        before = self._samples()
        self._step(racer, checked=number >= racer.entry.spec.slow_starts)
        unmoved = {i for i, (old, new) in enumerate(zip(before, self._samples(), strict=True)) if torch.equal(old, new)}
        racer._still = unmoved if racer._still is None else racer._still & unmoved
        if number == racer.warm - 1 and racer._still:
            names = [name for group in self.workload.whole for name, _ in group["params"]]
            racer.fail(f"it does not move {names[min(racer._still)]}")

    def _turn(self, racer: TimedOptimizer) -> None:
        racer.turns.append([self._step(racer) for _ in range(racer.entry.steps)])

    def _measure(self, racer: TimedOptimizer) -> None:
        """State, and the most memory that one step takes on top."""
        held = [*self.workload.params, *self.workload.gradients]
        racer.state_bytes = held_bytes(racer.optimizer, held)
        peaks = []
        for _ in range(racer.entry.steps):
            self.workload.attach()
            peaks.append(peak_bytes(_stepper(racer), self.device))
            self._advance(racer, 1, "memory")
        racer.peak_bytes = max(peaks)

    def _step(self, racer: TimedOptimizer, checked: bool = True) -> float:
        self.workload.attach()
        taken = seconds(_stepper(racer), self.device)
        self._advance(racer, 1, f"{taken:.3g} s")
        if checked and taken > self.config.limit:
            raise TimeoutError(f"a step took {taken:.1f} s, more than --limit {self.config.limit:g}")
        return taken

    def _samples(self) -> list[Tensor]:
        return [param.detach().flatten()[:SAMPLE].clone() for param in self.workload.params]


def _stepper(racer: TimedOptimizer) -> Callable[[], object]:
    if racer.optimizer is None:
        raise RuntimeError("it was not built")
    return racer.optimizer.step


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors], 2, torch.float32))
