"""The table of problems."""

from __future__ import annotations

from experiments.theory.nonsmooth import Absolute, Hinge
from experiments.theory.problem import Problem
from experiments.theory.smooth import Logistic, Squares

PROBLEMS: dict[str, type[Problem]] = {
    "absolute": Absolute,
    "hinge": Hinge,
    "squares": Squares,
    "logistic": Logistic,
}
"""Two that are not smooth, two that are."""
