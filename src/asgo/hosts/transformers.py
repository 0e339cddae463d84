"""The Hugging Face Trainer, and TRL's: ``Trainer(..., optimizer_cls_and_kwargs=(factory, {"lr": 1e-2}))``.

The Trainer gives a subclass of `torch.optim.Optimizer` parameters without names, and a factory the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from asgo.hosts.common import METRICS, check_keys, check_module, flat, needed, optimizer_named, recording
from asgo.presets.asgo import ASGO
from asgo.views.routing import Rule, route

transformers = needed("transformers", extra="transformers")


def factory(
    model: nn.Module | None = None,
    *,
    optimizer: str | Callable[..., Optimizer] = ASGO,
    rules: Sequence[Rule] = (),
    per_head: bool = False,
    **options: Any,
) -> Optimizer | partial[Any]:
    """``optimizer(route(model, rules, per_head), **options)``, in the two calls in which the Trainer makes it.

    The Trainer calls ``factory()(model, **kwargs)``. Its arguments ``learning_rate``, ``weight_decay`` and ``adam_*``
    do not reach a factory: give the options here. Its schedule multiplies every group's ``lr``.

    Args:
        model: given by the Trainer.
        optimizer: a class of this library, its name (``"dasgo"``), or a function such as ``ASGO.paper``.
        rules: as for `asgo.route`.
        per_head: as for `asgo.route`.
        options: hyperparameters, such as ``lr``.

    Returns:
        The optimizer; without a model a factory with these options, so that ``(factory(lr=1e-2), {})`` works too.

    Raises:
        TypeError: `model` is not a module, or an option does not exist.
        ValueError: no optimizer has the name; as `asgo.route` and `optimizer`.
    """
    build = optimizer_named(optimizer)
    if model is None:
        return partial(factory, optimizer=build, rules=rules, per_head=per_head, **options)
    check_module("asgo.hosts.transformers.factory", model)
    return build(route(model, rules, per_head), **options)


class MetricsCallback(transformers.TrainerCallback):
    """Logs `StructuredOptimizer.metrics`: ``trainer.add_callback(MetricsCallback(trainer))``.

    They go to the loggers of ``report_to``, and any other callback with an ``on_log``, as ``ratio/NAME`` and so on. The
    console and ``trainer_state.json`` are spared.

    Args:
        trainer: whose loggers to use.
        every: steps between two; None: ``logging_steps`` of the arguments.
        keys: which of the metrics.
        parameters: a pattern of the names of parameters, as for `fnmatch`.

    Raises:
        ValueError: a metric that does not exist.
    """

    def __init__(
        self, trainer: Any, every: int | None = None, keys: Sequence[str] = METRICS, parameters: str = "*"
    ) -> None:
        self._trainer, self._every, self._keys, self._parameters = trainer, every, tuple(keys), parameters
        check_keys(self._keys, every)

    def _is_due(self, step: int, state: Any) -> bool:
        return step % max(1, int(self._every or state.logging_steps)) == 0

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **given: Any) -> None:
        """Raise `TypeError` for another optimizer before the first step."""
        recording(optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **given: Any) -> None:
        """Record the step if it is logged."""
        recording(optimizer).record_metrics(int(self._is_due(state.global_step + 1, state)))

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **given: Any) -> None:
        """Send the recorded metrics to the callbacks that log."""
        if self._is_due(state.global_step, state):
            logs = flat(recording(optimizer).metrics(), self._keys, self._parameters)
            silent = (transformers.PrinterCallback, transformers.ProgressCallback, MetricsCallback)
            for callback in self._trainer.callback_handler.callbacks:
                if not isinstance(callback, silent):
                    callback.on_log(args, state, control, logs=dict(logs), model=self._trainer.model)
