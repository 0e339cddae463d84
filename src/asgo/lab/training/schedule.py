"""The learning rate over a run, as a factor on the peak."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from asgo.lab.config.runs import ScheduleConfig


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of step number `step` (from 0) of `steps`, as a share of the peak.

    Step ``s`` of ``w`` warm-up steps has ``(s + 1) / w``; the fall starts at 1 and ends at
    `final_lr_fraction` on the last step.
    """
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup + 1) / max(1, steps - warmup))
    height = 0.5 * (1 + math.cos(math.pi * done)) if config.kind == "cosine" else 1 - done
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * height


def scheduler(optimizer: Optimizer, config: ScheduleConfig, steps: int) -> LambdaLR:
    """A torch scheduler that multiplies every group's own learning rate by `factor`."""
    return LambdaLR(optimizer, lambda step: factor(config, min(step, steps - 1), steps))
