"""Hyperparameters chosen with the same number of trials for every optimizer.

`SHORT` of a search's trials run for a quarter of the steps: half of them at Sobol points of a box around the defaults,
the other half in a box of half the width around the best of those, which may leave the first box. The best quarter
of all runs in full ("Non-stochastic Best Arm Identification and Hyperparameter Optimization", Jamieson and Talwalkar
2016), and the best of these wins.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from asgo.lab.config.runs import OptimizerConfig
from asgo.lab.optimizers.factories import ADAMW_BETAS
from asgo.lab.optimizers.registry import OPTIMIZERS, takes
from asgo.lab.optimizers.spec import Entry

SHORT = 0.25
"""Share of the steps of a short trial, and of the trials that run in full."""
MOMENTUM = 0.9
"""The middle of every optimizer's range."""
WIDTHS = {"lr": 4.0, "momentum": 4.0, "weight_decay": 8.0, "adamw_lr": 4.0}
"""By which factor the first box reaches to either side; of the momentum, for 1 minus it."""
EDGE = 0.1
"""Share of the range tried, at either end, that counts as its edge."""
STAGES = ("wide", "near", "full")
SOBOL_SEED = 0
"""All optimizers get the same points of the unit cube."""


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Args:
        entry: of the comparison, as written.
        stage: one of `STAGES`.
        number: within the stage.
        values: the hyperparameters by name.
    """

    entry: str
    stage: str
    number: int
    values: Mapping[str, float]

    @property
    def key(self) -> str:
        """Its name in the record."""
        return f"{self.entry} {self.stage} {self.number}"

    @property
    def share(self) -> float:
        """Of the steps of a whole run."""
        return 1.0 if self.stage == "full" else SHORT


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        values: the best hyperparameters.
        val_loss: their final loss on the tuning seed.
        trials: how many there were, short and full.
        diverged: how many of them ended without a finite loss.
        edges: the hyperparameters whose best value lies in the outer tenth, in logarithms, of what was tried.
    """

    values: Mapping[str, float]
    val_loss: float
    trials: int
    diverged: int
    edges: tuple[str, ...]


def centre(entry: Entry) -> dict[str, float]:
    """The middle of the first box: what was written, else the recorded defaults.

    The momentum and the learning rate of the AdamW part have the same middle for all optimizers. What is 0, or what the
    optimizer does not have, is not searched.
    """
    config, known = entry.optimizer, takes(entry.optimizer.name)
    adamw_lr = config.adamw_lr if entry.given & {"lr", "adamw_lr"} else OPTIMIZERS["adamw"].lr
    found: dict[str, float | None] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay if "weight_decay" in known else 0.0,
        "adamw_lr": adamw_lr,
    }
    if known & {"momentum", "betas"}:
        found["momentum"] = MOMENTUM
    return {name: value for name in WIDTHS if (value := found.get(name))}


def wide(entry: Entry, budget: int) -> list[Trial]:
    """The first half of the short trials: the middle of the box and Sobol points in it."""
    middle = centre(entry)
    count = budget // 2
    points = [middle, *(_at(middle, 1.0, unit) for unit in _sobol(count - 1))]
    return [Trial(entry.name, "wide", i, values) for i, values in enumerate(points)]


def next_trials(
    stage: str, entry: str, budget: int, losses: Mapping[str, float], before: Sequence[Trial]
) -> list[Trial]:
    """The trials of a stage after `wide`, given the losses of those before.

    ``near``: Sobol points in a box of half the width around the best. ``full``: the best quarter of all.
    """
    ranked = sorted(before, key=lambda trial: losses.get(trial.key, math.inf))
    if stage == "near":
        points = (_at(ranked[0].values, 0.5, unit) for unit in _sobol(budget - budget // 2))
        return [Trial(entry, stage, i, values) for i, values in enumerate(points)]
    if stage == "full":
        return [replace(trial, stage=stage, number=i) for i, trial in enumerate(ranked[: _full_trials(budget)])]
    return []


def share(budget: int) -> float:
    """The cost of a search of one optimizer, in whole runs."""
    return budget * SHORT + _full_trials(budget) if budget else 0.0


def _full_trials(budget: int) -> int:
    return max(1, round(budget * SHORT))


def loss_of(result: Mapping[str, Any]) -> float:
    """The final loss in a record; infinite for a run that diverged."""
    return math.inf if result.get("val_loss") is None else result["val_loss"]


def conclude(losses: Mapping[str, float], trials: Sequence[Trial]) -> Found:
    """The best of the full trials, and whether it lies at an edge of what was tried."""
    best = min((t for t in trials if t.stage == "full"), key=lambda trial: losses[trial.key])
    edges = [name for name in best.values if _is_at_edge(name, best, trials)]
    diverged = sum(not math.isfinite(losses[trial.key]) for trial in trials)
    return Found(best.values, losses[best.key], len(trials), diverged, tuple(edges))


def _is_at_edge(name: str, best: Trial, trials: Sequence[Trial]) -> bool:
    at = [math.log(1 - t.values[name] if name == "momentum" else t.values[name]) for t in (best, *trials)]
    low, high = min(at), max(at)
    return low < high and not EDGE <= (at[0] - low) / (high - low) <= 1 - EDGE


def configured(config: OptimizerConfig, values: Mapping[str, float]) -> OptimizerConfig:
    """The optimizer with these hyperparameters."""
    fields = {name: value for name, value in values.items() if name != "momentum"}
    if "momentum" not in values:
        return replace(config, **fields)
    if "momentum" in takes(config.name):
        others = tuple(option for option in config.options if not option.startswith("momentum="))
        return replace(config, **fields, options=(*others, f"momentum={values['momentum']:.6g}"))
    return replace(config, **fields, betas=(values["momentum"], _betas(config)[1]))


def written(entry: Entry) -> str:
    """An entry as one word for ``--optimizers``, with every hyperparameter that a search chooses."""
    config = entry.optimizer
    words = [f"{name}={getattr(config, name):.6g}" for name in WIDTHS if getattr(config, name, None) is not None]
    words += [f"betas={config.betas[0]:.6g}/{config.betas[1]:.6g}"] if config.betas else []
    words += [*config.options, *([f"steps_factor={entry.steps_factor:g}"] if entry.steps_factor != 1 else [])]
    words += [f"{name}={value:g}" for name, value in entry.of_the_run().items()]
    return f"{config.name}:{','.join(words)}"


def record(trial: Trial, steps: int, seed: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a trial."""
    kept = ("status", "val_loss", "seconds", "seconds_per_step", "failed_roots")
    values = {key: result.get(key) for key in kept}
    return {"optimizer": trial.entry, "stage": trial.stage, "steps": steps, "seed": seed, **trial.values, **values}


def _betas(config: OptimizerConfig) -> tuple[float, float]:
    if config.betas is not None:
        return config.betas
    known = inspect.signature(OPTIMIZERS[config.name].constructor).parameters
    return ADAMW_BETAS if config.name == "adamw" else known["betas"].default


def _at(middle: Mapping[str, float], width: float, unit: Sequence[float]) -> dict[str, float]:
    """The point of the box around `middle` that is at `unit` of the cube; six digits, so that a record is exact."""
    found = {}
    for (name, factor), u in zip(WIDTHS.items(), unit, strict=True):
        if name in middle:
            move = factor ** (width * (2 * u - 1))
            value = 1 - min(0.9, (1 - middle[name]) * move) if name == "momentum" else middle[name] * move
            found[name] = float(f"{value:.6g}")
    return found


def _sobol(count: int) -> list[list[float]]:
    from scipy.stats import qmc  # noqa: PLC0415 (takes a second; --help should not)

    sampler = qmc.Sobol(len(WIDTHS), scramble=True, rng=SOBOL_SEED)
    return sampler.random_base2(max(0, math.ceil(math.log2(max(count, 1)))))[:count].tolist()
