"""The one step loop that every optimizer of the library runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from asgo import adamw, settings
from asgo._types import State
from asgo.buckets import Bucket, Member, init_state, make_buckets, state_dtype, turns
from asgo.masks import blend, choose
from asgo.matmul import exact_matmul
from asgo.scaling import SCALINGS
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
        super().__init__(params, defaults)

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
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if group["view"] is None:
                adamw.adamw(params, [self._state_of(p, group) for p in params], group)
                continue
            if params:
                torch._foreach_add_([self.state[p]["step"] for p in params], 1)
            for bucket in self._group_buckets(index, group, params):
                self._update(bucket, group)
        return loss

    def _update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        structure, (beta1, beta2) = self.structure(group), group["betas"]
        state, momentum = bucket.state, bucket.state["exp_avg"]
        grad = bucket.gradients(momentum.dtype)
        norm = torch.linalg.vector_norm(grad, dim=(1, 2), keepdim=True)
        moved = norm.isfinite() & (norm > 0)
        grad = choose(moved, -grad if group["maximize"] else grad, 0.0)
        state["failures"] += ~norm.isfinite()[:, 0, 0]

        blend(momentum, grad, 1 - beta1, moved)
        direction = momentum.lerp(grad, 1 - beta1) if group["nesterov"] else momentum
        direction = choose(moved, direction, 0.0)

        with exact_matmul(grad.device):
            structure.fold(state, structure.measure(direction if group["statistic"] == "momentum" else grad), beta2)
            due = bucket.rows(lambda member: self._is_due(member, group))
            bucket.ladder.refresh(structure, state, due, group["root"], group["eps"])
            update = structure.precondition(state, direction)
        size = SCALINGS[group["adjust_lr"]](update, bucket.slices) * -group["lr"]
        update = update * size if update is momentum else update.mul_(size)
        bucket.add(update, 1 - group["lr"] * group["weight_decay"])

    def _is_due(self, member: Member, group: dict[str, Any]) -> bool:
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
                fresh = self._init_state(param, View.of(group["view"]), group)
                state = self._state_of(param, group)
                for key in fresh.keys() - {key for key in fresh if key.startswith("failures")}:
                    state[key].copy_(fresh[key])

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
            for param in group["params"]:
                self.state[param] = self._init_state(param, View.of(group["view"]), group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, keeping the precision of the state (torch alone would cast fp32 statistics
        to bf16 parameters).

        Raises:
            ValueError: state of another optimizer, model or view; nothing has changed then.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        settings.check_state(self, state_dict)
        own = [self.state[p] for p in params]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        super().load_state_dict(state_dict)
        for param, state, i in zip(params, own, ids, strict=True):
            for key, tensor in state.items():
                tensor.copy_(state_dict["state"][i][key])
            self.state[param] = state

    def __getstate__(self) -> dict[str, Any]:
        # Compact copies: a view into a bucket would drag the whole bucket along, once per parameter.
        state = super().__getstate__()
        compact = {p: {key: t.clone() for key, t in own.items()} for p, own in self.state.items()}
        return {**state, "state": type(self.state)(dict, compact)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = {}

    def _init_state(self, param: Tensor, view: View | None, group: dict[str, Any]) -> State:
        dtype = state_dtype(param)
        step = {"step": torch.zeros((), device=_device_of_step(param, group))}
        if view is None:
            return step | adamw.init(param, dtype)
        return step | init_state(param, view, self.structure(group))

    def _group_buckets(self, index: int, group: dict[str, Any], params: list[Tensor]) -> list[Bucket]:
        """The buckets of the parameters that have gradients now; remade when those or their state change."""
        signature = (group["precondition_frequency"], [(id(p), p.device, p.dtype) for p in params])
        known, buckets = self._buckets.get(index, (None, []))
        if known != signature or not all(bucket.is_bound() for bucket in buckets):
            view, structure = View.of(group["view"]), self.structure(group)
            if view is None:
                return []
            turn_of = self._turns(group["precondition_frequency"])
            buckets = make_buckets(params, [self._state_of(p, group) for p in params], view, structure, turn_of)
            self._buckets[index] = (signature, buckets)
        return buckets

    def _turns(self, interval: int) -> dict[tuple[Tensor, int], int]:
        """The step (modulo the interval) of every part of all groups of that interval, so that steps cost alike."""
        costs: dict[tuple[Tensor, int], float] = {}
        for group in self.param_groups:
            view = View.of(group["view"])
            if view is not None and group["precondition_frequency"] == interval:
                structure = self.structure(group)
                for param in group["params"]:
                    for part, (b, m, n) in enumerate(view.shapes(param.shape)):
                        costs[param, part] = b * structure.cost(m, n)
        return dict(zip(costs, turns(list(costs.values()), interval), strict=True))

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> State:
        """The state of a parameter, moved to where the parameter is now (models move after construction)."""
        state, dtype = self.state[param], state_dtype(param)
        if state["exp_avg"].device != param.device or state["exp_avg"].dtype != dtype:
            for key, tensor in state.items():
                if key == "step":
                    state[key] = tensor.to(_device_of_step(param, group))
                else:
                    state[key] = tensor.to(param.device, dtype if tensor.is_floating_point() else tensor.dtype)
        return state


def _device_of_step(param: Tensor, group: dict[str, Any]) -> torch.device:
    """On the host, which reads it to know whose turn it is; the fused AdamW and a captured graph read it on device."""
    return param.device if group["view"] is None or group["capturable"] else torch.device("cpu")
