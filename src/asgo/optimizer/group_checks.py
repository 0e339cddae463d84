"""Checks of parameter groups before anything changes: members, views, keys, and hyperparameters that go together."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from asgo.distributed.placement import find
from asgo.linalg.inverse_root import check_eps
from asgo.optimizer.hyperparameters import KNOWN, STEP_DEFAULTS, Constraint, check
from asgo.optimizer.param_groups import names_of
from asgo.views import View

OF_EVERY_GROUP = frozenset({"params", "param_names", "view", "views", "name", "adamw"})
"""Keys that a group may have whatever the optimizer."""

LIKE = 0.84
"""Similarity (`difflib`) from which an unknown key is taken for a misspelling of a known one."""


def bounded(
    caller: str, members: Sequence[tuple[str | None, Tensor]], views: Sequence[View | None], limit: int | None
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
            f"{caller}: AdamW takes {shown}: the shorter side is above max_size={limit}. Pass a larger max_size, or a "
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
    caller: str,
    group: Mapping[str, Any],
    members: Sequence[tuple[str | None, Tensor]],
    views: Sequence[View | None],
    defaults: Mapping[str, Any],
    taken: Mapping[Tensor, str],
) -> None:
    """Refuse hyperparameters that do not go together, views that do not fit, parameters that cannot be optimized.

    Args:
        caller: the optimizer, for messages.
        group: as given by the user.
        members: pairs of name and parameter.
        views: one for each member.
        defaults: the optimizer's hyperparameters.
        taken: the parameters of the other groups, and their names.
    """
    if any(view is not None for view in views):
        _check_together(caller, {**STEP_DEFAULTS, **defaults, **group})
    names = {name for name in taken.values() if name}
    seen = {id(param) for param in taken}
    for i, ((name, param), view) in enumerate(zip(members, views, strict=True)):
        shown = name if name is not None else f"parameter {len(taken) + i}"
        what = f"{caller}: {shown!r} {tuple(param.shape)}"
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


def check_given(
    caller: str, group: Mapping[str, Any], defaults: Mapping[str, Any], constraints: Mapping[str, Constraint]
) -> None:
    """Refuse keys of a group that are misspelt or another optimizer's, and values that are out of range."""
    check_keys(f"{caller}: the key", group, {*defaults, *OF_EVERY_GROUP})
    _check_known(caller, group, defaults)
    check(caller, group, constraints)


def _check_known(caller: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a hyperparameter of another optimizer of this library, unless it has a neutral value."""
    for key in KNOWN & group.keys() - defaults.keys():
        if group[key] != STEP_DEFAULTS.get(key):
            raise ValueError(f"{caller}: the key {key!r} of a group is not known; choose from {sorted(defaults)}.")


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


def _check_together(caller: str, values: Mapping[str, Any]) -> None:
    try:
        check_eps(values["root"], values["eps"])
    except ValueError as error:
        raise ValueError(f"{caller}: {error}.") from None
    if values["root"] == "square_root" and values["precondition_frequency"] != 1:
        raise ValueError(
            f"{caller}: root 'square_root' got precondition_frequency={values['precondition_frequency']}; its root is "
            "part of every update. Pass precondition_frequency=1, or another root."
        )
    if values["capturable"] and values["precondition_frequency"] != 1:
        raise ValueError(
            f"{caller}: capturable got precondition_frequency={values['precondition_frequency']}; a captured graph "
            f"does "
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
