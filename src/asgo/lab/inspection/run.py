"""The training run whose gradients are looked at."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

from asgo.lab.config.checks import validate
from asgo.lab.config.runs import OptimizerConfig, RunConfig, TrainConfig
from asgo.lab.errors import LabError
from asgo.lab.models.language import check_model
from asgo.lab.optimizers.registry import resolve


def run_of(who: str, config: RunConfig, optimizer: OptimizerConfig, seed: int, out: Path, resume: bool) -> TrainConfig:
    """The run that a command's configuration describes; raises `LabError` for what cannot be trained."""
    validate(config)
    shared = {f.name: getattr(config, f.name) for f in fields(RunConfig)}
    run = TrainConfig(**shared, optimizer=resolve(optimizer), seed=seed, out=out, resume=resume)
    validate(run)
    check_model(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LabError(f"{who} runs in one process: start it without torchrun.")
    return run
