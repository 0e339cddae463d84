"""The Hugging Face Trainer: ``Trainer(..., optimizer_cls_and_kwargs=(factory, {"lr": 1e-2}))``.

The Trainer gives a subclass of `torch.optim.Optimizer` parameters without names, and a factory the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from asgo.presets.asgo import ASGO
from asgo.views.routing import Rule, route


def factory(
    model: nn.Module | None = None,
    *,
    optimizer: Callable[..., Optimizer] = ASGO,
    rules: Sequence[Rule] = (),
    per_head: bool = False,
    **options: Any,
) -> Optimizer | partial[Any]:
    """``optimizer(route(model, rules, per_head), **options)``, in the two calls in which the Trainer makes it.

    The Trainer calls ``factory()(model, **kwargs)``. Its arguments ``learning_rate``, ``weight_decay`` and ``adam_*``
    do not reach a factory: give the options here. Its schedule multiplies every group's ``lr``.

    Args:
        model: given by the Trainer.
        optimizer: a class of this library, or a function such as ``ASGO.paper``.
        rules: as for `asgo.route`.
        per_head: as for `asgo.route`.
        options: hyperparameters, such as ``lr``.

    Returns:
        The optimizer; without a model a factory with these options, so that ``(factory(lr=1e-2), {})`` works too.

    Raises:
        TypeError: `model` is not a module, or an option does not exist.
        ValueError: as `asgo.route` and `optimizer`.
    """
    if model is None:
        return partial(factory, optimizer=optimizer, rules=rules, per_head=per_head, **options)
    return optimizer(route(model, rules, per_head), **options)
