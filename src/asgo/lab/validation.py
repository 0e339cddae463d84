"""Ranges of the harness's own settings, checked before anything is built or written."""

from __future__ import annotations

from asgo.lab.config import CompareConfig, RunConfig, TrainConfig, flag, flat
from asgo.lab.errors import LabError

# dotted name: smallest value, largest value, what it is
_RANGES: dict[str, tuple[float, float, str]] = {
    "steps": (1, 1e12, "a number of steps"),
    "grad_accumulation": (1, 1e6, "a number of batches per step"),
    "clip": (0, 1e12, "the largest gradient norm; 0 means no clipping"),
    "model.layers": (1, 1e4, "a number of blocks"),
    "model.heads": (1, 1e4, "a number of heads"),
    "model.kv_heads": (1, 1e4, "a number of heads"),
    "model.width": (1, 1e6, "the size of the residual stream"),
    "model.dropout": (0, 0.99, "a probability below 1"),
    "schedule.warmup_fraction": (0, 1, "a share of the steps"),
    "schedule.final_lr_fraction": (0, 1, "a share of the peak"),
    "machine.threads": (1, 4096, "a number of CPU threads"),
    "cadence.log_every": (1, 1e12, "a number of steps"),
    "cadence.eval_every": (1, 1e12, "a number of steps"),
    "cadence.eval_blocks": (0, 1e12, "a number of validation blocks; 0 means all"),
    "cadence.final_eval_blocks": (0, 1e12, "a number of validation blocks; 0 means all"),
    "cadence.checkpoint_every": (1, 1e12, "a number of steps"),
    "sample_every": (1, 1e12, "a number of steps"),
    "microbatches": (1, 1e6, "a number of parts of a batch; 1 measures no noise"),
    "after": (0, 1e12, "a number of steps"),
    "batches": (2, 1e6, "a number of batches"),
    "seed": (0, 2**63 - 1, "a seed"),
    "tune": (0, 1000, "a number of learning rates; 0 means no tuning"),
    "tune_seed": (0, 2**63 - 1, "a seed"),
}


def validate(config: RunConfig) -> None:
    """Refuse values that no run can use.

    Raises:
        LabError: naming the flag, the value and the range.
    """
    config.data.check()
    for name, value in flat(config).items():
        low, high, meaning = _RANGES.get(name, (0, 0, ""))
        if meaning and value is not None and not low <= value <= high:
            raise LabError(f"{flag(name)} {value} is out of range: pass {meaning}, from {low:g} to {high:g}.")
    if isinstance(config, TrainConfig):
        _check_optimizer_numbers(config)
    if isinstance(config, CompareConfig):
        _check_comparison(config)


def _check_optimizer_numbers(config: TrainConfig) -> None:
    for name in ("lr", "adamw_lr", "weight_decay"):
        value = getattr(config.optimizer, name)
        if value is not None and not 0 <= value < float("inf"):
            raise LabError(f"--optimizer.{name.replace('_', '-')} {value} is out of range: pass 0 or more.")


def _check_comparison(config: CompareConfig) -> None:
    for name, values in (("optimizers", config.optimizers), ("seeds", config.seeds)):
        if not values:
            raise LabError(f"--{name} is empty: pass at least one.")
        if len(set(values)) < len(values):
            raise LabError(f"--{name} {' '.join(map(str, values))} repeats an entry: pass each once.")
    if min(config.seeds) < 0:
        raise LabError(f"--seeds {min(config.seeds)} is out of range: pass 0 or more.")
    if config.tune and config.tune_seed in config.seeds:
        raise LabError(
            f"--tune-seed {config.tune_seed} is also one of --seeds: learning rates must be chosen on a seed "
            "that is not compared. Pass another."
        )
    if config.target != "auto":
        try:
            float(config.target)
        except ValueError:
            raise LabError(f"--target {config.target!r} is not a loss: pass a number, or auto.") from None
