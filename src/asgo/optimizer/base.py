"""Groups, state and state dicts of an optimizer."""

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

from asgo._types import State
from asgo.distributed.ownership import WorkPartition
from asgo.distributed.state_dict import assign
from asgo.distributed.strategies import Placed
from asgo.optimizer import group_checks, hyperparameters, loading, param_groups
from asgo.optimizer.membership import Membership
from asgo.optimizer.refresh_schedule import refresh_phases
from asgo.optimizer.state import init_state, is_made
from asgo.parts import GroupPlan, Strategy
from asgo.state_keys import base_key, is_own
from asgo.structures import Structure
from asgo.views import View, default_view
from asgo.views.defaults import default_views


class GroupedOptimizer(Optimizer, ABC):
    """Groups, state and state dicts of a structured optimizer: all but the step.

    ``param_groups`` are the groups given, in number, order and identity, each with its ``views`` as plain data. View
    and state belong to the parameter: they follow it when it is moved or cast, and a parameter that is put in its
    place takes over the view. Unknown keys stay in a group; keys that look like a misspelling are refused.
    """

    step_defaults: ClassVar[Mapping[str, Any]] = hyperparameters.STEP_DEFAULTS
    """Values of the options of the step that a preset has no hyperparameter for."""

    constraints: ClassVar[Mapping[str, hyperparameters.Constraint]] = hyperparameters.SHARED
    """What values hyperparameters may have, by name; those without a constraint are not checked."""

    def __init_subclass__(cls) -> None:
        hyperparameters.KNOWN.update(cls.constraints)

    def __init__(self, params: ParamsT, defaults: dict[str, Any], adamw: Mapping[str, Any] | None = None) -> None:
        param_groups.check_ordered(params)
        hyperparameters.check(type(self).__name__, defaults, self.constraints)
        hyperparameters.check_adamw(type(self).__name__, adamw or {})
        self._forget_plans()
        self._partition, self._members, self._warned = WorkPartition(), Membership(), False
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
        """The views of parameters whose group gives none.

        Parameters with names like those of embeddings, output heads and gains get None (AdamW); others are read by
        their number of axes. Parameters without names are read by their number of axes alone, with one warning per
        optimizer if there are matrices among them.

        Args:
            members: pairs of a name, or None, and a parameter.
            group: the group of these parameters, as given by the user.
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
                "output heads are trained as matrices. Pass asgo.route(model), or model.named_parameters(); to a "
                "framework that builds the optimizer itself, what its module of asgo.hosts has, such as a factory.",
                stacklevel=group_checks.frames_to_the_caller(),
            )

    def read(self, view: View, group: Mapping[str, Any]) -> View:
        """The view to use where a group gives `view`; a preset may adapt it.

        Raises:
            ValueError: it does not fit the hyperparameters of the group.
        """
        return view

    def largest_side(self, group: Mapping[str, Any]) -> int | None:
        """The largest shorter side of a matrix of this group; above it, AdamW steps the parameter. None: no limit."""
        return None

    def check_members(self, group: Mapping[str, Any], views: Sequence[View | None], params: Sequence[Tensor]) -> None:
        """Raise `ValueError` for a group whose hyperparameters do not fit its parameters."""

    @abstractmethod
    def _forget_plans(self) -> None:
        """Drop the plans of all groups; the next step makes new ones."""

    def failures(self) -> dict[str, int]:
        """Counts of gradients that were not finite and of roots that failed, by parameter name.

        One per matrix and step; parameters without failures are left out. Synchronizes the device.
        """
        counts = {}
        for param, name in param_groups.names_of(self).items():
            state = self.state.get(param, {})
            failed = sum(int(t.sum()) for key, t in state.items() if base_key(key) == "failures")
            counts |= {name: failed} if failed else {}
        return counts

    def is_local(self) -> bool:
        """Whether this process holds and steps every parameter by itself."""
        known, members = self._members.views, [(p, group) for group in self.param_groups for p in group["params"]]
        return all(param in known and self._strategy(param, group).kind == "local" for param, group in members)

    def reset(self) -> None:
        """Reset all state to its initial values, except for the counts of failures."""
        self._follow_groups()
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                for key, fresh in self._init_state(param, group).items():
                    if key not in state or state[key].shape != fresh.shape:
                        state[key] = fresh
                    elif base_key(key) != "failures":
                        state[key].copy_(fresh)

    def distribute(
        self,
        process_group: ProcessGroup | None = None,
        shard_state: bool = False,
        strategy: type[Placed] | None = None,
    ) -> None:
        """Divide the work on replicated parameters between ranks, as for `DistributedDataParallel`.

        Each root is computed by one rank, chosen by cost, and broadcast while other work continues; every rank keeps
        the full state. With `shard_state` (ZeRO-1) only one rank keeps the state of a matrix, and it sends the update;
        AdamW's state is divided by rows. Parameters, gradients and calls must be the same on all ranks. Sharded
        parameters (FSDP2, tensor parallel) need no call: their placements determine the work.

        Args:
            process_group: the ranks; None: all.
            shard_state: whether to divide the state too. State from earlier steps is kept.
            strategy: a class of your own that says what ranks keep and send of parameters which all of them hold, see
                `asgo.distributed.strategies`; None: the library's.

        Raises:
            ValueError: called twice, or with both `shard_state` and `strategy`.
            RuntimeError: `torch.distributed` is not initialized.
        """
        self._follow_groups()
        self._partition.share(type(self).__name__, process_group, shard_state, strategy)
        self._partition.divide(self._group_plans(), refresh_phases)
        self._partition.keep_own(self._group_plans(), self.state)
        self._forget_plans()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked before anything changes. The dict is kept; defaults and ``views`` are added to it."""
        caller = type(self).__name__
        members = param_groups.members_of(param_group)
        given = param_groups.given_views(caller, param_group, len(members))
        views = self.default_views(members, param_group) if given is None else given
        views = [view if view is None or given is None else self.read(view, param_group) for view in views]
        group_checks.check_given(caller, param_group, self.defaults, self.constraints)
        views = group_checks.bounded(caller, members, views, self.largest_side({**self.defaults, **param_group}))
        # During construction nothing else changes the groups, so their names need not be read again each time.
        taken = param_groups.names_of(self) if self._taken is None else self._taken
        group_checks.check_group(caller, param_group, members, views, self.defaults, taken)
        self.check_members({**self.defaults, **param_group}, views, [param for _, param in members])
        own = hyperparameters.with_adamw(caller, param_group, views, self.defaults)

        param_group.pop("view", None)
        param_group["params"] = [param for _, param in members]
        param_groups.name_alike([*self.param_groups, param_group], [name for name, _ in members], len(taken))
        param_group |= {**own, "views": param_groups.plain(views)}
        super().add_param_group(param_group)
        param_group |= {key: value for key, value in self.step_defaults.items() if key not in {*self.defaults, *own}}
        self._members.add(param_group)
        if self._taken is not None:
            self._taken |= {param: name or f"parameter {len(taken) + i}" for i, (name, param) in enumerate(members)}
        if self._partition.begun:
            self._begin()

    def _begin(self) -> None:
        """Assign owners, then initialize the state of parameters that have none."""
        self._partition.divide(self._group_plans(), refresh_phases)
        for group in self.param_groups:
            for param in group["params"]:
                if not is_made(self.state[param]):
                    self.state[param].update(self._init_state(param, group))

    def _follow_groups(self) -> None:
        """Initialize parameters that are new in the groups or have lost their state; drop the state of removed ones."""
        if not self._members.is_current(self.param_groups):
            for param in self._members.follow(type(self).__name__, self.param_groups, self.default_views):
                self.state.pop(param, None)
            self._partition.forget(self._members.views)
        elif len(self.state) == len(self._members.views) and all(map(is_made, self.state.values())):
            return
        self._forget_plans()
        self._begin()

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state dict of `torch.optim.Optimizer`, with the same keys and shapes on every rank.

        Tensors that are sharded, or kept by one rank, are `DTensor`, as `torch.distributed.checkpoint` expects.
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
        """The state of every parameter, with the keys and shapes of a single process; see `state_dict`."""
        self._follow_groups()
        return {
            param: self._strategy(param, group).export(self.state[param], param, self._owners(param))
            for group in self.param_groups
            for param in group["params"]
        }

    def added_keys(self) -> dict[str, float]:
        """Keys that checkpoints of earlier versions lack, with the values that those versions implied."""
        found = {"residual": 0.0}
        for group in self.param_groups:
            found |= self.structure(group).added
        return found

    def converted(self, saved: Mapping[Tensor, loading.Saved]) -> dict[Tensor, loading.Saved]:
        """Saved states in the forms that the structures of this optimizer keep, where they know others."""
        found = dict(saved)
        for group in self.param_groups:
            structure = self.structure(group)
            for param in group["params"]:
                if self._members.views[param] is not None and param in saved:
                    state = loading.converted(saved[param].state, structure)
                    found[param] = loading.Saved(state, saved[param].view)
        return found

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, keeping the precision of the state (torch would cast it to the parameters' dtype).

        Parameters are matched by name where a saved group has the same names, else by position. Those without saved
        state keep theirs. Names and views of this optimizer do not change. Checkpoints of earlier versions load.

        Raises:
            ValueError: the state is of another optimizer, model or view; nothing has changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = self.export_state()
        saved = self.converted(loading.saved_by_param(self, state_dict))
        added = self.added_keys()
        loading.check_saved(self, saved, own, self._members.views, added)
        with torch.no_grad():
            for param, found in saved.items():
                assign(own[param], loading.completed(found.state, own[param], added))
                self.state[param].update(deepcopy(loading.foreign(found.state)))
        for group, old in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(deepcopy(param_groups.hyperparameters_of(old, group)))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Compact copies: a view into a bucket would drag the whole bucket along, once per parameter.
        self._follow_groups()
        state = super().__getstate__()
        compact = {p: {key: t.clone() if is_own(key) else t for key, t in own.items()} for p, own in self.state.items()}
        return {**state, "_partition": self._partition, "state": type(self.state)(dict, compact)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._members, self._warned, self._taken = Membership(self.param_groups), True, None
        self._forget_plans()

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> State:
        return init_state(param, self._strategy(param, group), self._owners(param), self.structure(group), group)

    def _strategy(self, param: Tensor, group: dict[str, Any]) -> Strategy:
        """Where the entries of a parameter are; what one process holds and steps by itself is looked up nowhere."""
        return self._partition.strategy(param, self._members.views[param], self.structure(group))

    def _owners(self, param: Tensor) -> Sequence[int | None]:
        """The owner of each part of a parameter."""
        return self._partition.owners(param, self._members.views[param])

    def _group_plans(self) -> list[GroupPlan]:
        views = self._members.views
        return [
            GroupPlan(self.structure(group), group["precondition_frequency"], {p: views[p] for p in group["params"]})
            for group in self.param_groups
        ]
