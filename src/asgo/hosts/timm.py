"""timm: `register` adds the names, ``create_optimizer_v2(model, "asgo", lr=1e-2, param_group_fn=groups)`` the views.

timm gives an optimizer parameters without names, unless ``param_group_fn`` makes the groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import Optimizer

from asgo.hosts.common import BY_NAME, check_module, needed
from asgo.optimizer.step import StructuredOptimizer
from asgo.views.routing import Rule, route


def register() -> list[str]:
    """Add the optimizers that have a weight decay, which timm always passes, to its registry.

    Each has the name of its class in lower case. ``BAG`` and ``AdaGram`` have no weight decay; ``SPAM`` contains an
    optimizer.

    Groups with timm's ``use_fallback`` (see ``fallback_list`` there) are stepped by AdamW.

    Returns:
        The names, ``"adablock"``, ``"asgo"`` and so on.

    Raises:
        ImportError: timm is not installed.
    """
    optim = needed("timm.optim", extra="timm")
    registry = import_module("timm.optim._optim_factory").default_registry  # timm exports it nowhere else
    taken = {name: inspect.signature(kind).parameters for name, kind in BY_NAME.items()}
    taken = {name: takes for name, takes in taken.items() if {"params", "weight_decay"} <= set(takes)}
    for name, takes in taken.items():
        kind = BY_NAME[name]
        info = optim.OptimInfo(
            name=name,
            opt_class=partial(_build, kind),
            description=(kind.__doc__ or "").partition("\n")[0],
            has_eps="eps" in takes,
            has_betas="betas" in takes,
        )
        registry.register(info)
    return sorted(taken)


def _build(kind: type[StructuredOptimizer], params: Iterable[Any], **options: Any) -> Optimizer:
    members = [{**each, "view": None} if _falls_back(each) else each for each in params]
    return kind(members, **options)


def _falls_back(member: Any) -> bool:
    return isinstance(member, dict) and member.get("use_fallback", False)


def groups(
    model: nn.Module,
    *,
    rules: Sequence[Rule] = (),
    per_head: bool = False,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """timm's own groups of weight decay and layer decay, with the names and views of `asgo.route` added.

    For ``param_group_fn``; timm then leaves weight decay and layer decay to it:
    ``param_group_fn=functools.partial(groups, weight_decay=0.05, layer_decay=0.75)``.

    Args:
        model: the model.
        rules: as for `asgo.route`; their ``options`` are not used, as timm decides the groups.
        per_head: as for `asgo.route`.
        weight_decay: of parameters with two or more axes that are not in ``model.no_weight_decay()``.
        layer_decay: factor of the learning rate from each layer to the one before it; None: none.

    Raises:
        ImportError: timm is not installed.
        ValueError: as `asgo.route`.
    """
    optim = needed("timm.optim", extra="timm")
    check_module("asgo.hosts.timm.groups", model)
    names, views = _decided(route(model, rules, per_head))
    excluded = getattr(model, "no_weight_decay", set)()
    if layer_decay is None:
        found = optim.param_groups_weight_decay(model, weight_decay, no_weight_decay_list=excluded)
    else:
        found = optim.param_groups_layer_decay(model, weight_decay, excluded, layer_decay=layer_decay)
    return [
        {
            **group,
            "params": [(names[param], param) for param in group["params"]],
            "views": [views[param] for param in group["params"]],
        }
        for group in found
    ]


def _decided(routed: Sequence[dict[str, Any]]) -> tuple[dict[Any, str], dict[Any, Any]]:
    """Name and view of every parameter."""
    members = [pair for group in routed for pair in zip(group["params"], group["views"], strict=True)]
    return {param: name for (name, param), _ in members}, {param: view for (_, param), view in members}
