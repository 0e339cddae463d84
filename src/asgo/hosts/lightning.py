"""Lightning: ``def configure_optimizers(self): return configure(self, lr=1e-2)``.

For the package `lightning`, and for `pytorch_lightning` where that alone is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from asgo.hosts.common import METRICS, check_keys, check_module, flat, needed, optimizer_named, recording
from asgo.presets.asgo import ASGO
from asgo.views.routing import Rule, route

lightning = needed("lightning.pytorch", "pytorch_lightning", extra="lightning")


def configure(
    module: nn.Module,
    *,
    optimizer: str | Callable[..., Optimizer] = ASGO,
    rules: Sequence[Rule] = (),
    per_head: bool = False,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What ``configure_optimizers`` of a ``LightningModule`` may return.

    Groups have the unique names of `asgo.route`, under which ``LearningRateMonitor`` logs them.

    Args:
        module: the ``LightningModule``, or the part of it that is trained.
        optimizer: a class of this library, its name (``"dasgo"``), or a function such as ``ASGO.paper``.
        rules: as for `asgo.route`.
        per_head: as for `asgo.route`.
        schedule: makes the schedule of the optimizer, which is advanced after every step; None: no schedule.
        options: hyperparameters, such as ``lr``.

    Returns:
        ``{"optimizer": ...}``, with a schedule ``{"optimizer": ..., "lr_scheduler": {...}}``.

    Raises:
        TypeError: `module` is not a module, or an option does not exist.
        ValueError: no optimizer has the name; as `asgo.route` and `optimizer`.
    """
    check_module("asgo.hosts.lightning.configure", module)
    built = optimizer_named(optimizer)(route(module, rules, per_head), **options)
    if schedule is None:
        return {"optimizer": built}
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule(built), "interval": "step"}}


class MetricsCallback(lightning.Callback):
    """Logs `StructuredOptimizer.metrics`: ``Trainer(callbacks=[MetricsCallback()])``.

    They go to every logger of the Trainer, as ``ratio/NAME`` and so on, with its ``global_step``.

    Args:
        every: steps between two; None: ``log_every_n_steps`` of the Trainer.
        keys: which of the metrics.
        parameters: a pattern of the names of parameters, as for `fnmatch`.

    Raises:
        ValueError: a metric that does not exist.
    """

    def __init__(self, every: int | None = None, keys: Sequence[str] = METRICS, parameters: str = "*") -> None:
        self._every, self._keys, self._parameters = every, tuple(keys), parameters
        check_keys(self._keys, every)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise `TypeError` for another optimizer before the first step."""
        for optimizer in trainer.optimizers:
            recording(optimizer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Record the step if it is logged."""
        recording(optimizer).record_metrics(int(self._is_due(trainer, trainer.global_step + 1)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Send what was recorded, once for each step."""
        step = trainer.global_step
        if self._is_due(trainer, step) and step != self._logged:
            self._logged = step
            for optimizer in trainer.optimizers:
                logs = flat(recording(optimizer).metrics(), self._keys, self._parameters)
                for logger in trainer.loggers:
                    logger.log_metrics(logs, step=step)

    _logged = 0

    def _is_due(self, trainer: Any, step: int) -> bool:
        return step % max(1, int(self._every or trainer.log_every_n_steps)) == 0
