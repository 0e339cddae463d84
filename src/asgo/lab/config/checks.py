"""What is checked of a run's configuration before anything is built or written."""

from __future__ import annotations

from asgo.lab.config.ranges import check_distinct, check_ranges
from asgo.lab.config.runs import CompareConfig, RunConfig
from asgo.lab.errors import LabError

LEAST_TRIALS = 4
"""Fewest trials of a search: its best quarter runs in full."""


def entry_name(text: str) -> str:
    """What reports call an entry of ``--optimizers``: what stands behind its key ``name``, else all of it."""
    words = text.partition(":")[2].split(",")
    return next((word.removeprefix("name=") for word in words if word.startswith("name=")), text)


def validate(config: RunConfig) -> None:
    """Raise `LabError` for values that no run can use."""
    config.data.check()
    check_ranges(config)
    if isinstance(config, CompareConfig):
        _check_comparison(config)


def _check_comparison(config: CompareConfig) -> None:
    names = [entry_name(text) for text in config.optimizers]
    check_distinct("optimizers", names)
    check_distinct("seeds", config.seeds)
    if (config.tune or config.search) and config.tune_seed in config.seeds:
        raise LabError(
            f"--tune-seed {config.tune_seed} is also one of --seeds: hyperparameters must be chosen on a seed "
            "that is not compared. Pass another."
        )
    if config.tune and config.search:
        raise LabError("--tune and --search both choose learning rates: pass one of them.")
    if 0 < config.search < LEAST_TRIALS:
        raise LabError(f"--search {config.search} is too small: pass {LEAST_TRIALS} trials or more, or 0.")
    if config.reference is not None and config.reference not in names:
        raise LabError(f"--reference {config.reference} is not compared: pass one of --optimizers {' '.join(names)}.")
    if config.target != "auto":
        try:
            float(config.target)
        except ValueError:
            raise LabError(f"--target {config.target!r} is not a loss: pass a number, or auto.") from None
