"""Contents of a parameter group: parameters, names and views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from asgo.views import View

OF_MEMBERS = frozenset({"params", "param_names", "view", "views", "name"})
"""Keys of a group that say which parameters it has, and how each is read."""


def check_ordered(params: Any) -> None:
    """Raise `TypeError` for a set: its order differs between runs."""
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must be in order, and a set has none: pass a list, or model.named_parameters().")


def members_of(group: Any) -> list[tuple[str | None, Tensor]]:
    """Pairs of name and parameter of a group given by the user; the name is None where it gives none.

    Raises:
        TypeError: it is not a mapping with the key ``params``, or that is a set or has members that are not tensors.
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


def given_views(caller: str, group: Mapping[str, Any], count: int) -> list[View | None] | None:
    """The views that a group gives its `count` parameters: ``views``, or ``view`` for all of them; None without either.

    Raises:
        ValueError: the number of views is not `count`, or a view is invalid.
    """
    if "views" in group:
        views = [View.of(view) for view in group["views"]]
        if len(views) != count:
            raise ValueError(f"{caller}: a group has {count} parameters and {len(views)} views; pass one for each.")
        return views
    return [View.of(group["view"])] * count if "view" in group else None


def hyperparameters_of(old: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group takes from a saved one: all but its members, and but the form of the state where that differs."""
    own = set(OF_MEMBERS)
    if "square_root" in (old.get("root"), group.get("root")) and old.get("root") != group.get("root"):
        own |= {"root", "precision", "packed_state", "precondition_frequency"}
    return {key: value for key, value in old.items() if key not in own}


def views_of(group: Mapping[str, Any]) -> list[View | None]:
    """The views of the parameters of a group of an optimizer, in order; None for AdamW."""
    return [View.of(view) for view in group["views"]]


def with_views(group: Mapping[str, Any]) -> list[tuple[Any, View | None]]:
    """Pairs of entry of ``params`` (a parameter, or a pair with its name) and view."""
    return list(zip(group["params"], views_of(group), strict=True))


def plain(views: Iterable[View | None]) -> list[dict[str, Any] | None]:
    """Views as plain data. Equal views are the same object, so that a saved group stores each once."""
    dicts: dict[View, dict[str, Any]] = {}
    return [None if view is None else dicts.setdefault(view, view.to_dict()) for view in views]


def names_of(optimizer: Optimizer) -> dict[Tensor, str]:
    """The name of every parameter; ``"parameter 3"``, by position among all, where it has none."""
    names: dict[Tensor, str] = {}
    for group in optimizer.param_groups:
        for name, param in names_of_group(group):
            names[param] = f"parameter {len(names)}" if name is None else name
    return names


def names_of_group(group: Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    """Pairs of name, or None, and parameter of a group of an optimizer."""
    names = list(group.get("param_names") or ())
    return [(names[i] if i < len(names) else None, param) for i, param in enumerate(group["params"])]


def name_alike(groups: Sequence[dict[str, Any]], names: Sequence[str | None], count: int) -> None:
    """Give all groups ``param_names`` if one has them, as `torch.optim.Optimizer` requires.

    Parameters without a name are called by their position.

    Args:
        groups: the groups of an optimizer and, last, a new one.
        names: names of the parameters of the new one.
        count: how many parameters the others have.
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


def complete_names(groups: Sequence[dict[str, Any]], names: Sequence[Sequence[str | None]]) -> None:
    """Give groups of an optimizer ``param_names`` if one has them; the others are called by their position."""
    if not any(map(any, names)) and not any("param_names" in group for group in groups):
        return
    place = 0
    for group, given in zip(groups, names, strict=True):
        group["param_names"] = [name or f"parameter {place + i}" for i, name in enumerate(given)]
        place += len(given)
