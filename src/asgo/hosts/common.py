"""What the modules of several frameworks share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from asgo import presets
from asgo.optimizer.step import StructuredOptimizer, structured

METRICS = ("update_rms", "weight_rms", "ratio", "gradient_norm", "failures", "root_residual")
"""The keys of `StructuredOptimizer.metrics`."""

BY_NAME = {name.lower(): getattr(presets, name) for name in presets.__all__ if name != "SPAM"}
"""The optimizers by the names of their classes in lower case; `SPAM` is given an optimizer, not parameters."""


def needed(*names: str, extra: str) -> ModuleType:
    """The first of these modules that is installed.

    Raises:
        ImportError: none is.
    """
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # it is installed, and something that it imports is not
    raise ImportError(f'asgo.hosts.{extra} needs {names[0].partition(".")[0]}: pip install "asgo[{extra}]".')


def optimizer_named(optimizer: str | Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """What builds an optimizer: itself, or the class of this library with this name (``"asgo"``, ``"dasgo"``).

    Raises:
        ValueError: no class has the name.
    """
    if not isinstance(optimizer, str):
        return optimizer
    if optimizer.lower() in BY_NAME:
        return BY_NAME[optimizer.lower()]
    close = difflib.get_close_matches(optimizer.lower(), BY_NAME, n=1)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"no optimizer of asgo is called {optimizer!r}. {meant}There are {', '.join(sorted(BY_NAME))}.")


def check_module(where: str, model: Any) -> None:
    """Raise `TypeError` for anything but a module, such as bare parameters."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{where} needs the model, from which the view of every parameter follows; got {type(model).__name__}. "
            "Pass the model itself, not model.parameters()."
        )


def recording(optimizer: Any) -> StructuredOptimizer:
    """The optimizer of this library inside what a framework wraps around it.

    Raises:
        TypeError: there is none.
    """
    found = structured(optimizer)
    if found is None:
        while hasattr(optimizer, "optimizer"):  # the framework's wrappers, which the user has not written
            optimizer = optimizer.optimizer
        raise TypeError(f"MetricsCallback needs an optimizer of asgo; got {type(optimizer).__name__}.")
    return found


def check_keys(keys: tuple[str, ...], every: int | None) -> None:
    """Raise `ValueError` for a metric that does not exist, or an interval below 1."""
    for key in keys:
        if key not in METRICS:
            raise ValueError(f"MetricsCallback: there is no metric {key!r}. There are {', '.join(METRICS)}.")
    if every is not None and every < 1:
        raise ValueError(f"MetricsCallback: every must be a number of steps >= 1; got {every}.")


def flat(found: Mapping[str, Mapping[str, float]], keys: tuple[str, ...], parameters: str) -> dict[str, float]:
    """``{"ratio/model.embed.weight": ...}`` of the parameters whose names fit a pattern."""
    return {
        f"{key}/{name}": float(row[key])
        for name, row in found.items()
        if fnmatchcase(name, parameters)
        for key in keys
        if key in row
    }
