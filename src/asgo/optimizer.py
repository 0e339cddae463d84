"""The one step loop that every optimizer of the library runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asgo import adamw, param_groups, settings
from asgo._types import Stack
from asgo.buckets import Bucket, Member, make_buckets
from asgo.distributed.buckets import KINDS, interleave, pause
from asgo.distributed.groups import Wait, agree
from asgo.distributed.placement import Placement, entries_of, gradient, local
from asgo.distributed.work import spread, turns_of
from asgo.grouped import GroupedOptimizer
from asgo.masks import blend, choose
from asgo.matmul import exact_matmul
from asgo.scaling import SCALINGS
from asgo.settings import adamw_of, learning_rate
from asgo.state import check_shape, follow
from asgo.structures import Structure

WARM_STEPS = 10
"""The first steps refresh every root whatever the interval: the statistic changes fastest there."""


class StructuredOptimizer(GroupedOptimizer):
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
        adamw.adamw(
            held,
            grads,
            states,
            adamw_of(group),
            plan.places,
            lambda flags, of: agree(flags, [ranks[i] for i in of]),
        )
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
        yield from pause(bucket.add(update, 1 - lr * group["weight_decay"], group["rounding"]))

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

    # ---- plans ------------------------------------------------------------------------------------------------

    def _forget_plans(self) -> None:
        self._plans: dict[int, Plan] = {}

    def _current_plans(self) -> list[Plan]:
        """The plan of every group, remade where its parameters with gradients, or their state, are others now."""
        self._follow_groups()
        signatures = [_signature(group) for group in self.param_groups]
        stale = [i for i, signature in enumerate(signatures) if not self._is_current(i, signature)]
        for i in stale:
            self._check_shapes(self.param_groups[i])
        if stale:
            phases = turns_of(self.param_groups, self._members.views, self.structure)
            places = {param: i << 10 for i, param in enumerate(self._members.views)}
            for i in stale:
                old = self._plans.pop(i, None)
                self._plans[i] = self._plan(self.param_groups[i], signatures[i], phases, places)
                for bucket in old.buckets if old else ():
                    bucket.release()
        return [self._plans[i] for i in range(len(signatures))]

    def _is_current(self, i: int, signature: object) -> bool:
        plan = self._plans.get(i)
        return (
            plan is not None
            and plan.signature == signature
            and all(bucket.is_bound(self.state) for bucket in plan.buckets)
        )

    def _check_shapes(self, group: dict[str, Any]) -> None:
        """Raise for a parameter that no longer has the shape of its state; state that was never used is made anew."""
        for name, param in param_groups.names_of_group(group):
            view = self._members.views[param]
            if view is not None:
                view.check(name or "a parameter", param.shape)
            if not check_shape(type(self).__name__, name, param, self.state[param], *self._where(param, group)):
                self._division.forget_one(param)
                self.state[param].update(self._init_state(param, group))

    def _plan(
        self,
        group: dict[str, Any],
        signature: object,
        phases: Mapping[tuple[Tensor, int], int],
        places: Mapping[Tensor, int],
    ) -> Plan:
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            follow(self.state[param], param, group, self._members.views[param], self._where(param, group)[0])
        viewed = [param for param in params if self._members.views[param] is not None]
        entries = [param for param in params if self._members.views[param] is None]
        structure = self.structure(group) if viewed else None
        buckets = []
        if structure is not None:
            members = self._division.members(viewed, self._members.views, structure, phases, places)
            buckets = make_buckets(members, structure, self.state, KINDS)
        where = [self._where(param, group)[0] for param in entries]
        return Plan(signature, entries, where, [places[param] for param in entries], viewed, buckets)


@dataclass(frozen=True)
class Plan:
    """What a step does with the parameters of a group that have gradients.

    Args:
        signature: of what it was made for.
        entries: the parameters without a view.
        where: their placements.
        places: a number for each of them that it has on all ranks and no other has.
        viewed: the parameters with a view.
        buckets: of those.
    """

    signature: object
    entries: list[Tensor]
    where: list[Placement]
    places: list[int]
    viewed: list[Tensor]
    buckets: list[Bucket]


def _signature(group: Mapping[str, Any]) -> object:
    """What a plan is made for: it must be remade when this changes."""
    return (
        group["precondition_frequency"],
        group["rounding"],
        [(id(p), p.shape, p.stride(), p.dtype, p.device) for p in group["params"] if p.grad is not None],
    )
