"""Which parameters an optimizer has and how each is read, while hosts put other parameters into its groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from operator import is_
from typing import Any

from torch import Tensor

from asgo.optimizer.param_groups import complete_names, names_of_group, plain
from asgo.views import View, axes_of

Group = dict[str, Any]


class Membership:
    """The view of every parameter, by the parameter.

    Frameworks change ``group["params"]`` behind an optimizer's back: sharding puts other tensors into the same places,
    fine-tuning appends, pruning removes. A view follows its parameter; a parameter that stands in another's place takes
    over its view; any other has the view that the host put beside it into ``group["views"]``, else the default one.

    Attributes:
        views: of every parameter; None is AdamW.
    """

    def __init__(self, groups: Sequence[Group] = ()) -> None:
        self.views: dict[Tensor, View | None] = {}
        self._seen: list[list[Tensor]] = []
        for group in groups:
            self.add(group)

    def add(self, group: Group) -> None:
        """Take up a group that has a view for each of its parameters."""
        self.views |= dict(zip(group["params"], map(View.of, group["views"]), strict=True))
        self._seen.append(list(group["params"]))

    def is_current(self, groups: Sequence[Group]) -> bool:
        """Whether the groups have the parameters that they had."""
        return len(groups) == len(self._seen) and all(
            len(group["params"]) == len(seen) and all(starmap(is_, zip(group["params"], seen, strict=True)))
            for group, seen in zip(groups, self._seen, strict=True)
        )

    def follow(
        self,
        caller: str,
        groups: Sequence[Group],
        default: Callable[[Sequence[tuple[str | None, Tensor]], Mapping[str, Any]], list[View | None]],
    ) -> list[Tensor]:
        """Give new parameters of the groups a view, and forget parameters that were removed.

        Args:
            caller: the optimizer, for messages.
            groups: of the optimizer.
            default: the default views of members of a group.

        Returns:
            The parameters that are gone.

        Raises:
            ValueError: a parameter that does not fit the view of the one in whose place it stands, or flat memory in
                place of matrices; nothing has changed then.
        """
        present = {param for group in groups for param in group["params"]}
        found: dict[Tensor, View | None] = {}
        names: list[list[str | None]] = []
        for i, group in enumerate(groups):
            seen = self._seen[i] if i < len(self._seen) else []
            names.append(_names(group, seen))
            places = seen if len(seen) == len(group["params"]) else [None] * len(group["params"])
            _refuse_flat(f"{caller}: group {i}", [p for p in seen if p not in present], group, self.views)
            given = _given(caller, group, names[i], seen)
            for place, name, param in zip(places, names[i], group["params"], strict=True):
                if param in self.views:
                    found[param] = self.views[param]
                elif place is not None and place not in present:
                    found[param] = self._inherited(caller, place, name, param)
                else:
                    found[param] = given[param] if param in given else default([(name, param)], group)[0]
        gone = [param for param in self.views if param not in present]
        self.views, self._seen = found, [list(group["params"]) for group in groups]
        for group in groups:
            group["views"] = plain(found[param] for param in group["params"])
        complete_names(groups, names)
        return gone

    def _inherited(self, caller: str, place: Tensor, name: str | None, param: Tensor) -> View | None:
        view = self.views[place]
        if view is not None:
            view.check(f"{caller}: {name or 'a parameter'} in place of one {tuple(place.shape)}", param.shape)
        return view


def _names(group: Group, seen: Sequence[Tensor]) -> list[str | None]:
    """The names of the members: those they had where only the list of parameters was changed."""
    names = list(group.get("param_names") or ())
    if len(names) == len(group["params"]) or len(names) != len(seen):
        return [name for name, _ in names_of_group(group)]
    known = dict(zip(seen, names, strict=True))
    return [known.get(param) for param in group["params"]]


def _given(caller: str, group: Group, names: Sequence[str | None], seen: Sequence[Tensor]) -> dict[Tensor, View | None]:
    """The views that a host gave with a list of parameters of another length, as when it restores saved groups."""
    views = list(group.get("views") or ())
    if len(views) != len(group["params"]) or len(views) == len(seen):
        return {}
    given = dict(zip(group["params"], map(View.of, views), strict=True))
    for name, (param, view) in zip(names, given.items(), strict=True):
        if view is not None:
            view.check(f"{caller}: {name or 'a parameter'}", param.shape)
    return given


def _axes(view: View) -> int:
    """The number of axes of a parameter with this view."""
    return len(axes_of(view.pattern_of(0).split("->")[0]))


def _refuse_flat(what: str, gone: Sequence[Tensor], group: Group, views: Mapping[Tensor, View | None]) -> None:
    """Raise `ValueError` if a vector stands where matrices were, as in optimizers that flatten parameters."""
    # Their views say what they were: ZeRO-3 has replaced the shapes of the parameters themselves.
    lost = [param for param in gone if (view := views[param]) is not None and _axes(view) > 1]
    came = [param for param in group["params"] if param not in views]
    if lost and came and all(param.ndim == 1 for param in came):
        raise ValueError(
            f"{what} has a vector {tuple(came[0].shape)} where it had matrices: its parameters "
            "were flattened, so their matrices cannot be seen. Use torch's fully_shard or optimizer.distribute("
            "shard_state=True) in place of FSDP1 or DeepSpeed's ZeRO."
        )
