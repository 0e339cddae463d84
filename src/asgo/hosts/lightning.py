"""Lightning: ``def configure_optimizers(self): return configure(self, lr=1e-2)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from asgo.presets.asgo import ASGO
from asgo.views.routing import Rule, route


def configure(
    module: nn.Module,
    *,
    optimizer: Callable[..., Optimizer] = ASGO,
    rules: Sequence[Rule] = (),
    per_head: bool = False,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What ``configure_optimizers`` of a ``LightningModule`` may return.

    Groups have the unique names of `asgo.route`, under which ``LearningRateMonitor`` logs them.

    Args:
        module: the ``LightningModule``, or the part of it that is trained.
        optimizer: a class of this library, or a function such as ``ASGO.paper``.
        rules: as for `asgo.route`.
        per_head: as for `asgo.route`.
        schedule: makes the schedule of the optimizer, which is advanced after every step; None: no schedule.
        options: hyperparameters, such as ``lr``.

    Returns:
        ``{"optimizer": ...}``, with a schedule ``{"optimizer": ..., "lr_scheduler": {...}}``.

    Raises:
        TypeError: `module` is not a module, or an option does not exist.
        ValueError: as `asgo.route` and `optimizer`.
    """
    built = optimizer(route(module, rules, per_head), **options)
    if schedule is None:
        return {"optimizer": built}
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule(built), "interval": "step"}}
