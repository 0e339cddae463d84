"""Optimizer state by parameter name.

``optimizer.state_dict()`` numbers parameters by their place in the groups, so it cannot be loaded once the groups
are cut differently. Here state is keyed by name: it survives regrouping, and a resumed run continues bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from asgo.distributed.state_dict import assign
from asgo.optimizer.loading import Saved, check_saved, completed, foreign
from asgo.optimizer.param_groups import hyperparameters_of, views_of
from asgo.optimizer.step import StructuredOptimizer
from asgo.views import View

FORMAT = 1


def named_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state and hyperparameters, keyed by parameter name; plain data and tensors only.

    Returns:
        ``{"format": 1, "state": {name: {key: tensor}}, "groups": [{"params": [name, ...], "lr": ..., ...}]}``;
        the tensors are the optimizer's own, not copies. Keys and shapes are the same on every
        rank, as on one process; tensors that are sharded over ranks are `DTensor`.

    Raises:
        ValueError: parameters without names.
    """
    packed = optimizer.state_dict()
    names = _named(optimizer)
    ids = [i for group in packed["param_groups"] for i in group["params"]]
    state = {name: dict(packed["state"].get(i, {})) for name, i in zip(names, ids, strict=True)}
    groups = [
        {**{key: value for key, value in group.items() if key != "param_names"}, "params": list(group["param_names"])}
        for group in optimizer.param_groups
    ]
    return {"format": FORMAT, "state": state, "groups": groups}


def load_named_state_dict(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what `named_state_dict` gave into an optimizer of the same parameters, however they are grouped.

    A group with the same parameters as a saved one takes its hyperparameters (learning rate included), as
    ``load_state_dict`` does; a regrouped one keeps its own.

    Raises:
        ValueError: parameters that are missing on either side, state of other shapes; nothing has changed then.
    """
    caller, own = type(optimizer).__name__, named_state_dict(optimizer)["state"]
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{caller}: the checkpoint has format {saved.get('format')!r}, known is {FORMAT}. Pass what "
            "asgo.checkpoint.named_state_dict gave."
        )
    differing = sorted(own.keys() ^ saved["state"].keys())
    if differing:
        side = "the model" if differing[0] in own else "the checkpoint"
        raise ValueError(
            f"{caller}: {len(differing)} parameters are not on both sides, first {differing[0]!r}, only in {side}: the "
            "checkpoint is of another model. Build the model it was saved from."
        )
    named, views = _named(optimizer), _views(optimizer)
    saved_views = {name: view for group in saved["groups"] for name, view in views_of_saved(group)}
    found = {param: Saved(saved["state"][name], saved_views.get(name, ...)) for name, param in named.items()}
    added = optimizer.added_keys() if isinstance(optimizer, StructuredOptimizer) else {}
    found = optimizer.converted(found) if isinstance(optimizer, StructuredOptimizer) else found
    check_saved(optimizer, found, {param: own[name] for name, param in named.items()}, views, added)
    with torch.no_grad():
        for name, param in named.items():
            assign(own[name], completed(found[param].state, own[name], added))
            optimizer.state[param].update(deepcopy(foreign(found[param].state)))
    take_hyperparameters(optimizer, saved["groups"])


def take_hyperparameters(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Give each group the saved hyperparameters of the group that has the same parameters, if there is one."""
    hyperparameters = {frozenset(group["params"]): group for group in groups}
    for group in optimizer.param_groups:
        same = hyperparameters.get(frozenset(group["param_names"]), {})
        group.update(hyperparameters_of(same, group))


def views_of_saved(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and views of a saved group; one of an earlier version has one view for all."""
    views = group["views"] if "views" in group else [group.get("view", ...)] * len(group["params"])
    return list(zip(group["params"], views, strict=True))


def _views(optimizer: Optimizer) -> dict[Tensor, View | None]:
    return {
        param: view
        for group in optimizer.param_groups
        for param, view in zip(group["params"], views_of(group), strict=True)
    }


def _named(optimizer: Optimizer) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise ValueError(
                f"{type(optimizer).__name__}: its parameters have no names, which a checkpoint by name needs. Build "
                "it from asgo.route(model) or model.named_parameters()."
            )
        named |= dict(zip(group["param_names"], group["params"], strict=True))
    return named
