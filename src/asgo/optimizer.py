"""The one step loop that every optimizer of the library runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from asgo import adamw, settings
from asgo._types import Stack, State
from asgo.buckets import Bucket, Member, make_buckets
from asgo.distributed.buckets import KINDS, interleave, pause
from asgo.distributed.groups import Wait, agree
from asgo.distributed.placement import Placement, entries_of, gradient, local
from asgo.distributed.state import assign, export
from asgo.distributed.work import Division, spread, turns_of
from asgo.masks import blend, choose
from asgo.matmul import exact_matmul
from asgo.scaling import SCALINGS
from asgo.state import follow, init_state
from asgo.structures import Structure
from asgo.views import View, default_view

WARM_STEPS = 10
"""The first steps refresh every root whatever the interval: the statistic changes fastest there."""


class StructuredOptimizer(Optimizer, ABC):
    """A structured adaptive optimizer: views of parameters, a structure, a root and a rule for the step size.

    A preset names its hyperparameters and chooses the structure; nothing overrides `step`. Each group has one
    view (`asgo.View`) through which its parameters are read as stacks of matrices, or none: then it is AdamW.
    Groups that name no view, and bare parameters, are split by `default_view`.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of them, as for every `torch.optim.Optimizer`.
        defaults: hyperparameters of groups that do not set their own; what the step loop reads beside them is fixed
            by the class attribute `loop`, and groups may not set it.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key of a group, a view that does not fit.
        TypeError: a parameter that is complex or not of floating point.
    """

    loop: ClassVar[Mapping[str, Any]] = settings.LOOP
    """What the step loop reads where a preset has no hyperparameter for it."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        settings.check_ordered(params)
        settings.check(type(self).__name__, defaults)
        self._buckets: dict[int, tuple[object, list[Bucket]]] = {}
        self._division = Division()
        super().__init__(params, defaults)
        self._begin()

    @abstractmethod
    def structure(self, group: dict[str, Any]) -> Structure:
        """The structure that a group's hyperparameters describe."""

    def default_view(self, param: Tensor, group: Mapping[str, Any]) -> View | None:
        """The view of a parameter whose group names none; `group` holds what the user set. None is AdamW."""
        return default_view(param.ndim)

    def check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise `ValueError` for the parts of a group, each with its view, that fit no structure of this optimizer."""

    # ---- the step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step: decoupled decay, momentum, measure, fold, refresh, precondition, rescale.

        Parameters without a gradient stay as they are. A matrix whose gradient is zero rests (only decay moves
        it); one whose gradient is not finite rests too and is counted by `failures`.

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
        waits: list[Wait] = []
        tasks: list[Iterator[None]] = []
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if group["view"] is None:
                waits += self._update_entries(params, group)
                continue
            if params:
                torch._foreach_add_([self.state[p]["step"] for p in params], 1)
            tasks += [self._update(bucket, group) for bucket in self._group_buckets(index, group, params)]
        interleave(tasks)
        for wait in waits:
            wait()
        return loss

    def _update_entries(self, params: list[Tensor], group: dict[str, Any]) -> list[Wait]:
        """AdamW on what this rank holds, or is to update, of parameters without a view."""
        where = [self._where(p, group)[0] for p in params]
        held, grads = (
            [entries_of(p, at, of(p)) for p, at in zip(params, where, strict=True)] for of in (local, gradient)
        )
        states = [follow(self.state[p], p, group) for p in params]
        adamw.adamw(held, grads, states, group, lambda flags, of: agree(flags, [where[i].ranks for i in of]))
        return spread(params, where)

    def _update(self, bucket: Bucket, group: dict[str, Any]) -> Iterator[None]:
        """The step of a bucket. It yields where something is under way between ranks, for others to use the time."""
        structure, due = bucket.fixed(self.structure(group)), partial(self._is_due, group)
        yield from pause(bucket.gather())
        direction, update = None, None
        if bucket.members:
            direction = yield from self._learn(bucket, group, structure, due)
        yield from pause(bucket.share(due, structure.derived))
        if direction is not None:
            with exact_matmul(direction.device):
                update = bucket.precondition(structure, direction)
            size = SCALINGS[group["adjust_lr"]](update, bucket) * -group["lr"]
            update = update * size if update is bucket.state["exp_avg"] else update.mul_(size)
        yield from pause(bucket.add(update, 1 - group["lr"] * group["weight_decay"]))

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
            failed = sum(int(t.sum()) for key, t in self.state[param].items() if key.startswith("failures"))
            counts |= {name: failed} if failed else {}
        return counts

    def reset(self) -> None:
        """Put all state back to what it was before the first step, except for the counts of failures."""
        for group in self.param_groups:
            for param in group["params"]:
                fresh = self._init_state(param, group)
                state = follow(self.state[param], param, group)
                for key in fresh.keys() - {key for key in fresh if key.startswith("failures")}:
                    state[key].copy_(fresh[key])

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
        self._division.share(type(self).__name__, process_group, shard_state)
        self._division.divide(self.param_groups, self.structure)
        self._division.keep_own(self.param_groups, self.state, self.structure)
        self._buckets = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked before anything changes; without a ``view`` it is split by number of axes.

        The part of a split that has no view keeps the group's ``lr`` and AdamW's own defaults for the rest.
        """
        who, groups = type(self).__name__, settings.split_by_view(param_group, self.default_view)
        taken = [p for group in self.param_groups for p in group["params"]]
        for group in groups:
            view = View.of(group["view"])
            group["view"] = None if view is None else view.to_dict()
            settings.check_group(who, group, self.defaults, taken)
        self.check_groups(groups)
        for group in groups:
            if group["view"] is None:
                group.update({key: value for key, value in adamw.DEFAULTS.items() if key not in group})
            super().add_param_group(group)
            if group["view"] is None:
                for key in set(self.defaults) - settings.WITHOUT_VIEW:
                    del group[key]
            else:
                group.update({key: value for key, value in self.loop.items() if key not in self.defaults})
        if self._division.begun:
            self._begin()

    def _begin(self) -> None:
        """State of the parameters that have none, once all groups of a call are known: work is divided among them."""
        self._division.divide(self.param_groups, self.structure)
        for group in self.param_groups:
            for param in group["params"]:
                if param not in self.state:
                    self.state[param] = self._init_state(param, group)

    def state_dict(self) -> dict[str, Any]:
        """As of every `torch.optim.Optimizer`, with the same keys and shapes on every rank whatever it keeps.

        Of what is spread over ranks, tensors are `DTensor`, placed like the parameter or on the one rank that keeps
        them, as `torch.distributed.checkpoint` takes them.
        """
        packed = super().state_dict()
        for group, saved in zip(self.param_groups, packed["param_groups"], strict=True):
            for param, i in zip(group["params"], saved["params"], strict=True):
                packed["state"][i] = export(self.state[param], param, *self._where(param, group))
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, keeping the precision of the state (torch alone would cast fp32 statistics
        to bf16 parameters).

        Raises:
            ValueError: state of another optimizer, model or view; nothing has changed then.
        """
        state_dict = settings.check_state(self, state_dict)
        own, exported = dict(self.state), self.state_dict()["state"]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(own)
        with torch.no_grad():
            for place, i in enumerate(ids):
                assign(exported[place], state_dict["state"][i])

    def __getstate__(self) -> dict[str, Any]:
        # Compact copies: a view into a bucket would drag the whole bucket along, once per parameter.
        state = super().__getstate__()
        compact = {p: {key: t.clone() for key, t in own.items()} for p, own in self.state.items()}
        return {**state, "_division": self._division, "state": type(self.state)(dict, compact)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = {}

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> State:
        structure = None if group["view"] is None else self.structure(group)
        return init_state(param, *self._where(param, group), structure, group)

    def _where(self, param: Tensor, group: dict[str, Any]) -> tuple[Placement, Sequence[int | None]]:
        """The placement of a parameter, and the owner of each of its parts."""
        view = View.of(group["view"])
        structure = None if view is None else self.structure(group)
        return self._division.placement(param, view, structure), self._division.owners(param, view)

    def _group_buckets(self, index: int, group: dict[str, Any], params: list[Tensor]) -> list[Bucket]:
        """The buckets of the parameters that have gradients now; remade when those or their state change."""
        signature = (group["precondition_frequency"], [(id(p), p.device, p.dtype) for p in params])
        known, buckets = self._buckets.get(index, (None, []))
        if known != signature or not all(bucket.is_bound() for bucket in buckets):
            turn_of = turns_of(self.param_groups, self.structure, group["precondition_frequency"])
            structure = self.structure(group)
            members = self._division.members(params, View.of(group["view"]), structure, turn_of)
            states = {param: follow(self.state[param], param, group) for param in params}
            buckets = make_buckets(members, structure, states, KINDS)
            self._buckets[index] = (signature, buckets)
        return buckets
