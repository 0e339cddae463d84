"""The one step loop that every optimizer of the library runs."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from asgo import adamw, loading, settings
from asgo._types import Stack, State
from asgo.buckets import Bucket, Member, make_buckets
from asgo.distributed.buckets import KINDS, interleave, pause
from asgo.distributed.groups import Wait, agree
from asgo.distributed.placement import Placement, entries_of, gradient, local
from asgo.distributed.state import assign, export
from asgo.distributed.work import Division, spread, turns_of
from asgo.masks import blend, choose
from asgo.matmul import exact_matmul
from asgo.membership import Membership
from asgo.scaling import SCALINGS
from asgo.settings import adamw_of, learning_rate
from asgo.state import check_shape, follow, init_state, is_made
from asgo.structures import Structure
from asgo.views import View, default_view
from asgo.views.route import default_views

WARM_STEPS = 10
"""The first steps refresh every root whatever the interval: the statistic changes fastest there."""


class StructuredOptimizer(Optimizer, ABC):
    """A structured adaptive optimizer: views of parameters, a structure, a root and a rule for the step size.

    A preset names its hyperparameters and chooses the structure; nothing overrides `step`. Each parameter has a
    view (`asgo.View`) through which it is read as a stack of matrices, or none: then it is AdamW's. A group gives
    ``views``, one for each of its parameters, or one ``view`` for all; what it gives none has that of `default_views`.

    ``param_groups`` are the groups given, in number, order and identity, each with its ``views`` as plain data. Keys
    that are not known are a framework's own and stay; misspelt ones are refused.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of them, as for every `torch.optim.Optimizer`.
        defaults: hyperparameters of groups that do not set their own; what the step loop reads beside them is fixed
            by the class attribute `loop`, and groups may not set it.
        adamw: hyperparameters of the parameters without a view: ``lr``, ``betas``, ``eps``, ``weight_decay``; by
            default the same ``lr`` and `asgo.adamw.DEFAULTS`. Schedules of a group move its ``lr`` by the same factor.

    Raises:
        ValueError: a hyperparameter out of range, a misspelt key of a group, a view that does not fit.
        TypeError: a parameter that is complex or not of floating point.
    """

    loop: ClassVar[Mapping[str, Any]] = settings.LOOP
    """What the step loop reads where a preset has no hyperparameter for it."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], adamw: Mapping[str, Any] | None = None) -> None:
        settings.check_ordered(params)
        settings.check(type(self).__name__, defaults)
        settings.check_adamw(type(self).__name__, adamw or {})
        self._plans: dict[int, Plan] = {}
        self._division, self._members, self._warned = Division(), Membership(), False
        super().__init__(params, {**defaults, "adamw": dict(adamw or {})})
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

    # ---- the step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step: decoupled decay, momentum, measure, fold, refresh, precondition, rescale.

        Parameters without a gradient stay as they are. A matrix whose gradient is zero rests (only decay moves
        it); one whose gradient is not finite rests too and is counted by `failures`, as does a parameter without a
        view.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            TypeError: a sparse gradient; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settings.refuse_sparse(self)
        plans = self._current_plans()
        waits: list[Wait] = []
        tasks: list[Iterator[None]] = []
        for group, plan in zip(self.param_groups, plans, strict=True):
            waits += self._update_entries(plan, group)
            if plan.viewed:
                torch._foreach_add_([self.state[p]["step"] for p in plan.viewed], 1)
            tasks += [self._update(bucket, group) for bucket in plan.buckets]
        interleave(tasks)
        for wait in waits:
            wait()
        return loss

    def _update_entries(self, plan: Plan, group: dict[str, Any]) -> list[Wait]:
        """AdamW on what this rank holds, or is to update, of parameters without a view."""
        if not plan.entries:
            return []
        held, grads = (
            [entries_of(p, at, of(p)) for p, at in zip(plan.entries, plan.where, strict=True)]
            for of in (local, gradient)
        )
        states = [self.state[p] for p in plan.entries]
        ranks = [at.ranks for at in plan.where]
        adamw.adamw(held, grads, states, adamw_of(group), lambda flags, of: agree(flags, [ranks[i] for i in of]))
        return spread(plan.entries, plan.where)

    def _update(self, bucket: Bucket, group: dict[str, Any]) -> Iterator[None]:
        """The step of a bucket. It yields where something is under way between ranks, for others to use the time."""
        structure, due = bucket.fixed(self.structure(group)), partial(self._is_due, group)
        yield from pause(bucket.gather())
        direction, update, lr = None, None, learning_rate(group)
        if bucket.members:
            direction = yield from self._learn(bucket, group, structure, due)
        yield from pause(bucket.share(due, structure.derived))
        if direction is not None:
            with exact_matmul(direction.device):
                update = bucket.precondition(structure, direction)
            size = SCALINGS[group["adjust_lr"]](update, bucket) * -lr
            update = update * size if update is bucket.state["exp_avg"] else update.mul_(size)
        yield from pause(bucket.add(update, 1 - lr * group["weight_decay"]))

    def _learn(
        self, bucket: Bucket, group: dict[str, Any], structure: Structure, due: Callable[[Member], bool]
    ) -> Generator[None, None, Stack]:
        """Momentum, measure, fold and refresh; what to precondition."""
        (beta1, beta2), memory, momentum = group["betas"], bucket.memory, bucket.state["exp_avg"]
        grad = bucket.gradients()
        norm = torch.linalg.vector_norm(grad, dim=(1, 2), keepdim=True)
        yield from pause(bucket.join(norm))
        moved = norm.isfinite() & (norm > 0)
        grad = choose(moved, -grad if group["maximize"] else grad, 0.0)
        memory["failures"] += ~norm[bucket.own].isfinite()[:, 0, 0]

        blend(momentum, grad, 1 - beta1, moved)
        direction = momentum.lerp(grad, 1 - beta1) if group["nesterov"] else momentum
        direction = choose(moved, direction, 0.0)

        with exact_matmul(grad.device):
            measurement = structure.measure(direction if group["statistic"] == "momentum" else grad)
        yield from pause(bucket.sum(measurement))
        with exact_matmul(grad.device):
            structure.fold(memory, measurement[bucket.own], beta2)
            bucket.ladder.refresh(structure, memory, bucket.rows(due), group["root"], group["eps"])
        return direction

    def _is_due(self, group: dict[str, Any], member: Member) -> bool:
        interval = group["precondition_frequency"]
        if interval == 1:
            return True
        step = int(self.state[member.param]["step"])
        return step <= WARM_STEPS or step % interval == member.turn

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def failures(self) -> dict[str, int]:
        """How often each parameter could not be updated or its root not be computed, by name; only those that
        ever failed. Counts matrices and steps: non-finite gradients and failed roots. Synchronises the device."""
        counts = {}
        for param, name in settings.names_of(self).items():
            state = self.state.get(param, {})
            failed = sum(int(t.sum()) for key, t in state.items() if key.startswith("failures"))
            counts |= {name: failed} if failed else {}
        return counts

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
        self._plans = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked before anything changes. It is kept as it is, filled up with defaults and ``views``."""
        who = type(self).__name__
        members = settings.members_of(param_group)
        given = settings.given_views(who, param_group, len(members))
        views = self.default_views(members, param_group) if given is None else given
        views = [view if view is None or given is None else self.read(view, param_group) for view in views]
        settings.check(who, param_group)
        views = settings.bounded(who, members, views, self.largest_side({**self.defaults, **param_group}))
        settings.check_group(who, param_group, members, views, self.defaults, settings.names_of(self))
        self.check_members({**self.defaults, **param_group}, views, [param for _, param in members])
        own = settings.with_adamw(who, param_group, views, self.defaults)

        param_group.pop("view", None)
        param_group["params"] = [param for _, param in members]
        settings.name_alike([*self.param_groups, param_group], [name for name, _ in members])
        param_group |= {**own, "views": settings.plain(views)}
        super().add_param_group(param_group)
        param_group |= {key: value for key, value in self.loop.items() if key not in {*self.defaults, *own}}
        self._members.add(param_group)
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
            self._plans = {}
        elif len(self.state) == len(self._members.views) and all(map(is_made, self.state.values())):
            return
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
        loading.check_saved(self, saved, own, self._members.views)
        with torch.no_grad():
            for param, found in saved.items():
                assign(own[param], found.state)
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
        self._plans, self._members, self._warned = {}, Membership(self.param_groups), True

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> State:
        structure = None if self._members.views[param] is None else self.structure(group)
        return init_state(param, *self._where(param, group), structure, group)

    def _where(self, param: Tensor, group: dict[str, Any]) -> tuple[Placement, Sequence[int | None]]:
        """The placement of a parameter, and the owner of each of its parts."""
        view = self._members.views[param]
        structure = None if view is None else self.structure(group)
        return self._division.placement(param, view, structure), self._division.owners(param, view)

    def _current_plans(self) -> list[Plan]:
        """The plan of every group, remade where its parameters with gradients, or their state, are others now."""
        self._follow_groups()
        signatures = [_signature(group) for group in self.param_groups]
        stale = [i for i, signature in enumerate(signatures) if not self._is_current(i, signature)]
        for i in stale:
            self._check_shapes(self.param_groups[i])
        if stale:
            phases = turns_of(self.param_groups, self._members.views, self.structure)
            for i in stale:
                old = self._plans.pop(i, None)
                self._plans[i] = self._plan(self.param_groups[i], signatures[i], phases)
                for bucket in old.buckets if old else ():
                    bucket.release()
        return [self._plans[i] for i in range(len(signatures))]

    def _is_current(self, i: int, signature: object) -> bool:
        plan = self._plans.get(i)
        return plan is not None and plan.signature == signature and all(bucket.is_bound() for bucket in plan.buckets)

    def _check_shapes(self, group: dict[str, Any]) -> None:
        """Raise for a parameter that no longer has the shape of its state; state that was never used is made anew."""
        for name, param in settings.names_of_group(group):
            view = self._members.views[param]
            if view is not None:
                view.check(name or "a parameter", param.shape)
            if not check_shape(type(self).__name__, name, param, self.state[param], *self._where(param, group)):
                self._division.forget_one(param)
                self.state[param].update(self._init_state(param, group))

    def _plan(self, group: dict[str, Any], signature: object, phases: Mapping[tuple[Tensor, int], int]) -> Plan:
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            follow(self.state[param], param, group, self._members.views[param])
        viewed = [param for param in params if self._members.views[param] is not None]
        entries = [param for param in params if self._members.views[param] is None]
        structure = self.structure(group) if viewed else None
        buckets = []
        if structure is not None:
            members = self._division.members(viewed, self._members.views, structure, phases)
            buckets = make_buckets(members, structure, self.state, KINDS)
        return Plan(signature, entries, [self._where(param, group)[0] for param in entries], viewed, buckets)


@dataclass(frozen=True)
class Plan:
    """What a step does with the parameters of a group that have gradients.

    Args:
        signature: of what it was made for.
        entries: the parameters without a view.
        where: their placements.
        viewed: the parameters with a view.
        buckets: of those.
    """

    signature: object
    entries: list[Tensor]
    where: list[Placement]
    viewed: list[Tensor]
    buckets: list[Bucket]


def _signature(group: Mapping[str, Any]) -> object:
    """What a plan is made for: it must be remade when this changes."""
    return group["precondition_frequency"], [
        (id(p), p.shape, p.stride(), p.dtype, p.device) for p in group["params"] if p.grad is not None
    ]
