"""The step that all optimizers of the library share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asgo._types import Stack
from asgo.linalg.masked import masked_lerp_, where
from asgo.linalg.matmul import exact_matmul
from asgo.optimizer import adamw, group_checks, param_groups
from asgo.optimizer.base import GroupedOptimizer
from asgo.optimizer.bucket import Bucket, make_buckets
from asgo.optimizer.hyperparameters import adamw_of, learning_rate, whole
from asgo.optimizer.metrics import Recorder
from asgo.optimizer.refresh_schedule import is_due, refresh_phases
from asgo.optimizer.state import check_form, check_shape, move_state_to_param, renew
from asgo.optimizer.step_plan import StepPlan, signature_of
from asgo.optimizer.update_size import SCALINGS
from asgo.parts import Due, ParameterPart, Wait
from asgo.structures import OneCall, Structure


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
            of a group changes both learning rates by the same factor.

    Raises:
        ValueError: a hyperparameter out of range, a misspelt key of a group, a view that does not fit.
        TypeError: a parameter that is complex or not floating point.
    """

    step_hooks: tuple[StepHook, ...] = ()
    """Run in this order in every step, see `StepHook`."""

    _recorder: Recorder | None = None
    _record_every = 0
    _unrecorded_steps = 0
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
        self._recorder = self._recorder_of_step()
        waits: list[Wait] = []
        tasks: list[Iterator[Wait | None]] = []
        for group, plan in zip(groups, plans, strict=True):
            waits += self._step_adamw(plan, group)
            if plan.viewed:
                torch._foreach_add_([self.state[p]["step"] for p in plan.viewed], 1)
                structure = self.structure(group)
                tasks += [self._step_bucket(bucket, group, structure) for bucket in plan.buckets]
        run_overlapped(tasks)
        for wait in waits:
            wait()
        if self._recorder is not None:
            self._recorder.finish(groups, plans, self.state)
            self._recorded = self._recorder
        return loss

    def record_metrics(self, every: int = 1) -> None:
        """Record every n-th step from now on, for `metrics`. Until this is called, no step is recorded.

        A step that is not recorded runs the same operations as if this had never been called.

        Args:
            every: 1 records every step, 50 every fiftieth, beginning with the fiftieth from now; 0 stops recording.

        Raises:
            ValueError: not a whole number from 0.
        """
        whole("a whole number of steps", low=0).check(f"{type(self).__name__}: record_metrics: every", every)
        self._record_every, self._unrecorded_steps = every, 0

    def _recorder_of_step(self) -> Recorder | None:
        """A recorder for the step that begins, if it is one to record."""
        self._unrecorded_steps += 1
        if not self._record_every or self._unrecorded_steps < self._record_every:
            return None
        self._unrecorded_steps = 0
        return Recorder()

    def metrics(self) -> dict[str, dict[str, float]]:
        """What the last recorded step did to every parameter that had a gradient, by the parameter's name.

        ``update_rms``: root mean square of what the step added, before weight decay and rounding; ``weight_rms``: of
        the weights after it; ``ratio``: ``update_rms / weight_rms``; ``gradient_norm``: Frobenius norm; ``failures``:
        see `failures`; for `ASGO` with an inverse root also ``root_residual``: an estimate of
        ``||Z A Z - I||_F / sqrt(k)`` for the root Z in use and the current damped statistic A, the largest over the
        parameter's matrices (see `asgo.optimizer.metrics.residuals`).

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

    def _step_adamw(self, plan: StepPlan, group: dict[str, Any]) -> list[Wait]:
        """AdamW on the entries that this rank updates of parameters without a view; returns pending exchanges."""
        params, strategies = plan.entries, plan.strategies
        if not params:
            return []
        pairs = list(zip(params, strategies, strict=True))
        held, grads = [s.entries(p, p) for p, s in pairs], [s.entries(p, s.gradient(p)) for p, s in pairs]
        speaker = next((s for s in strategies if s.ranks), strategies[0])  # starts the collectives of all of them

        def all_agree(flags: Tensor, of: Sequence[int]) -> Tensor:
            return speaker.all_agree(flags, [strategies[i] for i in of])

        adamw.adamw(held, grads, [self.state[p] for p in params], adamw_of(group), plan.places, all_agree)
        return speaker.exchange_entries(params, strategies)

    def _step_bucket(self, bucket: Bucket, group: dict[str, Any], structure: Structure) -> Iterator[Wait | None]:
        """The step of a bucket: gather, momentum, statistic, reduce, root, apply, scatter.

        A coroutine that yields what it waits for, so that other buckets compute while a collective runs.
        """
        strategy, (beta1, _), lr = bucket.strategy, group["betas"], learning_rate(group)
        structure = strategy.local_structure(structure, *bucket.matrix_shape)
        direction = update = None
        due = partial(self._is_due, group)
        yield strategy.gather_gradients(bucket)
        if bucket.parts:
            grad, momentum = bucket.gradients(), bucket.state["exp_avg"]
            norm = torch.linalg.vector_norm(grad, dim=(1, 2), keepdim=True)
            yield strategy.reduce_norms(norm)
            if self._recorder is not None:
                self._recorder.gradients(bucket, norm)
            active = norm.isfinite() & (norm > 0)
            grad = where(active, -grad if group["maximize"] else grad, 0.0)
            bucket.memory["failures"] += ~norm[bucket.own].isfinite()[:, 0, 0]
            masked_lerp_(momentum, grad, 1 - beta1, active)
            direction = where(active, momentum.lerp(grad, 1 - beta1) if group["nesterov"] else momentum, 0.0)
            seen, statistic = direction if group["statistic"] == "momentum" else grad, None
            del grad  # a stack that the rest of the step does without, as `seen` below
            if strategy.sums_statistics or not isinstance(structure, OneCall):
                with exact_matmul(seen.device):
                    statistic = structure.compute_statistic(seen)
                yield strategy.reduce_statistics(bucket, statistic)
            update = _learn(bucket, group, structure, direction, seen, statistic, due)
            del seen, statistic
        if update is None:
            yield strategy.broadcast_roots(bucket, due, structure.root_keys)
        else:
            yield strategy.broadcast_updates(bucket, update)
        if direction is not None:
            update = _apply(bucket, structure, direction) if update is None else update
            size = SCALINGS[group["adjust_lr"]](update, bucket) * -lr
            # A structure may give back the direction, and that may be the momentum itself: it must not change.
            update = update * size if update is bucket.state["exp_avg"] else update.mul_(size)
            if self._recorder is not None:
                self._recorder.updates(bucket, structure, group, update)
        yield strategy.scatter_updates(bucket, update, 1 - lr * group["weight_decay"], group["rounding"])

    def _is_due(self, group: dict[str, Any], part: ParameterPart) -> bool:
        interval = group["precondition_frequency"]
        return interval == 1 or is_due(int(self.state[part.param]["step"]), interval, part.refresh_phase)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked before anything changes. The dict is kept; defaults and ``views`` are added to it."""
        super().add_param_group(param_group)
        for hook in self.step_hooks:
            hook.on_group(self, param_group)

    # ---- plans ------------------------------------------------------------------------------------------------

    def _forget_plans(self) -> None:
        self._plans: dict[int, StepPlan] = {}

    def _current_plans(self) -> list[StepPlan]:
        """The plan of every group, rebuilt where the parameters with gradients, or their state, have changed."""
        self._follow_groups()
        signatures = [signature_of(group) for group in self.param_groups]
        stale = [i for i, signature in enumerate(signatures) if not self._is_current(i, signature)]
        for i in stale:
            self._check_shapes(self.param_groups[i])
        if stale:
            phases = refresh_phases(self._group_plans())
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
        structure = self.structure(group)
        for name, param in param_groups.names_of_group(group):
            view = self._members.views[param]
            if view is not None:
                view.check(name or "a parameter", param.shape)
            caller, state, strategy = type(self).__name__, self.state[param], self._strategy(param, group)
            fits = check_shape(caller, name, param, state, strategy, self._owners(param))
            if fits and view is not None:
                fits = check_form(caller, name, param, state, strategy, structure)
            if not fits:
                self._partition.forget_one(param)
                renew(state, self._init_state(param, group))

    def _plan(
        self,
        group: dict[str, Any],
        signature: object,
        phases: Mapping[tuple[Tensor, int], int],
        places: Mapping[Tensor, int],
    ) -> StepPlan:
        params, views = [param for param in group["params"] if param.grad is not None], self._members.views
        for param in params:
            move_state_to_param(self.state[param], param, group, views[param], self._strategy(param, group))
        entries = [param for param in params if views[param] is None]
        strategies = [self._strategy(param, group) for param in entries]
        viewed = [param for param in params if views[param] is not None]
        parts = [
            ParameterPart(param, view, i, self._strategy(param, group), phases[param, i], owner, places[param] + i)
            for param in viewed
            if (view := views[param]) is not None
            for i, owner in enumerate(self._owners(param))
        ]
        buckets = make_buckets(parts, self.structure(group), self.state) if parts else []
        return StepPlan(signature, entries, strategies, [places[param] for param in entries], viewed, buckets)


def _learn(
    bucket: Bucket,
    group: Mapping[str, Any],
    structure: Structure,
    direction: Stack,
    seen: Stack,
    statistic: Tensor | None,
    due: Due,
) -> Stack | None:
    """Take a statistic in and refresh the roots that are due; of a `OneCall`, the update, else None."""
    beta2 = group["betas"][1]
    if not isinstance(structure, OneCall):
        with exact_matmul(direction.device):
            structure.update_statistic(bucket.memory, statistic[bucket.own], beta2)  # pyright: ignore[reportOptionalSubscript]
            bucket.root_retry.refresh(structure, bucket.memory, bucket.due_rows(due))
        return None
    if statistic is not None:
        update, ok = structure.update_from(bucket.memory, direction, statistic, beta2, bucket.whole_norms)
        bucket.memory["failures"] += ~ok
        return update
    if not bucket.strategy.shares_roots:
        out = None if direction is bucket.state["exp_avg"] else direction
        update, ok = structure.update(bucket.memory, direction, seen, beta2, out=out)
        bucket.memory["failures"] += ~ok
        return update
    update = torch.empty(direction.shape, dtype=direction.dtype, device=direction.device)
    for rows in bucket.due_rows(lambda part: True):  # all parts of this rank
        memory, some = {key: x[rows] for key, x in bucket.memory.items()}, direction[rows]
        update[rows], ok = structure.update(memory, some, some if seen is direction else seen[rows], beta2)
        memory["failures"] += ~ok
    return update


def _apply(bucket: Bucket, structure: Structure, direction: Stack) -> Stack:
    """The direction, preconditioned by the roots."""
    with exact_matmul(direction.device):
        if bucket.strategy.sums_statistics:
            return structure.precondition_shard(bucket.state, direction, bucket.whole_norms)
        return structure.precondition(bucket.state, direction)


def run_overlapped(tasks: Iterable[Iterator[Wait | None]]) -> None:
    """Run coroutines that yield what they wait for, or None, to their ends.

    Every round starts one bucket, then resumes all pending ones, newest first, so that its transfer overlaps the
    previous bucket's compute. One that never waits is done before the next begins.
    """
    pending: list[tuple[Iterator[Wait | None], Wait]] = []
    for task in tasks:
        pending = _resume_all([(task, lambda: None), *pending])
    while pending:
        pending = _resume_all(pending)


def _resume_all(pending: Iterable[tuple[Iterator[Wait | None], Wait]]) -> list[tuple[Iterator[Wait | None], Wait]]:
    """Wait for each and run it up to its next wait; returns the coroutines that have not ended."""
    found = []
    for task, wait in pending:
        wait()
        handle = next((handle for handle in task if handle is not None), None)
        found += [] if handle is None else [(task, handle)]
    return found


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
