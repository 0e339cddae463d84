"""Checks of hyperparameters and groups, before anything changes."""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from asgo.distributed.placement import find
from asgo.linalg.inverse_root import ROOTS, check_eps
from asgo.optimizer.adamw import DEFAULTS as ADAMW_DEFAULTS
from asgo.optimizer.param_groups import names_of
from asgo.optimizer.update_size import SCALINGS
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
    "maximize": False,
    "rounding": "nearest",
}
"""Neutral values of the options of the step, for presets that have no hyperparameter for them."""

OF_EVERY_GROUP = frozenset({"params", "param_names", "view", "views", "name", "adamw"})
"""Keys that a group may have whatever the optimizer."""

LIKE = 0.84
"""Similarity (`difflib`) from which an unknown key is taken for a misspelling of a known one."""


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
    "cross_normalize": _one_of(True, False, "element"),
    "side": _one_of("auto", "left", "right"),
    "adjust_lr": _one_of(*SCALINGS),
    "root": _one_of(*ROOTS, "square_root"),
    "precision": _one_of("auto", "bf16", "fp16", "fp32"),
    "maximize": _one_of(True, False),
    "capturable": _one_of(True, False),
    "packed_state": _one_of(True, False),
    "rounding": _one_of("nearest", "stochastic", "compensated"),
    "axis": _one_of("column", "row", "auto"),
    "max_size": (lambda value: value is None or _interval(value), "None or a whole number >= 1"),
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


def bounded(
    who: str, members: Sequence[tuple[str | None, Tensor]], views: Sequence[View | None], limit: int | None
) -> list[View | None]:
    """The views, with None where a matrix has a shorter side above `limit`; one warning names these parameters."""
    if limit is None:
        return list(views)
    fits = [
        view is None or fits_within(view, param.shape, limit) for (_, param), view in zip(members, views, strict=True)
    ]
    found = [member for member, fit in zip(members, fits, strict=True) if not fit]
    if found:
        shown = ", ".join(f"{name or 'a parameter'} {tuple(param.shape)}" for name, param in found)
        warnings.warn(
            f"{who}: AdamW takes {shown}: the shorter side is above max_size={limit}. Pass a larger max_size, or a "
            "view that cuts it into blocks.",
            stacklevel=frames_to_the_caller(),
        )
    return [view if fit else None for view, fit in zip(views, fits, strict=True)]


def fits_within(view: View, shape: Sequence[int], limit: int) -> bool:
    """Whether no matrix has a shorter side above `limit`; True for a view that does not fit, which is refused later."""
    try:
        return all(min(m, n) <= limit for _, m, n in view.shapes(shape))
    except ValueError:
        return True


def frames_to_the_caller() -> int:
    """Number of frames up to the first one outside this library and torch: the ``stacklevel`` of a warning."""
    frame, depth = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("asgo", "torch"):
        frame, depth = frame.f_back, depth + 1
    return depth


def check_group(
    who: str,
    group: Mapping[str, Any],
    members: Sequence[tuple[str | None, Tensor]],
    views: Sequence[View | None],
    defaults: Mapping[str, Any],
    taken: Mapping[Tensor, str],
) -> None:
    """Refuse hyperparameters that do not go together, views that do not fit, parameters that cannot be optimized.

    Args:
        who: the optimizer, for messages.
        group: as given by the user.
        members: pairs of name and parameter.
        views: one for each member.
        defaults: the optimizer's hyperparameters.
        taken: the parameters of the other groups, and their names.
    """
    if any(view is not None for view in views):
        _check_together(who, {**LOOP, **defaults, **group})
    names = {name for name in taken.values() if name}
    seen = {id(param) for param in taken}
    for i, ((name, param), view) in enumerate(zip(members, views, strict=True)):
        shown = name if name is not None else f"parameter {len(taken) + i}"
        what = f"{who}: {shown!r} {tuple(param.shape)}"
        _check_param(what, param)
        if id(param) in seen:
            raise ValueError(f"{what} is given twice; pass every parameter once.")
        if name is not None and name in names:
            raise ValueError(
                f"{what} has the name of another parameter. Parameters of several models need names of their own: "
                "asgo.route(model, prefix='generator.') or model.named_parameters(prefix='generator')."
            )
        seen.add(id(param))
        names.add(name or "")
        if view is not None:
            view.check(shown, param.shape)
        find(param, view, what)


def check_given(who: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse keys of a group that are misspelt or another optimizer's, and values that are out of range."""
    check_keys(f"{who}: the key", group, {*defaults, *OF_EVERY_GROUP})
    _check_known(who, group, defaults)
    check(who, group)


def _check_known(who: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a hyperparameter of another optimizer of this library, unless it has a neutral value."""
    for key in CHECKS.keys() & group.keys() - defaults.keys():
        if group[key] != LOOP.get(key):
            raise ValueError(f"{who}: the key {key!r} of a group is not known; choose from {sorted(defaults)}.")


def check_keys(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` for a key that looks like a misspelling of a known one; other unknown keys are allowed."""
    known = set(known)
    for key in given:
        close = difflib.get_close_matches(str(key), known, 1, LIKE) if key not in known else ()
        if close:
            raise ValueError(f"{what} {key!r} is not known; did you mean {close[0]!r}?")


def _check_flat(what: str, param: Tensor) -> None:
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{what} is flattened by FullyShardedDataParallel, so its matrices cannot be seen. Shard the model with "
            "torch.distributed.fsdp.fully_shard instead."
        )


def _check_together(who: str, values: Mapping[str, Any]) -> None:
    try:
        check_eps(values["root"], values["eps"])
    except ValueError as error:
        raise ValueError(f"{who}: {error}.") from None
    if values["root"] == "square_root" and values["precondition_frequency"] != 1:
        raise ValueError(
            f"{who}: root 'square_root' got precondition_frequency={values['precondition_frequency']}; its root is "
            "part of every update. Pass precondition_frequency=1, or another root."
        )
    if values["capturable"] and values["precondition_frequency"] != 1:
        raise ValueError(
            f"{who}: capturable got precondition_frequency={values['precondition_frequency']}; a captured graph does "
            "the same work at every step. Pass precondition_frequency=1 or capturable=False."
        )


def _check_param(what: str, param: Tensor) -> None:
    _check_flat(what, param)
    if not param.is_floating_point():
        raise TypeError(
            f"{what} is {param.dtype}; parameters must be real floating point. Optimize the real and imaginary "
            "parts (torch.view_as_real) or leave it out."
        )
    if not (param.is_leaf or param.retains_grad):
        raise ValueError(
            f"{what} is computed from other tensors, so it gets no gradient of its own. Pass the parameters it is "
            "computed from, or param.detach().requires_grad_()."
        )


def adamw_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group for its parameters without a view."""
    own = dict(group["adamw"])
    return {**group, "lr": learning_rate(group) * own.pop("lr_ratio", 1.0), **own}


def learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate of a group; a tensor of one element is returned as a scalar tensor."""
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def with_adamw(
    who: str, group: Mapping[str, Any], views: Sequence[View | None], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries to add to a group for the hyperparameters of its parameters without a view.

    In order of precedence: ``adamw`` of the group, hyperparameters of the group (which hold for all its parameters),
    the argument ``adamw`` of the optimizer, `asgo.optimizer.adamw.DEFAULTS`. A group in which no parameter has a view
    stores
    them under the usual keys; any other stores them under ``adamw``, with the learning rate as a ratio to the
    group's, so that a schedule changes both by the same factor.

    Raises:
        ValueError: hyperparameters that AdamW does not have, or out of range.
    """
    default, own = dict(defaults["adamw"]), dict(group.get("adamw") or {})
    check_adamw(who, own)
    set_here = {key: group[key] for key in ADAMW_DEFAULTS if key in group}
    chosen = {**ADAMW_DEFAULTS, **default, **set_here, **own}
    if "lr" in group and "lr" not in own:
        chosen.pop("lr", None)
    if chosen["betas"][1] == 1 and None in views:
        raise ValueError(
            f"{who}: betas of parameters without a view must both be below 1; got {chosen['betas']!r}. Pass "
            "adamw=dict(betas=(0.9, 0.95)) for them."
        )
    if views and not any(views):
        chosen.pop("lr_ratio", None)
        return {**chosen, "adamw": {}}
    if "lr" in chosen:
        chosen["lr_ratio"] = _ratio(who, chosen.pop("lr"), group.get("lr", defaults["lr"]))
    return {"adamw": chosen}


def _ratio(who: str, adamw_lr: float | Tensor, lr: float | Tensor) -> float:
    if float(lr) == 0:
        raise ValueError(f"{who}: adamw got an lr beside an lr of 0, of which it cannot be a multiple; pass lr > 0.")
    return float(adamw_lr) / float(lr)


def check_adamw(who: str, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for hyperparameters that AdamW does not have or that are out of range."""
    known = ("lr", *ADAMW_DEFAULTS)
    for key in given:
        if key not in (*known, "lr_ratio"):
            raise ValueError(f"{who}: adamw has no {key!r}; choose from {', '.join(known)}.")
    check(f"{who}: adamw", given)


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
