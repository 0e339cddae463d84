"""The table of problems."""

from __future__ import annotations

from asgo.lab.theory.nonsmooth import Absolute, Hinge
from asgo.lab.theory.problem import Problem
from asgo.lab.theory.smooth import Logistic, Squares

PROBLEMS: dict[str, type[Problem]] = {
    "absolute": Absolute,
    "hinge": Hinge,
    "squares": Squares,
    "logistic": Logistic,
}
"""Two that are not smooth, two that are."""
