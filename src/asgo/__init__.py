"""Structured adaptive optimizers for PyTorch.

>>> from asgo import ASGO, route
>>> optimizer = ASGO(route(model), lr=1e-2)   # doctest: +SKIP
"""

from asgo import checkpoint, diagnostics
from asgo.diagnostics.advice import Advice, advise
from asgo.diagnostics.reports import Report, report, state_bytes
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets import AGD, ASGO, BAG, BAGM, DASGO, SPAM, AdaBlock, AdaGram, AdamMini, OneSidedShampoo, Shampoo
from asgo.views import View, fused
from asgo.views.routing import Decision, Rule, explain, route

__all__ = [
    "AGD",
    "ASGO",
    "BAG",
    "BAGM",
    "DASGO",
    "SPAM",
    "AdaBlock",
    "AdaGram",
    "AdamMini",
    "Advice",
    "Decision",
    "OneSidedShampoo",
    "Report",
    "Rule",
    "Shampoo",
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
__version__ = "0.1.0"
