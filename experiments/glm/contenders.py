"""The optimizers that can be compared on convex problems, written in one word."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, Adagrad, Optimizer

from asgo.lab.errors import LabError
from asgo.presets import AdaGram, Shampoo
from asgo.views import STACK
from experiments.full_adagrad import FullAdaGrad


@dataclass(frozen=True)
class Kind:
    """One row of `KINDS`.

    Args:
        constructor: of the optimizer. Its step must be proportional to lr and not depend on the weights.
        floor: the argument that says what its statistic of squares starts from: with gradients c times as long, and
            c^2 times this, the step must stay the same.
        stacked: whether it needs to be told that the first axis counts independent models.
    """

    constructor: Callable[..., Optimizer]
    floor: str | None = None
    stacked: bool = False


KINDS: dict[str, Kind] = {
    "sgd": Kind(SGD),
    "adagrad": Kind(Adagrad, "initial_accumulator_value"),
    "full-adagrad": Kind(FullAdaGrad, "eps"),
    "shampoo": Kind(Shampoo, "eps", stacked=True),
    "adagram": Kind(AdaGram, "eps", stacked=True),
}
"""torch's own SGD and diagonal AdaGrad, the dense reference, and this library's."""

FLOOR = 1e-2
"""What the statistics of `OptimizerSpec.build` start from; `descent.Setting` says how others are had."""


@dataclass(frozen=True)
class Form:
    """Which AdaGram.

    Args:
        rank: directions that are remembered; None for no limit.
        direction: factor or symmetric.
        integrator: psi, bug or eig; of no meaning without a limit.
    """

    rank: int | None
    direction: str
    integrator: str


@dataclass(frozen=True)
class OptimizerSpec:
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
        """The optimizer of a stack of independent models ``(models, m, n)``, with a learning rate of 1.

        Raises:
            LabError: for values that the optimizer refuses.
        """
        kind = KINDS[self.name]
        params = [{"params": [models], "view": STACK}] if kind.stacked else [models]
        floor = {} if kind.floor is None else {kind.floor: FLOOR}
        try:
            return kind.constructor(params, **{"lr": 1.0, **floor, **dict(self.options)})
        except (ValueError, TypeError) as error:
            raise LabError(f"optimizer {self.text!r}: {error}") from error

    def option(self, name: str) -> Any:
        """The value of an option, the constructor's default where it was not given; None if there is none."""
        parameter = inspect.signature(KINDS[self.name].constructor).parameters.get(name)
        return dict(self.options).get(name, None if parameter is None else parameter.default)

    def has_floor(self) -> bool:
        """Whether there is a floor to choose: the optimizer has one, and the options do not set it."""
        floor = KINDS[self.name].floor
        return floor is not None and floor not in dict(self.options)

    def form(self) -> Form | None:
        """Which AdaGram it is; None for others."""
        if self.name != "adagram":
            return None
        rank, direction = self.option("rank"), self.option("direction")
        integrator = self.option("integrator") or ("psi" if direction == "factor" else "eig")
        return Form(5 if rank == "auto" else rank, direction, integrator)

    def is_dense(self) -> bool:
        """Whether it holds a matrix of all parameters times all parameters."""
        form = self.form()
        return self.name == "full-adagrad" or (form is not None and form.rank is None)

    def work(self, m: int, n: int) -> float:
        """About how long a step takes on ``m x n`` models, in steps of SGD on small ones."""
        d = m * n
        if self.is_dense():
            return 4 + (d / 20) ** 3 / 5
        if self.name == "shampoo":
            return 4 + ((m / 20) ** 3 + (n / 20) ** 3) / 5 / self.option("precondition_frequency")
        return (6 if self.name == "adagram" else 1) * (1 + d / 250)


def parse(text: str) -> OptimizerSpec:
    """The contender that `text` describes: a name, or ``name:key=value,...`` as in ``adagram:rank=3``.

    Two numbers are joined by ``/``, as in ``shampoo:betas=0/1``.

    Raises:
        LabError: for a name or option that does not exist.
    """
    name, _, rest = text.partition(":")
    if name not in KINDS:
        raise LabError(f"optimizer {name!r} does not exist for experiments.glm: choose from {', '.join(KINDS)}.")
    takes = set(inspect.signature(KINDS[name].constructor).parameters) - {"self", "params", "lr"}
    options = []
    for entry in filter(None, rest.split(",")):
        key, equals, value = entry.partition("=")
        if not equals or key not in takes:
            known = ", ".join(sorted(takes))
            raise LabError(f"optimizer {text!r}: {entry!r} is not key=value with a key it has: {known}.")
        options.append((key, _value(value)))
    return OptimizerSpec(text, name, tuple(options))


def _value(text: str) -> Any:
    if "/" in text:
        return tuple(_value(part) for part in text.split("/"))
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
