"""What stands in a parameter group: parameters, their names and their views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from asgo.views import View


def check_ordered(params: Any) -> None:
    """Raise `TypeError` for a set, whose order differs from run to run."""
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must be in order, and a set has none: pass a list, or model.named_parameters().")


def members_of(group: Any) -> list[tuple[str | None, Tensor]]:
    """The parameters of a group and their names, None where it gives none.

    Raises:
        TypeError: no mapping with the key ``params``, a set, members that are no tensors.
    """
    if not isinstance(group, Mapping) or "params" not in group:
        raise TypeError(f"a group must be a dict with the key 'params'; got {type(group).__name__}.")
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    check_ordered(params)
    members = list(params)
    names = list(group.get("param_names") or ())
    return [_named(member, names[i] if i < len(names) else None) for i, member in enumerate(members)]


def _named(member: Any, name: str | None) -> tuple[str | None, Tensor]:
    if isinstance(member, tuple) and len(member) == 2:
        name, member = member
    if not isinstance(member, Tensor):
        raise TypeError(f"parameters must be tensors or (name, tensor) pairs; got {type(member).__name__}.")
    return name, member


def given_views(who: str, group: Mapping[str, Any], count: int) -> list[View | None] | None:
    """The views that a group gives its `count` parameters, by ``views`` or one ``view`` for all; None: it gives none.

    Raises:
        ValueError: views of another number, or that are not understood.
    """
    if "views" in group:
        views = [View.of(view) for view in group["views"]]
        if len(views) != count:
            raise ValueError(f"{who}: a group has {count} parameters and {len(views)} views; pass one for each.")
        return views
    return [View.of(group["view"])] * count if "view" in group else None


def views_of(group: Mapping[str, Any]) -> list[View | None]:
    """The views of the parameters of a group of an optimizer, in order; None for AdamW."""
    return [View.of(view) for view in group["views"]]


def with_views(group: Mapping[str, Any]) -> list[tuple[Any, View | None]]:
    """The parameters of a group, as they stand in it, and their views."""
    return list(zip(group["params"], views_of(group), strict=True))


def plain(views: Iterable[View | None]) -> list[dict[str, Any] | None]:
    """Views as plain data; equal ones are one object, so that a saved group holds each of them once."""
    dicts: dict[View, dict[str, Any]] = {}
    return [None if view is None else dicts.setdefault(view, view.to_dict()) for view in views]


def names_of(optimizer: Optimizer) -> dict[Tensor, str]:
    """The name of every parameter, or its place among all of them where it has none."""
    names: dict[Tensor, str] = {}
    for group in optimizer.param_groups:
        for name, param in names_of_group(group):
            names[param] = f"parameter {len(names)}" if name is None else name
    return names


def names_of_group(group: Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    """The names and parameters of a group of an optimizer, None for those without a name."""
    names = list(group.get("param_names") or ())
    return [(names[i] if i < len(names) else None, param) for i, param in enumerate(group["params"])]


def name_alike(groups: Sequence[dict[str, Any]], names: Sequence[str | None], count: int) -> None:
    """Give all groups names if one has some, as `torch.optim.Optimizer` asks: places where parameters have none.

    Args:
        groups: those of an optimizer and a new one, the last.
        names: of the parameters of the new one.
        count: of the parameters of the others.
    """
    *others, new = groups
    new.pop("param_names", None)
    named = [group for group in others if "param_names" in group]
    if not any(names) and not named:
        return
    renamed, place = (groups, 0) if len(named) < len(others) else ([new], count)
    for group in renamed:
        given = names if group is new else group.get("param_names") or [None] * len(group["params"])
        group["param_names"] = [name or f"parameter {place + i}" for i, name in enumerate(given)]
        place += len(given)
