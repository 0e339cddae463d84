"""The optimizers that can be compared on convex problems, written in one word."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Optimizer

from asgo.lab.convex.full import FullAdaGrad
from asgo.lab.errors import LabError
from asgo.views import STACK


@dataclass(frozen=True)
class Kind:
    """One row of `KINDS`.

    Args:
        constructor: of the optimizer. Its step must be proportional to lr and not depend on the weights.
        stacked: whether it needs to be told that the first axis counts independent models.
        dense: whether its cost grows with the cube of the number of parameters.
    """

    constructor: Callable[..., Optimizer]
    stacked: bool = False
    dense: bool = False


KINDS: dict[str, Kind] = {
    "sgd": Kind(SGD),
    "adagrad": Kind(Adagrad),
    "full-adagrad": Kind(FullAdaGrad, dense=True),
}
"""torch's own SGD and diagonal AdaGrad, the dense reference, and this library's."""


@dataclass(frozen=True)
class Contender:
    """An optimizer with its options.

    Args:
        text: as it was written.
        name: in `KINDS`.
        options: arguments of the constructor, without the learning rate.
    """

    text: str
    name: str
    options: tuple[tuple[str, Any], ...]

    def build(self, models: nn.Parameter) -> Optimizer:
        """The optimizer of a stack of independent models ``(models, m, n)``, with a learning rate of 1."""
        kind = KINDS[self.name]
        params = [{"params": [models], "view": STACK}] if kind.stacked else [models]
        return kind.constructor(params, lr=1.0, **dict(self.options))

    def option(self, name: str) -> Any:
        """The value of an option, the constructor's default where it was not given; None if there is none."""
        parameter = inspect.signature(KINDS[self.name].constructor).parameters.get(name)
        return dict(self.options).get(name, None if parameter is None else parameter.default)

    def is_dense(self) -> bool:
        """Whether a step costs the cube of the number of parameters."""
        unlimited = self.name == "adagram" and self.option("rank") is None
        return KINDS[self.name].dense or (unlimited and self.option("direction") == "symmetric")


@lru_cache(maxsize=256)
def parse(text: str) -> Contender:
    """The contender that `text` describes: a name, or ``name:key=value,...`` as in ``adagram:rank=3``.

    Raises:
        LabError: for a name or option that does not exist, or a value that the optimizer refuses.
    """
    name, _, rest = text.partition(":")
    if name not in KINDS:
        raise LabError(f"optimizer {name!r} does not exist for asgo glm: choose from {', '.join(KINDS)}.")
    takes = set(inspect.signature(KINDS[name].constructor).parameters) - {"self", "params", "lr"}
    options = []
    for entry in filter(None, rest.split(",")):
        key, equals, value = entry.partition("=")
        if not equals or key not in takes:
            known = ", ".join(sorted(takes))
            raise LabError(f"optimizer {text!r}: {entry!r} is not key=value with a key it has: {known}.")
        options.append((key, _value(value)))
    contender = Contender(text, name, tuple(options))
    try:
        contender.build(nn.Parameter(torch.zeros(1, 8, 8, dtype=torch.float64)))
    except (ValueError, TypeError) as error:
        raise LabError(f"optimizer {text!r}: {error}") from error
    return contender


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
