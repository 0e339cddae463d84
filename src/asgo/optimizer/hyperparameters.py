"""Hyperparameters: their constraints, the neutral values of the step's options, and AdamW's hyperparameters in a group.

A preset states the constraints of its own hyperparameters in its class attribute ``constraints``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from asgo.linalg.inverse_root import ROOTS
from asgo.optimizer.adamw import DEFAULTS as ADAMW_DEFAULTS
from asgo.optimizer.update_size import SCALINGS
from asgo.views import View

STEP_DEFAULTS: dict[str, Any] = {
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


def must_be(name: str, expected: str, got: object) -> str:
    """The message about a value that is out of range: ``lr must be a number >= 0; got -1.``"""
    return f"{name} must be {expected}; got {got!r}."


@dataclass(frozen=True)
class Constraint:
    """The values that a hyperparameter may have.

    Args:
        fits: whether a value is one of them.
        expected: what they are, to stand after "must be" in a message.
    """

    fits: Callable[[Any], bool]
    expected: str

    def check(self, name: str, value: object) -> None:
        """Raise `ValueError` for a value that does not fit.

        Args:
            name: of the hyperparameter, after the optimizer's: ``"ASGO: lr"``.
            value: as given by the user.
        """
        if not self.fits(value):
            raise ValueError(must_be(name, self.expected, value))


def check(caller: str, values: Mapping[str, Any], constraints: Mapping[str, Constraint]) -> None:
    """Raise `ValueError` for the first value that does not fit; those without a constraint are not checked."""
    for key, value in values.items():
        if key in constraints:
            constraints[key].check(f"{caller}: {key}", value)


def is_number(value: Any, low: float, high: float = math.inf) -> bool:
    """Whether a value is a number, not a bool, in ``[low, high)``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high


def is_whole(value: Any, low: int = 1) -> bool:
    """Whether a value is an int, not a bool, of at least `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def positive(example: str) -> Constraint:
    """A finite number above 0."""
    return Constraint(lambda value: is_number(value, 0) and value > 0, f"a number > 0, e.g. {example}")


def whole(what: str = "a whole number", low: int = 1) -> Constraint:
    """An int of at least `low`."""
    return Constraint(lambda value: is_whole(value, low), f"{what} >= {low}")


def one_of(*values: Any) -> Constraint:
    """One of these, of the same type."""
    return Constraint(
        lambda value: any(value is v or (value == v and type(value) is type(v)) for v in values),
        "one of " + ", ".join(map(repr, values)),
    )


def or_none(constraint: Constraint) -> Constraint:
    """None, or what the constraint allows."""
    return Constraint(lambda value: value is None or constraint.fits(value), f"None or {constraint.expected}")


def _is_lr(value: Any) -> bool:
    if isinstance(value, Tensor):
        # A lr on a device is not read: that would wait for the device.
        return value.numel() == 1 and (value.device.type != "cpu" or 0 <= float(value) < math.inf)
    return is_number(value, 0)


def _are_betas(value: Any) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and is_number(value[0], 0, 1) and (is_number(value[1], 0, 1) or value[1] == 1)


FLAG = Constraint(lambda value: isinstance(value, bool), "one of True, False")

SHARED: dict[str, Constraint] = {
    "lr": Constraint(_is_lr, "a finite number >= 0 or a one-element tensor"),
    "betas": Constraint(_are_betas, "two numbers in [0, 1); a second one of 1 adds gradients up instead of averaging"),
    "eps": positive("1e-6"),
    "weight_decay": Constraint(lambda value: is_number(value, 0), "a finite number >= 0"),
    "precondition_frequency": whole("a whole number of steps"),
    "statistic": one_of("gradient", "momentum"),
    "nesterov": FLAG,
    "cross_normalize": Constraint(
        lambda value: isinstance(value, bool) or value == "element", "one of True, False, 'element'"
    ),
    "side": one_of("auto", "left", "right"),
    "adjust_lr": one_of(*SCALINGS),
    "root": one_of(*ROOTS, "square_root"),
    "precision": one_of("auto", "bf16", "bf16_deep", "fp16", "fp16_deep", "fp32"),
    "maximize": FLAG,
    "capturable": FLAG,
    "packed_state": FLAG,
    "rounding": one_of("nearest", "stochastic", "compensated"),
    "max_size": or_none(whole()),
}
"""Constraints of the options of the step, and of hyperparameters that several presets have."""

KNOWN: set[str] = set(SHARED)
"""Names of all hyperparameters of this library, so that a group refuses another optimizer's."""


def from_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters among the arguments of a preset's constructor: ``from_arguments(locals())``."""
    others = ("self", "__class__", "params", "adamw", "adjust_lr_fn")
    return {name: value for name, value in arguments.items() if name not in others}


def adjust_lr_of(caller: str, adjust_lr: str | None, adjust_lr_fn: str | None) -> str | None:
    """``adjust_lr``, or what `torch.optim.Muon` calls so: its ``adjust_lr_fn="match_rms_adamw"`` is ``"rms"``.

    Raises:
        ValueError: another value of `adjust_lr_fn`.
    """
    or_none(one_of("match_rms_adamw")).check(f"{caller}: adjust_lr_fn", adjust_lr_fn)
    return adjust_lr if adjust_lr_fn is None else "rms"


def adamw_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group for its parameters without a view."""
    own = dict(group["adamw"])
    return {**group, "lr": learning_rate(group) * own.pop("lr_ratio", 1.0), **own}


def learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate of a group; a tensor of one element is returned as a scalar tensor."""
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def with_adamw(
    caller: str, group: Mapping[str, Any], views: Sequence[View | None], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries to add to a group for the hyperparameters of its parameters without a view.

    In order of precedence: ``adamw`` of the group, hyperparameters of the group (which hold for all its parameters),
    the argument ``adamw`` of the optimizer, `asgo.optimizer.adamw.DEFAULTS`. A group in which no parameter has a view
    stores them under the usual keys; any other stores them under ``adamw``, with the learning rate as a ratio to the
    group's, so that a schedule changes both by the same factor.

    Raises:
        ValueError: hyperparameters that AdamW does not have, or out of range.
    """
    default, own = dict(defaults["adamw"]), dict(group.get("adamw") or {})
    check_adamw(caller, own)
    set_here = {key: group[key] for key in ADAMW_DEFAULTS if key in group}
    chosen = {**ADAMW_DEFAULTS, **default, **set_here, **own}
    if "lr" in group and "lr" not in own:
        chosen.pop("lr", None)
    if chosen["betas"][1] == 1 and None in views:
        raise ValueError(
            f"{caller}: betas of parameters without a view must both be below 1; got {chosen['betas']!r}. Pass "
            "adamw=dict(betas=(0.9, 0.95)) for them."
        )
    if views and not any(views):
        chosen.pop("lr_ratio", None)
        return {**chosen, "adamw": {}}
    if "lr" in chosen:
        chosen["lr_ratio"] = _ratio(caller, chosen.pop("lr"), group.get("lr", defaults["lr"]))
    return {"adamw": chosen}


def _ratio(caller: str, adamw_lr: float | Tensor, lr: float | Tensor) -> float:
    if float(lr) == 0:
        raise ValueError(f"{caller}: adamw got an lr beside an lr of 0, of which it cannot be a multiple; pass lr > 0.")
    return float(adamw_lr) / float(lr)


def check_adamw(caller: str, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for hyperparameters that AdamW does not have or that are out of range."""
    known = ("lr", *ADAMW_DEFAULTS)
    for key in given:
        if key not in (*known, "lr_ratio"):
            raise ValueError(f"{caller}: adamw has no {key!r}; choose from {', '.join(known)}.")
    check(f"{caller}: adamw", given, SHARED)
