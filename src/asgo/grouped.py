"""The groups of an optimizer, the state of its parameters, and what saves and loads them."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from asgo import loading, param_groups, settings
from asgo._types import State
from asgo.distributed.placement import Placement
from asgo.distributed.state import assign, export
from asgo.distributed.work import Division
from asgo.membership import Membership
from asgo.state import init_state, is_made
from asgo.structures import Structure
from asgo.views import View, default_view
from asgo.views.defaults import default_views


class GroupedOptimizer(Optimizer, ABC):
    """The groups, the state and the state dicts of a structured optimizer: all but the step.

    ``param_groups`` are the groups given, in number, order and identity, each with its ``views`` as plain data. View
    and state belong to the parameter and follow it. Keys that are not known are a framework's own and stay; misspelt
    ones are refused.
    """

    loop: ClassVar[Mapping[str, Any]] = settings.LOOP
    """What the step loop reads where a preset has no hyperparameter for it."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], adamw: Mapping[str, Any] | None = None) -> None:
        param_groups.check_ordered(params)
        settings.check(type(self).__name__, defaults)
        settings.check_adamw(type(self).__name__, adamw or {})
        self._forget_plans()
        self._division, self._members, self._warned = Division(), Membership(), False
        self._taken: dict[Tensor, str] | None = {}
        super().__init__(params, {**defaults, "adamw": dict(adamw or {})})
        self._taken = None
        self._begin()

    @abstractmethod
    def structure(self, group: dict[str, Any]) -> Structure:
        """The structure that a group's hyperparameters describe."""

    def default_views(
        self, members: Sequence[tuple[str | None, Tensor]], group: Mapping[str, Any]
    ) -> list[View | None]:
        """The views of parameters for which their group gives none; `group` holds what the user set.

        By their names where they have some: tables and vocabulary heads are AdamW's then. By their number of axes where
        they have none, with a warning if there are matrices among them.

        Args:
            members: their names, None for those without, and the parameters.
            group: whose members they are.
        """
        named = iter(default_views([(name, param) for name, param in members if name is not None]))
        views = [default_view(param.ndim) if name is None else next(named) for name, param in members]
        if any(view is not None and name is None for view, (name, _) in zip(views, members, strict=True)):
            self._warn_nameless()
        return views

    def _warn_nameless(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: parameters without names are read by their number of axes, so embeddings and "
                "output heads are trained as matrices. Pass asgo.route(model), or model.named_parameters().",
                stacklevel=settings.frames_to_the_caller(),
            )

    def read(self, view: View, group: Mapping[str, Any]) -> View:
        """The view to use where a group gives this one.

        Raises:
            ValueError: it does not fit the hyperparameters of the group.
        """
        return view

    def largest_side(self, group: Mapping[str, Any]) -> int | None:
        """The largest shorter side that a matrix of this group may have, beyond which it is AdamW's; None: any."""
        return None

    def check_members(self, group: Mapping[str, Any], views: Sequence[View | None], params: Sequence[Tensor]) -> None:
        """Raise `ValueError` for a group whose hyperparameters do not fit its parameters."""

    @abstractmethod
    def _forget_plans(self) -> None:
        """Let go of what was made for the parameters and their state as they were."""

    def failures(self) -> dict[str, int]:
        """How often each parameter could not be updated or its root not be computed, by name; only those that
        ever failed. Counts matrices and steps: non-finite gradients and failed roots. Synchronises the device."""
        counts = {}
        for param, name in param_groups.names_of(self).items():
            state = self.state.get(param, {})
            failed = sum(int(t.sum()) for key, t in state.items() if key.startswith("failures"))
            counts |= {name: failed} if failed else {}
        return counts

    def is_alone(self) -> bool:
        """Whether this process holds and steps every parameter by itself."""
        known, members = self._members.views, [(p, group) for group in self.param_groups for p in group["params"]]
        return all(param in known and self._where(param, group)[0].kind == "alone" for param, group in members)

    def reset(self) -> None:
        """Put all state back to what it was before the first step, except for the counts of failures."""
        self._follow_groups()
        for group in self.param_groups:
            for param in group["params"]:
                for key, fresh in self._init_state(param, group).items():
                    if not key.startswith("failures"):
                        self.state[param][key].copy_(fresh)

    def distribute(self, process_group: ProcessGroup | None = None, shard_state: bool = False) -> None:
        """From now on share the work on parameters that every rank holds whole, as under `DistributedDataParallel`.

        Ranks divide the roots among them by cost and send each other the results while they work on others; the state
        is whole on every rank. With `shard_state` (ZeRO-1) one rank alone keeps the state of a matrix and sends its
        update, and AdamW's state is divided by rows. Parameters, gradients and calls must be the same on all ranks.
        Sharded parameters (FSDP2, tensor parallel) need no call: their placements say it all.

        Args:
            process_group: the ranks; None: all.
            shard_state: whether to divide the state too. What was seen before is kept.

        Raises:
            ValueError: called twice.
            RuntimeError: `torch.distributed` is not initialized.
        """
        self._follow_groups()
        self._division.share(type(self).__name__, process_group, shard_state)
        self._division.divide(self.param_groups, self._members.views, self.structure)
        self._division.keep_own(self.param_groups, self._members.views, self.state, self.structure)
        self._forget_plans()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked before anything changes. It is kept as it is, filled up with defaults and ``views``."""
        who = type(self).__name__
        members = param_groups.members_of(param_group)
        given = param_groups.given_views(who, param_group, len(members))
        views = self.default_views(members, param_group) if given is None else given
        views = [view if view is None or given is None else self.read(view, param_group) for view in views]
        settings.check(who, param_group)
        views = settings.bounded(who, members, views, self.largest_side({**self.defaults, **param_group}))
        # While it is constructed nobody else changes the groups, so that their names need not be read again each time.
        taken = param_groups.names_of(self) if self._taken is None else self._taken
        settings.check_group(who, param_group, members, views, self.defaults, taken)
        self.check_members({**self.defaults, **param_group}, views, [param for _, param in members])
        own = settings.with_adamw(who, param_group, views, self.defaults)

        param_group.pop("view", None)
        param_group["params"] = [param for _, param in members]
        param_groups.name_alike([*self.param_groups, param_group], [name for name, _ in members], len(taken))
        param_group |= {**own, "views": param_groups.plain(views)}
        super().add_param_group(param_group)
        param_group |= {key: value for key, value in self.loop.items() if key not in {*self.defaults, *own}}
        self._members.add(param_group)
        if self._taken is not None:
            self._taken |= {param: name or f"parameter {len(taken) + i}" for i, (name, param) in enumerate(members)}
        if self._division.begun:
            self._begin()

    def _begin(self) -> None:
        """State of the parameters that have none, once all groups of a call are known: work is divided among them."""
        self._division.divide(self.param_groups, self._members.views, self.structure)
        for group in self.param_groups:
            for param in group["params"]:
                if not is_made(self.state[param]):
                    self.state[param].update(self._init_state(param, group))

    def _follow_groups(self) -> None:
        """Take up parameters that were put into the groups or lost their state, and forget those that are gone."""
        if not self._members.is_current(self.param_groups):
            for param in self._members.follow(type(self).__name__, self.param_groups, self.default_views):
                self.state.pop(param, None)
            self._division.forget(self._members.views)
        elif len(self.state) == len(self._members.views) and all(map(is_made, self.state.values())):
            return
        self._forget_plans()
        self._begin()

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As of every `torch.optim.Optimizer`, with the same keys and shapes on every rank whatever it keeps.

        Of what is spread over ranks, tensors are `DTensor`, placed like the parameter or on the one rank that keeps
        them, as `torch.distributed.checkpoint` takes them.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        numbers: dict[Tensor, int] = {}
        for group in self.param_groups:
            for param in group["params"]:
                numbers.setdefault(param, len(numbers))
        packed = {
            "state": {numbers[param]: state for param, state in self.export_state().items()},
            "param_groups": [
                {**group, "params": [numbers[param] for param in group["params"]]} for group in self.param_groups
            ],
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, packed)
            packed = packed if changed is None else changed
        return packed

    def export_state(self) -> dict[Tensor, State]:
        """The state of every parameter with the keys and shapes of a single process, see `state_dict`."""
        self._follow_groups()
        return {
            param: export(self.state[param], param, *self._where(param, group))
            for group in self.param_groups
            for param in group["params"]
        }

    def added_keys(self) -> dict[str, float]:
        """Keys of the state that states saved by earlier versions lack, and the values that those imply."""
        found = {"residual": 0.0}
        for group in self.param_groups:
            found |= self.structure(group).added
        return found

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, keeping the precision of the state (torch alone would cast fp32 statistics
        to bf16 parameters).

        The state of a parameter is found by its name where a saved group has the same names, else by its place.
        Parameters of which nothing was saved keep their state; names and views stay this optimizer's own.

        Raises:
            ValueError: state of another optimizer, model or view; nothing has changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = self.export_state()
        saved = loading.saved_by_param(self, state_dict)
        added = self.added_keys()
        loading.check_saved(self, saved, own, self._members.views, added)
        with torch.no_grad():
            for param, found in saved.items():
                assign(own[param], loading.completed(found.state, own[param], added))
                self.state[param].update(deepcopy(loading.foreign(found.state)))
        for group, old in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {key: deepcopy(value) for key, value in old.items() if key not in settings.OF_MEMBERS}
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Compact copies: a view into a bucket would drag the whole bucket along, once per parameter.
        state = super().__getstate__()
        compact = {p: {key: t.clone() for key, t in own.items()} for p, own in self.state.items()}
        return {**state, "_division": self._division, "state": type(self.state)(dict, compact)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._members, self._warned, self._taken = Membership(self.param_groups), True, None
        self._forget_plans()

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> State:
        structure = None if self._members.views[param] is None else self.structure(group)
        return init_state(param, *self._where(param, group), structure, group)

    def _where(self, param: Tensor, group: dict[str, Any]) -> tuple[Placement, Sequence[int | None]]:
        """The placement of a parameter, and the owner of each of its parts."""
        view = self._members.views[param]
        structure = None if view is None else self.structure(group)
        return self._division.placement(param, view, structure), self._division.owners(param, view)
