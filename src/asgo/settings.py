"""What a hyperparameter, a group and a saved state may be, and the errors that say so before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from asgo.adamw import DEFAULTS as ADAMW_DEFAULTS
from asgo.distributed.placement import find
from asgo.roots import ROOTS, check_eps
from asgo.scaling import SCALINGS
from asgo.triangles import rectangle
from asgo.views import View

LOOP: dict[str, Any] = {
    "betas": (0.0, 1.0),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "precondition_frequency": 1,
    "statistic": "gradient",
    "nesterov": False,
    "adjust_lr": None,
    "root": "auto",
    "capturable": False,
}
"""What the step loop reads, with neutral values: those of a preset that has no hyperparameter for them."""

ALWAYS_ALLOWED = {"params", "param_names", "view", "name", "initial_lr"}
WITHOUT_VIEW = {"lr", "maximize", *ADAMW_DEFAULTS}


def _number(value: Any, low: float, high: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high


def _is_lr(value: Any) -> bool:
    if isinstance(value, Tensor):
        # A lr on a device is not read: that would wait for the device.
        return value.numel() == 1 and (value.device.type != "cpu" or 0 <= float(value) < math.inf)
    return _number(value, 0)


def _are_betas(value: Any) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and _number(value[0], 0, 1) and (_number(value[1], 0, 1) or value[1] == 1)


def _one_of(*values: Any) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: any(value is v or (value == v and type(value) is type(v)) for v in values)), (
        "one of " + ", ".join(map(repr, values))
    )


def _interval(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_blocks(value: Any) -> bool:
    return _interval(value) or value in ("tensor", "row", "kernel", "column") or isinstance(value, Mapping)


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_lr, "a finite number >= 0 or a one-element tensor"),
    "betas": (_are_betas, "two numbers in [0, 1); a second one of 1 adds gradients up instead of averaging"),
    "eps": (lambda value: _number(value, 0) and value > 0, "a number > 0, e.g. 1e-6"),
    "weight_decay": (lambda value: _number(value, 0), "a finite number >= 0"),
    "precondition_frequency": (_interval, "a whole number of steps >= 1"),
    "statistic": _one_of("gradient", "momentum"),
    "nesterov": _one_of(True, False),
    "cross_normalize": _one_of(True, False),
    "side": _one_of("auto", "left", "right"),
    "adjust_lr": _one_of(*SCALINGS),
    "root": _one_of(*ROOTS),
    "maximize": _one_of(True, False),
    "capturable": _one_of(True, False),
    "packed_state": _one_of(True, False),
    "axis": _one_of("column", "row", "auto"),
    "max_size": (_interval, "a whole number >= 1"),
    "rank": (lambda value: value in (None, "auto") or _interval(value), "'auto', None or a whole number >= 1"),
    "direction": _one_of("factor", "symmetric"),
    "integrator": _one_of(None, "psi", "bug", "eig"),
    "compensate": _one_of(True, False),
    "block_size": (_interval, "a whole number >= 1"),
    "stale": _one_of("root", "diagonal"),
    "clip": (lambda value: value is None or (_number(value, 0) and value > 0), "None or a number > 0"),
    "gamma": (lambda value: _number(value, 0) and value > 0, "a number > 0, e.g. 1e-3"),
    "delta": (lambda value: _number(value, 0) and value > 0, "a number > 0, e.g. 1e-5"),
    "blocks": (_are_blocks, "'tensor', 'row', 'kernel', 'column', a number of blocks >= 1 or an asgo.View"),
}


SPAM_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "threshold": (lambda value: _number(value, 0) and value > 0, "a number > 0, e.g. 5000"),
    "interval": (_interval, "a whole number of steps >= 1"),
    "warmup": (lambda value: value == 0 or _interval(value), "a whole number of steps >= 0"),
}


def check(
    who: str, values: Mapping[str, Any], checks: Mapping[str, tuple[Callable[[Any], bool], str]] = CHECKS
) -> None:
    """Raise `ValueError` for the first hyperparameter that is out of range."""
    for key, value in values.items():
        fits, expected = checks.get(key, (None, ""))
        if fits is not None and not fits(value):
            raise ValueError(f"{who}: {key} must be {expected}; got {value!r}.")


def check_ordered(params: Any) -> None:
    """Raise `TypeError` for a set, whose order differs from run to run."""
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must be in order, and a set has none: pass a list, or model.named_parameters().")


def split_by_view(group: Any, view_of: Callable[[Tensor, Mapping[str, Any]], View | None]) -> list[dict[str, Any]]:
    """A group as it is if it names a view, else one group per view that `view_of` gives its parameters."""
    if not isinstance(group, Mapping) or "params" not in group:
        raise TypeError(f"a group must be a dict with the key 'params'; got {type(group).__name__}.")
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    check_ordered(params)
    members = list(params)
    if "view" in group:
        return [{**group, "params": members}]
    kinds: dict[View | None, list[Any]] = {}
    for member in members:
        kinds.setdefault(view_of(_tensor(member), group), []).append(member)
    shared = {key: value for key, value in group.items() if key not in ADAMW_DEFAULTS}
    return [{**(group if view is not None else shared), "params": some, "view": view} for view, some in kinds.items()]


def tensors(group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group, with or without names."""
    return [_tensor(member) for member in group["params"]]


def _tensor(member: Any) -> Tensor:
    tensor = member[1] if isinstance(member, tuple) and len(member) == 2 else member
    if not isinstance(tensor, Tensor):
        raise TypeError(f"parameters must be tensors or (name, tensor) pairs; got {type(member).__name__}.")
    return tensor


def check_group(who: str, group: Mapping[str, Any], defaults: Mapping[str, Any], taken: Sequence[Tensor]) -> None:
    """Refuse unknown keys, values out of range, views that do not fit and parameters that cannot be optimized.

    Args:
        who: the optimizer, for messages.
        group: a group whose ``view`` is plain data.
        defaults: the optimizer's hyperparameters.
        taken: the parameters that it has already.
    """
    view = View.of(group["view"])
    allowed = WITHOUT_VIEW if view is None else set(defaults)
    for key in set(group) - ALWAYS_ALLOWED - allowed:
        known = "in a group without a view" if key in defaults else "known"
        raise ValueError(f"{who}: the key {key!r} of a group is not {known}; choose from {sorted(allowed)}.")
    check(who, group)
    if view is not None:
        _check_together(who, {**LOOP, **defaults, **group})
    if view is None and "betas" in group and group["betas"][1] == 1:
        raise ValueError(f"{who}: betas of a group without a view must both be below 1; got {group['betas']!r}.")
    seen = {id(param) for param in taken}
    for i, member in enumerate(group["params"]):
        param, name = _tensor(member), member[0] if isinstance(member, tuple) else f"parameter {len(taken) + i}"
        _check_param(f"{who}: {name!r} {tuple(param.shape)}", param)
        if id(param) in seen:
            raise ValueError(f"{who}: {name!r} {tuple(param.shape)} is given twice; pass every parameter once.")
        seen.add(id(param))
        if view is not None:
            view.check(name, param.shape)
        find(param, view, f"{who}: {name!r} {tuple(param.shape)}")


def _check_together(who: str, values: Mapping[str, Any]) -> None:
    try:
        check_eps(values["root"], values["eps"])
    except ValueError as error:
        raise ValueError(f"{who}: {error}.") from None
    if values["capturable"] and values["precondition_frequency"] != 1:
        raise ValueError(
            f"{who}: capturable got precondition_frequency={values['precondition_frequency']}; a captured graph does "
            "the same work at every step. Pass precondition_frequency=1 or capturable=False."
        )


def _check_param(what: str, param: Tensor) -> None:
    if not param.is_floating_point():
        raise TypeError(
            f"{what} is {param.dtype}; parameters must be real floating point. Optimize the real and imaginary "
            "parts (torch.view_as_real) or leave it out."
        )


ADDED: dict[str, Any] = {"packed_state": False}
"""Hyperparameters that states saved by earlier versions lack, and what those versions did."""


def check_state(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict, with what earlier versions did not save.

    Raises:
        ValueError: it is of another optimizer, model or view.
    """
    who, saved = type(optimizer).__name__, state_dict.get("param_groups", [])
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in optimizer.param_groups]:
        raise ValueError(
            f"{who}: the saved state has groups of {[len(g['params']) for g in saved]} parameters, this optimizer "
            f"of {[len(g['params']) for g in optimizer.param_groups]}. Build it with the same groups, or load by "
            "name with asgo.checkpoint.load_named_state_dict."
        )
    pairs = zip(saved, optimizer.param_groups, strict=True)
    saved = [{**{key: value for key, value in ADDED.items() if key in group}, **old} for old, group in pairs]
    names, own, place = names_of(optimizer), optimizer.state_dict()["state"], 0
    for old, group in zip(saved, optimizer.param_groups, strict=True):
        if (set(group) & set(optimizer.defaults)) - set(old) or old.get("view") != group["view"]:
            raise ValueError(
                f"{who}: a saved group has the view {old.get('view')}, this optimizer {group['view']}, or it lacks "
                "hyperparameters: it is of another optimizer. Build this one as the saved one was built."
            )
        for i, param in zip(old["params"], group["params"], strict=True):
            check_tensors(who, names[param], state_dict["state"].get(i, {}), own[place])
            place += 1
    return {**state_dict, "param_groups": saved}


def check_tensors(who: str, name: str, saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless `saved` holds the same keys and shapes as `own`."""
    for key in own.keys() | saved.keys():
        got = tuple(saved[key].shape) if key in saved else None
        wanted = tuple(own[key].shape) if key in own else None
        if got != wanted:
            raise ValueError(
                f"{who}: the saved state of {name!r} has {_shape(got)} under {key!r}, this optimizer {_shape(wanted)}."
                f" {_remedy(got or (), wanted or ())}"
            )


def _remedy(saved: Sequence[int], own: Sequence[int]) -> str:
    for shape, other, packed in ((saved, own, False), (own, saved, True)):
        if len(shape) > 2 and shape[-1] == shape[-2] and tuple(other) == (*shape[:-2], *rectangle(shape[-1])):
            return f"It was saved with packed_state={packed}: build this optimizer with that too."
    return "It is of another model, view or optimizer; build both the same way."


def _shape(shape: Sequence[int] | None) -> str:
    return "nothing" if shape is None else f"a tensor {tuple(shape)}"


def names_of(optimizer: Optimizer) -> dict[Tensor, str]:
    """The name of every parameter, or its place among all of them where it has none."""
    names: dict[Tensor, str] = {}
    for group in optimizer.param_groups:
        given = group.get("param_names") or [f"parameter {len(names) + i}" for i in range(len(group["params"]))]
        names |= dict(zip(group["params"], given, strict=True))
    return names


def refuse_sparse(optimizer: Optimizer) -> None:
    """Raise `TypeError` naming the first parameter whose gradient is not dense."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise TypeError(
                    f"{type(optimizer).__name__}: the gradient of {names_of(optimizer)[param]!r} {tuple(param.shape)} "
                    f"is sparse ({param.grad.layout}); it must be dense. Build the embedding with sparse=False, or "
                    "give it to torch.optim.SparseAdam."
                )
