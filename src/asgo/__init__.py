"""Structured adaptive optimizers for PyTorch."""

from asgo.presets import ASGO
from asgo.views import View

__all__ = ["ASGO", "View"]
