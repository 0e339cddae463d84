"""Structured adaptive optimizers for PyTorch.

>>> from asgo import ASGO, route
>>> optimizer = ASGO(route(model), lr=1e-2)   # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from asgo import checkpoint, presets
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets import *  # noqa: F403
from asgo.views import View, fused
from asgo.views.routing import Decision, Rule, explain, route

if TYPE_CHECKING:
    from asgo import diagnostics
    from asgo.diagnostics.advice import Advice, advise
    from asgo.diagnostics.reports import Report, report, state_bytes

__all__ = [
    "Advice",
    "Decision",
    "Report",
    "Rule",
    "StructuredOptimizer",
    "View",
    "advise",
    "checkpoint",
    "diagnostics",
    "explain",
    "fused",
    "report",
    "route",
    "state_bytes",
]
__all__ += presets.__all__
__version__ = "0.1.0"

_LAZY = {
    "Advice": "advice",
    "advise": "advice",
    "Report": "reports",
    "report": "reports",
    "state_bytes": "reports",
}
"""Public names whose modules, of `asgo.diagnostics`, are imported when the names are first used."""


def __getattr__(name: str) -> Any:
    if name == "diagnostics":
        return import_module("asgo.diagnostics")
    if name in _LAZY:
        return getattr(import_module(f"asgo.diagnostics.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
