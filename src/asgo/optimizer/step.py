"""The step that all optimizers of the library share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asgo._types import Stack
from asgo.distributed.collectives import Wait, all_reduce_and
from asgo.distributed.ownership import exchange_rows, refresh_phases
from asgo.distributed.placement import Placement, entries_of, gradient, local
from asgo.distributed.strategies import KINDS, interleave, pause
from asgo.linalg.masked import masked_lerp_, where
from asgo.linalg.matmul import exact_matmul
from asgo.metrics import Recorder
from asgo.optimizer import adamw, group_checks, param_groups
from asgo.optimizer.base import GroupedOptimizer
from asgo.optimizer.bucket import Bucket, Member, make_buckets
from asgo.optimizer.hyperparameters import adamw_of, learning_rate
from asgo.optimizer.state import check_form, check_shape, move_state_to_param, renew
from asgo.optimizer.update_size import SCALINGS
from asgo.structures import OneCall, Structure

WARMUP_STEPS = 10
"""The first steps refresh every root, whatever the interval: the statistic changes fastest there."""


class StructuredOptimizer(GroupedOptimizer):
    """A structured adaptive optimizer: views of parameters, a structure, a root and a rule for the step size.

    A preset defines hyperparameters and chooses the structure; it does not override `step`. Each parameter has a
    view (`asgo.View`), through which it is read as a stack of matrices, or None: then AdamW steps it. A group gives
    ``views``, one for each of its parameters, or one ``view`` for all; if it gives neither, `default_views` decides.

    ``param_groups`` are the groups given, in number, order and identity, each with its ``views`` as plain data.
    Unknown keys stay in the group, as frameworks need; keys that look like a misspelling are refused.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of them, as for every `torch.optim.Optimizer`.
        defaults: hyperparameters of groups that do not set them; ``lr`` and ``maximize`` are required. Options of the
            step that are missing here have the values of the class attribute `step_defaults`, and groups may not set
            them.
        adamw: hyperparameters of the parameters without a view: ``lr``, ``betas``, ``eps``, ``weight_decay``; by
            default the ``lr`` of the matrices and `asgo.optimizer.adamw.DEFAULTS`. A schedule that changes the ``lr``
            of a group
            changes both learning rates by the same factor.

    Raises:
        ValueError: a hyperparameter out of range, a misspelt key of a group, a view that does not fit.
        TypeError: a parameter that is complex or not floating point.
    """

    step_hooks: tuple[StepHook, ...] = ()
    """Run in this order in every step, see `StepHook`."""

    _recorder: Recorder | None = None
    _recorded: Recorder | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step: decay, momentum, statistic and its average, refresh of roots, preconditioning, rescaling.

        Parameters without a gradient do not change. A matrix whose gradient is zero, or not finite, changes by weight
        decay only, and its state does not; the second case is counted by `failures`. A parameter without a view whose
        gradient is not finite does not change at all and is counted.

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
        group_checks.refuse_sparse(self)
        plans = self._current_plans()
        groups = self.param_groups
        for hook in self.step_hooks:
            groups = hook.before_update(self, groups)
        if self._recorder is not None:
            self._recorder.start()
        waits: list[Wait] = []
        tasks: list[Iterator[None]] = []
        for group, plan in zip(groups, plans, strict=True):
            waits += self._update_entries(plan, group)
            if plan.viewed:
                torch._foreach_add_([self.state[p]["step"] for p in plan.viewed], 1)
            tasks += [self._update(bucket, group) for bucket in plan.buckets]
        interleave(tasks)
        for wait in waits:
            wait()
        if self._recorder is not None:
            self._recorder.finish(groups, plans, self.state)
            self._recorded = self._recorder
        return loss

    def record_metrics(self, on: bool = True) -> None:
        """Let the steps from now on keep what `metrics` reads, or stop that. Off until it is called.

        Call it before the steps that are logged; a step that is not recorded costs what it did.
        """
        self._recorder = Recorder() if on else None

    def metrics(self) -> dict[str, dict[str, float]]:
        """What the last recorded step did to every parameter that had a gradient, by the parameter's name.

        ``update_rms``: root mean square of what the step added, weight decay and rounding aside, ``weight_rms``: of the
        weights after it, ``ratio``: of the two, ``gradient_norm``: Frobenius norm, ``failures``: see `failures`, and,
        for `ASGO` with an inverse root, ``root_residual``: an estimate of ``||Z A Z - I||_F / sqrt(k)``, the worst of
        its matrices, of the root Z in use and the damped statistic A of now (see `asgo.metrics.residuals`).

        All are of whole parameters. Where parameters are sharded (`DTensor`, or ``distribute(shard_state=True)``) all
        ranks must call it, as their shares are added up. Waits for the device, once.

        Raises:
            RuntimeError: no step was recorded.
        """
        if self._recorded is None:
            raise RuntimeError(
                f"{type(self).__name__}: no step was recorded. Call optimizer.record_metrics() before optimizer.step()."
            )
        return self._recorded.read(param_groups.names_of(self))

    def _update_entries(self, plan: Plan, group: dict[str, Any]) -> list[Wait]:
        """AdamW on the entries that this rank updates of parameters without a view; returns pending exchanges."""
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
            lambda flags, of: all_reduce_and(flags, [ranks[i] for i in of]),
        )
        return exchange_rows(plan.entries, plan.where)

    def _update(self, bucket: Bucket, group: dict[str, Any]) -> Iterator[None]:
        """The step of a bucket; it yields while a collective runs, so that other buckets compute meanwhile."""
        structure, due = bucket.with_side_of(self.structure(group)), partial(self._is_due, group)
        yield from pause(bucket.gather())
        direction, update, lr = None, None, learning_rate(group)
        if bucket.members:
            direction, seen = yield from self._directions(bucket, group)
            if isinstance(structure, OneCall):
                update = yield from self._in_one_call(bucket, group, structure, direction, seen)
            else:
                yield from self._learn(bucket, group, structure, seen, due)
            del seen  # a stack of gradients that the rest of the step does without
        yield from pause(bucket.share(due, structure.root_keys))
        if direction is not None:
            if update is None:
                with exact_matmul(direction.device):
                    update = bucket.precondition(structure, direction)
            size = SCALINGS[group["adjust_lr"]](update, bucket) * -lr
            # A structure may give back the direction, and that may be the momentum itself: it must not change.
            update = update * size if update is bucket.state["exp_avg"] else update.mul_(size)
            if self._recorder is not None:
                self._recorder.updates(bucket, structure, group, update)
        yield from pause(bucket.add(update, 1 - lr * group["weight_decay"], group["rounding"]))

    def _directions(self, bucket: Bucket, group: dict[str, Any]) -> Generator[None, None, tuple[Stack, Stack]]:
        """Momentum: what to precondition, and what enters the statistic."""
        beta1, momentum = group["betas"][0], bucket.state["exp_avg"]
        grad = bucket.gradients()
        norm = torch.linalg.vector_norm(grad, dim=(1, 2), keepdim=True)
        yield from pause(bucket.join(norm))
        if self._recorder is not None:
            self._recorder.gradients(bucket, norm)
        moved = norm.isfinite() & (norm > 0)
        grad = where(moved, -grad if group["maximize"] else grad, 0.0)
        bucket.memory["failures"] += ~norm[bucket.own].isfinite()[:, 0, 0]

        masked_lerp_(momentum, grad, 1 - beta1, moved)
        direction = momentum.lerp(grad, 1 - beta1) if group["nesterov"] else momentum
        direction = where(moved, direction, 0.0)
        return direction, direction if group["statistic"] == "momentum" else grad

    def _learn(
        self,
        bucket: Bucket,
        group: dict[str, Any],
        structure: Structure,
        seen: Stack,
        due: Callable[[Member], bool],
    ) -> Iterator[None]:
        """Take what was seen into the statistic, and refresh the roots that are due."""
        with exact_matmul(seen.device):
            measurement = structure.compute_statistic(seen)
        yield from pause(bucket.sum(measurement))
        with exact_matmul(seen.device):
            structure.update_statistic(bucket.memory, measurement[bucket.own], group["betas"][1])
            bucket.root_retry.refresh(structure, bucket.memory, bucket.rows(due), group["root"], group["eps"])

    def _in_one_call(
        self, bucket: Bucket, group: dict[str, Any], structure: OneCall, direction: Stack, seen: Stack
    ) -> Generator[None, None, Stack]:
        """The preconditioned direction of a structure that has no root beside it."""
        beta2 = group["betas"][1]
        if bucket.placement.kind == "partial_sums":
            with exact_matmul(seen.device):
                measurement = structure.compute_statistic(seen)
            yield from pause(bucket.sum(measurement))
            update, ok = structure.update_from(bucket.memory, direction, measurement, beta2, bucket.whole)
            bucket.memory["failures"] += ~ok
            return update
        if bucket.placement.kind != "root_sharing":
            update, ok = structure.update(bucket.memory, direction, seen, beta2)
            bucket.memory["failures"] += ~ok
            return update
        update = torch.empty(direction.shape, dtype=direction.dtype, device=direction.device)
        for rows in bucket.rows(lambda member: True):  # those of this rank
            memory, some = {key: x[rows] for key, x in bucket.memory.items()}, direction[rows]
            update[rows], ok = structure.update(memory, some, some if seen is direction else seen[rows], beta2)
            memory["failures"] += ~ok
        yield from pause(bucket.bring(update))
        return update

    def _is_due(self, group: dict[str, Any], member: Member) -> bool:
        interval = group["precondition_frequency"]
        if interval == 1:
            return True
        step = int(self.state[member.param]["step"])
        return step <= WARMUP_STEPS or step % interval == member.refresh_phase

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked before anything changes. The dict is kept; defaults and ``views`` are added to it."""
        super().add_param_group(param_group)
        for hook in self.step_hooks:
            hook.on_group(self, param_group)

    # ---- plans ------------------------------------------------------------------------------------------------

    def _forget_plans(self) -> None:
        self._plans: dict[int, Plan] = {}

    def _current_plans(self) -> list[Plan]:
        """The plan of every group, rebuilt where the parameters with gradients, or their state, have changed."""
        self._follow_groups()
        signatures = [_signature(group) for group in self.param_groups]
        stale = [i for i, signature in enumerate(signatures) if not self._is_current(i, signature)]
        for i in stale:
            self._check_shapes(self.param_groups[i])
        if stale:
            phases = refresh_phases(self.param_groups, self._members.views, self.structure)
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
        """Raise for a parameter that no longer has the shape of its state; unused state is initialized again."""
        for name, param in param_groups.names_of_group(group):
            view = self._members.views[param]
            if view is not None:
                view.check(name or "a parameter", param.shape)
            caller, state, where = type(self).__name__, self.state[param], self._where(param, group)
            fits = check_shape(caller, name, param, state, *where)
            if fits and view is not None:
                fits = check_form(caller, name, param, state, where[0], self.structure(group))
            if not fits:
                self._partition.forget_one(param)
                renew(state, self._init_state(param, group))

    def _plan(
        self,
        group: dict[str, Any],
        signature: object,
        phases: Mapping[tuple[Tensor, int], int],
        places: Mapping[Tensor, int],
    ) -> Plan:
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            move_state_to_param(
                self.state[param], param, group, self._members.views[param], self._where(param, group)[0]
            )
        viewed = [param for param in params if self._members.views[param] is not None]
        entries = [param for param in params if self._members.views[param] is None]
        structure = self.structure(group) if viewed else None
        buckets = []
        if structure is not None:
            members = self._partition.members(viewed, self._members.views, structure, phases, places)
            buckets = make_buckets(members, structure, self.state, KINDS)
        where = [self._where(param, group)[0] for param in entries]
        return Plan(signature, entries, where, [places[param] for param in entries], viewed, buckets)


def structured(optimizer: Any) -> StructuredOptimizer | None:
    """The optimizer of this library that this one is, or wraps in its attribute ``optimizer`` as `asgo.SPAM` does.

    None for any other. Wrappers of frameworks have the attribute too.
    """
    while not isinstance(optimizer, StructuredOptimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            return None
        optimizer = inner
    return optimizer


class StepHook(ABC):
    """What a wrapper adds to the step, without a step of its own; `asgo.SPAM` is one."""

    @abstractmethod
    def before_update(self, optimizer: StructuredOptimizer, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Called after the closure and all checks, before state and parameters change.

        It may change gradients and state in place, not the parameters.

        Args:
            optimizer: that takes the step.
            groups: its groups, or copies of them that the hook before this one has returned.

        Returns:
            The groups whose hyperparameters this step uses, in the same order.
        """

    @abstractmethod
    def on_group(self, optimizer: StructuredOptimizer, group: dict[str, Any]) -> None:
        """Called when a group has been added."""

    @abstractmethod
    def before_peak(self, groups: list[dict[str, Any]]) -> None:
        """Set counters in the groups so that the next step allocates as much memory as any does."""


@dataclass(frozen=True)
class Plan:
    """How a step treats the parameters of a group that have gradients.

    Args:
        signature: see `_signature`; the plan is valid while it is unchanged.
        entries: the parameters without a view.
        where: their placements.
        places: a number for each of them that it has on all ranks and no other has.
        viewed: the parameters with a view.
        buckets: the stacks of the parameters with a view.
    """

    signature: object
    entries: list[Tensor]
    where: list[Placement]
    places: list[int]
    viewed: list[Tensor]
    buckets: list[Bucket]


def _signature(group: Mapping[str, Any]) -> object:
    """What a plan depends on: it is rebuilt when this changes."""
    return (
        group["precondition_frequency"],
        group["rounding"],
        [group.get(key) for key in ("root", "side", "packed_state", "cross_normalize")],
        [(id(p), p.shape, p.stride(), p.dtype, p.device) for p in group["params"] if p.grad is not None],
    )
